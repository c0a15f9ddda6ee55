"""Turns protobuf messages into the objects they stand for, and back. Everything that comes in is checked here."""

import typing

from neurojax.config import ModelConfig, Sampling, Serving, Span
from neurojax.config.serving import MOST_CONTEXT, check_choice
from neurojax.forms import Weights
from neurojax.pipeline import pipeline_pb2 as pb
from neurojax.wire.identity import PACKAGE

PROTOCOL = 3
"""Version of the protocol. Every change that an older peer would misread raises it."""

SAME_MODEL = ("protocol", "package", "model_sha256", "num_layers")
"""Fields of an identity that must be equal before layers are planned."""

SAME_FORM = ("model_sha256", "num_layers", "dtype", "context_length")
"""Fields of an identity that must be equal before any tensor crosses; `programs` too, once all stages
run the same ones."""

_ROW_BYTES = 768
"""Bound on the bytes of a row of one position beside activations and mask, and on those of its outcome, which
names the 20 likeliest tokens at most twice."""


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
  """Ask a stage server to load a span and run it as `serving` says, by the programs of the identity."""
  return pb.LoadRequest(
    identity=identity,
    first_layer=span.first_layer,
    last_layer=span.last_layer,
    weights=serving.weights,
    max_sequences=serving.sequences,
    cache=serving.cache,
    prefix=serving.prefix,
    quick=serving.programs == "quick",
  )


def serving(request: pb.LoadRequest) -> Serving:
  """Read how a coordinator wants layers held and run.

  Raises: ValueError: as `Serving.check_engine` does.
  """
  check_choice("weights", request.weights, typing.get_args(Weights))
  check_choice("programs", request.identity.programs, ("auto", "model", "fused"))
  found = Serving(
    dtype=request.identity.dtype,
    weights=request.weights,
    context=request.identity.context_length,
    sequences=request.max_sequences,
    cache=request.cache,
    prefix=request.prefix,
    programs=request.identity.programs,
  )
  found.check_engine()
  return found


def message_limit(config: ModelConfig, positions: int) -> int:
  """Bytes of the largest frame that a step of so many positions can need.

  Each position may be a row of its own, with its name and the bits of the tokens that it allows. One
  row may tell the sampler of a prompt that fills the context.
  """
  row = config.model_dim * 4 + config.vocab_size // 8 + _ROW_BYTES
  return positions * row + 4 * min(config.context_length, MOST_CONTEXT) + (1 << 16)
