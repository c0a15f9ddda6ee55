"""Turns protobuf messages into the objects they stand for, and back. Everything that comes in is checked here."""

import typing

from neurojax.config import ModelConfig, Sampling, Serving, Span
from neurojax.config.serving import check_choice
from neurojax.forms import Weights
from neurojax.pipeline import pipeline_pb2 as pb
from neurojax.stage.step import StepInput
from neurojax.wire import tensor
from neurojax.wire.identity import PACKAGE

PROTOCOL = 2
"""Version of the protocol. Every change that an older peer would misread raises it."""

SAME_MODEL = ("protocol", "package", "model_sha256", "num_layers")
"""Fields of an identity that must be equal before layers are planned."""

SAME_FORM = ("model_sha256", "num_layers", "dtype", "context_length")
"""Fields of an identity that must be equal before any tensor crosses; `programs` too, once all stages
run the same ones."""


def step(sequence: str, index: int, given: StepInput) -> pb.Step:
  return pb.Step(
    sequence=sequence,
    index=index,
    start=given.start,
    tokens=tensor.encode(given.tokens),
    hidden=None if given.hidden is None else tensor.encode(given.hidden),
    is_answer=given.is_answer,
    sample=given.sample,
    targets=None if given.targets is None else tensor.encode(given.targets),
  )


def step_input(message: pb.Step) -> StepInput:
  """Read a step. Whether it fits its sequence is for the runtime to check.

  Raises: ValueError: a tensor is no array.
  """
  return StepInput(
    start=message.start,
    tokens=tensor.decode(message.tokens, what="tokens", max_dims=1),
    hidden=tensor.decode(message.hidden, what="activations", max_dims=2)
    if message.HasField("hidden")
    else None,
    is_answer=message.is_answer,
    sample=message.sample,
    targets=tensor.decode(message.targets, what="targets", max_dims=1)
    if message.HasField("targets")
    else None,
  )


def sampling(request: Sampling) -> pb.Sampling:
  return pb.Sampling(
    temperature=request.temperature,
    top_k=request.top_k or 0,
    top_p=request.top_p,
    min_p=request.min_p,
    repetition_penalty=request.repetition_penalty,
    presence_penalty=request.presence_penalty,
    frequency_penalty=request.frequency_penalty,
    seed=request.seed,
    bias_ids=[token for token, _ in request.logit_bias],
    bias_values=[value for _, value in request.logit_bias],
    min_tokens=request.min_tokens,
  )


def sampling_request(message: pb.Sampling) -> Sampling:
  """Read sampling settings. Raises: ValueError: as `Sampling` does."""
  if len(message.bias_ids) != len(message.bias_values):
    raise ValueError(
      f"{len(message.bias_ids)} tokens with {len(message.bias_values)} biases: send one for each"
    )
  return Sampling(
    temperature=message.temperature,
    top_k=message.top_k or None,
    top_p=message.top_p,
    min_p=message.min_p,
    repetition_penalty=message.repetition_penalty,
    presence_penalty=message.presence_penalty,
    frequency_penalty=message.frequency_penalty,
    seed=message.seed,
    logit_bias=zip(message.bias_ids, message.bias_values, strict=True),
    min_tokens=message.min_tokens,
  )


def identity(
  config: ModelConfig, *, sha256: str, dtype: str, context_length: int, programs: str = "auto"
) -> pb.Identity:
  return pb.Identity(
    protocol=PROTOCOL,
    package=PACKAGE,
    model_sha256=sha256,
    num_layers=config.num_layers,
    dtype=dtype,
    context_length=context_length,
    programs=programs,
  )


def load_request(identity: pb.Identity, span: Span, serving: Serving) -> pb.LoadRequest:
  """Ask a stage server to load a span and run it as `serving` says."""
  return pb.LoadRequest(
    identity=identity,
    first_layer=span.first_layer,
    last_layer=span.last_layer,
    weights=serving.weights,
    max_sequences=serving.sequences,
  )


def serving(request: pb.LoadRequest) -> Serving:
  """Read how a coordinator wants layers held and run.

  Raises: ValueError: as `Serving.check_engine` does.
  """
  check_choice("weights", request.weights, typing.get_args(Weights))
  found = Serving(
    dtype=request.identity.dtype,
    weights=request.weights,
    context=request.identity.context_length,
    sequences=request.max_sequences,
    programs=request.identity.programs,
  )
  found.check_engine()
  return found


def message_limit(config: ModelConfig, positions: int) -> int:
  """Bytes of the largest frame that a step of so many positions can need."""
  return positions * (config.model_dim * 4 + 16) + (1 << 16)
