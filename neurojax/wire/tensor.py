"""Arrays as messages. Everything that comes in is checked here."""

import zlib

import ml_dtypes
import numpy as np

from neurojax.wire import wire_pb2 as pb

DTYPES: dict[str, np.dtype] = {
  "int32": np.dtype("<i4"),
  "float32": np.dtype("<f4"),
  "float16": np.dtype("<f2"),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""The dtypes that travel, by name; little-endian."""


def encode(array: np.ndarray) -> pb.Tensor:
  """Turn an array of any shape into a message.

  Raises: ValueError: the dtype is none of `DTYPES`.
  """
  name = array.dtype.name
  if name not in DTYPES:
    raise ValueError(f"dtype {name} does not travel; those that do: {', '.join(DTYPES)}")
  data = np.ascontiguousarray(array).tobytes()
  return pb.Tensor(dtype=name, shape=array.shape, data=data, crc32=zlib.crc32(data))


def decode(message: pb.Tensor, *, what: str, max_dims: int) -> np.ndarray:
  """Turn a message back into an array, which is read-only.

  Args:
    what: Name of the array in errors.
    max_dims: Most dimensions that are accepted; the fewest are 1.
  Raises: ValueError: dtype, shape, length and checksum do not describe one array.
  """
  if message.dtype not in DTYPES:
    raise ValueError(f"{what}: unknown dtype {message.dtype[:40]!r}")
  dtype, shape = DTYPES[message.dtype], tuple(message.shape)
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
