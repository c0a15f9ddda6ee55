"""Between protobuf messages and what they mean. Everything that comes in is checked here."""

import zlib

import grpc
import ml_dtypes
import numpy as np

import neurojax
from neurojax.config import ModelConfig, Sampling
from neurojax.pipeline import pipeline_pb2 as pb
from neurojax.stage.step import StepInput

PROTOCOL = 2
"""Raised by every change that an older peer would misread."""

PACKAGE = neurojax.__version__

_DTYPES: dict[str, np.dtype] = {
  "int32": np.dtype("<i4"),
  "float32": np.dtype("<f4"),
  "float16": np.dtype("<f2"),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

SAME_MODEL = ("protocol", "package", "model_sha256", "num_layers")
"""What must be equal before layers are even planned."""

SAME_FORM = ("model_sha256", "num_layers", "dtype", "context_length")
"""What must be equal before any tensor crosses, and `programs`, once stages have become one kind."""

MAX_CONTEXT = 1 << 24
"""Positions beyond this are no longer exact in float32."""


def tensor(array: np.ndarray) -> pb.Tensor:
  """Raises: ValueError: a dtype that does not travel."""
  name = array.dtype.name
  if name not in _DTYPES:
    raise ValueError(f"dtype {name} does not travel; those that do: {', '.join(_DTYPES)}")
  data = np.ascontiguousarray(array).tobytes()
  return pb.Tensor(dtype=name, shape=array.shape, data=data, crc32=zlib.crc32(data))


def array(message: pb.Tensor, *, what: str, max_dims: int) -> np.ndarray:
  """Raises: ValueError: dtype, shape, length and checksum do not describe one array."""
  if message.dtype not in _DTYPES:
    raise ValueError(f"{what}: unknown dtype {message.dtype[:40]!r}")
  dtype, shape = _DTYPES[message.dtype], tuple(message.shape)
  if not 1 <= len(shape) <= max_dims:
    raise ValueError(f"{what}: {len(shape)} dimensions, expected 1 to {max_dims}")
  size = dtype.itemsize
  for extent in shape:
    size *= extent
  if size != len(message.data):
    raise ValueError(
      f"{what}: {message.dtype}{list(shape)} takes {size} bytes, the message holds {len(message.data)}"
    )
  if zlib.crc32(message.data) != message.crc32:
    raise ValueError(f"{what}: the checksum does not fit the data")
  return np.frombuffer(message.data, dtype).reshape(shape)


def step(sequence: str, index: int, given: StepInput) -> pb.Step:
  return pb.Step(
    sequence=sequence,
    index=index,
    start=given.start,
    tokens=tensor(given.tokens),
    hidden=None if given.hidden is None else tensor(given.hidden),
    is_answer=given.is_answer,
    sample=given.sample,
    targets=None if given.targets is None else tensor(given.targets),
  )


def step_input(message: pb.Step) -> StepInput:
  """Raises: ValueError: a tensor that is no array. Fit with the sequence is the runtime's to check."""
  return StepInput(
    start=message.start,
    tokens=array(message.tokens, what="tokens", max_dims=1),
    hidden=array(message.hidden, what="activations", max_dims=2)
    if message.HasField("hidden")
    else None,
    is_answer=message.is_answer,
    sample=message.sample,
    targets=array(message.targets, what="targets", max_dims=1)
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
  )


def sampling_request(message: pb.Sampling) -> Sampling:
  """Raises: ValueError: as `Sampling` does."""
  return Sampling(
    temperature=message.temperature,
    top_k=message.top_k or None,
    top_p=message.top_p,
    min_p=message.min_p,
    repetition_penalty=message.repetition_penalty,
    presence_penalty=message.presence_penalty,
    frequency_penalty=message.frequency_penalty,
    seed=message.seed,
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


def disagreement(here: pb.Identity, there: pb.Identity, *, fields: tuple[str, ...]) -> str | None:
  """The first of `fields` in which two ends differ, in words; None if they agree."""
  for name in fields:
    mine, theirs = getattr(here, name), getattr(there, name)
    if mine != theirs:
      if name == "model_sha256":
        mine, theirs = mine[:12] or "none", theirs[:12] or "none"
      return f"{name.replace('_', ' ')} is {mine} here and {theirs} there"
  return None


def brief(error: BaseException) -> str:
  """What an error of a call says, in a few words."""
  if isinstance(error, grpc.aio.AioRpcError):
    return f"{error.code().name}: {error.details()}"
  return str(error) or type(error).__name__


def message_limit(config: ModelConfig, positions: int) -> int:
  """Bytes of the largest frame that a step of `positions` can need."""
  return positions * (config.model_dim * 4 + 16) + (1 << 16)


def channel_options(limit: int) -> list[tuple[str, int]]:
  """gRPC options of both ends: bounded messages, and dead peers found within about 15 s."""
  return [
    ("grpc.max_receive_message_length", limit),
    ("grpc.max_send_message_length", limit),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.enable_http_proxy", 0),
    ("grpc.so_reuseport", 0),
  ]
