"""Writing GGUF, version 3, from fields and tensors whose bytes are known.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from neurojax.files.put import put, stored

ALIGNMENT = 32
# llama.h, llama_ftype: what most matrices are.
FILE_TYPES = {
  "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32, "TQ1_0": 36,
  "TQ2_0": 37, "Q2_0": 41, "Q2_0_g128": 41,
}  # fmt: skip

_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
  """One tensor of a file to be written. A subclass makes its data.

  Attributes:
    name: The name in the file.
    shape: The row-major shape.
    type_id: The number of its element type.
    nbytes: Bytes of its data, without padding.
  """

  name: str
  shape: tuple[int, ...]
  type_id: int
  nbytes: int

  def data(self) -> np.ndarray:
    """Make the data, when their turn has come: an array of any dtype with `nbytes` bytes."""
    raise NotImplementedError


def field(key: str, value: object) -> bytes:
  """A key with its value: whole numbers as uint32 (int32 below zero), in lists as int32; floats as
  float32; also bool, str, and lists of one kind.

  Raises: ValueError: a value of another kind, an empty list, or a number beyond its type.
  """
  try:
    if isinstance(value, list | tuple):
      return _text(key) + struct.pack("<I", _ARRAY) + _array(value)
    kind, raw = _scalar(value)
    return _text(key) + struct.pack("<I", kind) + raw
  except (struct.error, OverflowError) as error:
    raise ValueError(f"{key} = {str(value)[:80]}: beyond what GGUF keeps it in: {error}") from error


def write(
  path: Path,
  fields: Sequence[bytes],
  tensors: Sequence[Tensor],
  progress: Callable[[int, int], None] | None = None,
) -> None:
  """Write a file, a tensor in memory at a time, and have the system store it.

  Args:
    fields: Keys with values, as `field` or `GgufFile.field_bytes` gives them; no key twice, and not
      general.alignment.
    progress: Called with the number of tensors written so far and of all.
  Raises: ValueError: a tensor's data are not of the size that was said.
  """
  with stored(path) as file:
    file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields)))
    for raw in fields:
      file.write(raw)
    offset = 0
    for tensor in tensors:
      file.write(_text(tensor.name) + struct.pack("<I", len(tensor.shape)))
      file.write(struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape)))
      file.write(struct.pack("<IQ", tensor.type_id, offset))
      offset += _padded(tensor.nbytes)
    file.write(bytes(_padded(file.tell()) - file.tell()))
    for done, tensor in enumerate(tensors, 1):
      data = tensor.data()
      if data.nbytes != tensor.nbytes:
        raise ValueError(f"{tensor.name}: {data.nbytes} bytes, {tensor.nbytes} were announced")
      put(file, data)
      del data  # before the next is made
      file.write(bytes(_padded(tensor.nbytes) - tensor.nbytes))
      if progress:
        progress(done, len(tensors))


def _padded(nbytes: int) -> int:
  return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _text(value: str) -> bytes:
  raw = value.encode()
  return struct.pack("<Q", len(raw)) + raw


def _scalar(value: object) -> tuple[int, bytes]:
  match value:
    case bool():
      return _BOOL, struct.pack("<B", value)
    case int():
      return (
        (_UINT32, struct.pack("<I", value)) if value >= 0 else (_INT32, struct.pack("<i", value))
      )
    case float():
      return _FLOAT32, struct.pack("<f", value)
    case str():
      return _STRING, _text(value)
  raise ValueError(f"{value!r}: GGUF keeps bool, int, float, str and lists of them")


def _array(values: Sequence[object]) -> bytes:
  kinds = {type(value) for value in values}
  if len(kinds) != 1:
    raise ValueError(
      f"a list of {len(values)} values of {len(kinds)} kinds: GGUF keeps lists of one"
    )
  head = struct.pack("<Q", len(values))
  match values[0]:
    case bool():
      return struct.pack("<I", _BOOL) + head + bytes(values)  # type: ignore[arg-type]
    case int():
      return struct.pack("<I", _INT32) + head + struct.pack(f"<{len(values)}i", *values)
    case float():
      return struct.pack("<I", _FLOAT32) + head + struct.pack(f"<{len(values)}f", *values)
    case str():
      return struct.pack("<I", _STRING) + head + b"".join(_text(value) for value in values)  # type: ignore[arg-type]
  raise ValueError(f"a list of {kinds.pop().__name__}: GGUF keeps bool, int, float and str")
