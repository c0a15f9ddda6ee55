"""The header of a GGUF file: metadata and the table of tensors, believed only as far as it is checked.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every count, length and offset
is checked against the size of the file before it is used, so a damaged file costs an error and
never memory.
"""

import dataclasses
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from neurojax.files.tensor_info import TensorInfo
from neurojax.weights import codecs

_AGAIN = "download it again"
_MAX_NAME_BYTES = 65_535
_MAX_DIMS = 4
_MAX_DEPTH = 4
_MAX_ELEMENTS = 2**62
_SCALARS = {
  0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8",
  12: "<f8",
}  # fmt: skip
_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9
_SMALLEST_BYTES = {_BOOL: 1, _STRING: 8, _ARRAY: 12} | {
  kind: int(dtype[2]) for kind, dtype in _SCALARS.items()
}
# A type of a fork that neither the gguf package nor `codecs` has a name for.
_LATER_TYPES = {143: "PTQ1_0"}
# Two layouts share the number of Q2_0.
_Q2_0 = [codec for codec in codecs.CODECS.values() if codec.name.startswith("Q2_0")]
_TERNARY = {codec.type_id: codec for codec in codecs.CODECS.values() if codec not in _Q2_0}

_u32 = struct.Struct("<I").unpack_from
_u64 = struct.Struct("<Q").unpack_from


class _Metadata(Mapping[str, object]):
  """Values by key. Arrays of strings are decoded when first asked for: a stage that holds only
  layers never needs the vocabulary."""

  def __init__(self, values: dict[str, object]) -> None:
    self._values = values

  def __getitem__(self, key: str) -> object:
    value = self._values[key]
    if isinstance(value, _Strings):
      value = self._values[key] = value.decode()
    return value

  def __iter__(self) -> Iterator[str]:
    return iter(self._values)

  def __len__(self) -> int:
    return len(self._values)

  def __contains__(self, key: object) -> bool:
    return key in self._values


class _Strings:
  """An array of strings whose bounds are checked and whose text is not decoded yet."""

  def __init__(self, raw: bytes, count: int, fail: Callable[[int, str], ValueError]) -> None:
    self._raw, self._count, self._fail = raw, count, fail

  def decode(self) -> list[str]:
    raw, unpack, end = self._raw, _u64, 0
    texts = []
    try:
      for _ in range(self._count):
        start = end + 8
        end = start + unpack(raw, end)[0]
        texts.append(str(raw[start:end], "utf-8"))
    except UnicodeDecodeError as error:
      raise self._fail(start, f"string {len(texts)} of the array is not UTF-8: {error}") from error
    return texts


class Header:
  """The parsed header.

  Attributes:
    version: The version of the format.
    metadata: Values by key.
    fields: For each key, the bytes of key and value in the file: the first, and the one behind the last.
    tensors: The tensors by name, in the order of the file.
  """

  def __init__(self, path: Path, data: memoryview) -> None:
    self._path, self._data, self._size = path, data, len(data)
    self._at = 0
    self._expect(24, "the header")
    if (magic := bytes(data[:4])) != b"GGUF":
      raise self._fail(0, f"magic {magic!r}: this is no GGUF file")
    self._at = 4
    self.version = self._integer("the version")
    if self.version & 0xFFFF == 0 and self.version:
      raise NotImplementedError(
        f"{path}: this is big-endian GGUF: convert it with gguf-py's gguf_convert_endian.py"
      )
    if self.version not in (2, 3):
      raise NotImplementedError(
        f"{path}: GGUF version {self.version}: versions 2 and 3 are read; convert it again"
      )
    num_tensors = self._count("tensors", smallest_bytes=24)
    num_keys = self._count("metadata keys", smallest_bytes=13)

    self.fields: dict[str, tuple[int, int]] = {}
    values: dict[str, object] = {}
    kinds: dict[str, int] = {}
    for _ in range(num_keys):
      at = self._at
      key = self._name("a metadata key")
      if key in values:
        raise self._fail(at, f"metadata key {key!r} appears twice")
      kinds[key] = self._integer(f"the type of {key!r}")
      values[key] = self._value(kinds[key], key, 0)
      self.fields[key] = (at, self._at)
    self.metadata = _Metadata(values)
    alignment = values.get("general.alignment", 32)
    if kinds.get("general.alignment", _UINT32) != _UINT32:
      raise self._fail(self._at, "general.alignment must be of type uint32")
    assert isinstance(alignment, int)
    if alignment < 1 or alignment & (alignment - 1):
      raise self._fail(self._at, f"general.alignment = {alignment}: it must be a power of two")
    self.tensors = self._tensors(num_tensors, alignment)
    # Errors in strings that are decoded later need no data, and the file can be closed.
    del self._data

  def _fail(self, at: int, what: str) -> ValueError:
    return ValueError(f"{self._path}: byte {at}: {what}")

  def _expect(self, nbytes: int, what: str) -> None:
    missing = self._at + nbytes - self._size
    if missing > 0:
      raise self._fail(
        self._at,
        f"the file ends within {what}: at least {missing} bytes are missing of {self._size}: "
        f"{_AGAIN}",
      )

  def _integer(self, what: str) -> int:
    self._expect(4, what)
    self._at += 4
    return _u32(self._data, self._at - 4)[0]

  def _long(self, what: str) -> int:
    self._expect(8, what)
    self._at += 8
    return _u64(self._data, self._at - 8)[0]

  def _count(self, what: str, smallest_bytes: int) -> int:
    at = self._at
    count = self._long(f"the number of {what}")
    if count * smallest_bytes > self._size - self._at:
      raise self._fail(
        at,
        f"{count} {what} do not fit into the {self._size - self._at} bytes that follow: the file "
        f"is damaged or truncated: {_AGAIN}",
      )
    return count

  def _name(self, what: str) -> str:
    at = self._at
    nbytes = self._long(f"the length of {what}")
    if nbytes > _MAX_NAME_BYTES:
      raise self._fail(at, f"{what} of {nbytes} bytes; at most {_MAX_NAME_BYTES}: {_AGAIN}")
    return self._text(nbytes, what)

  def _text(self, nbytes: int, what: str) -> str:
    self._expect(nbytes, what)
    at = self._at
    self._at += nbytes
    try:
      return str(self._data[at : self._at], "utf-8")
    except UnicodeDecodeError as error:
      raise self._fail(at, f"{what} is not UTF-8: {error}") from error

  def _value(self, kind: int, key: str, depth: int) -> object:
    if kind in _SCALARS:
      return self._numbers(kind, 1, key)[0]
    if kind == _BOOL:
      return self._booleans(1, key)[0]
    if kind == _STRING:
      return self._text(self._long(f"the length of {key!r}"), f"the value of {key!r}")
    if kind == _ARRAY:
      return self._array(key, depth)
    raise self._fail(self._at, f"{key!r} has the value type {kind}; GGUF has 0 to 12: {_AGAIN}")

  def _array(self, key: str, depth: int) -> object:
    at = self._at
    if depth == _MAX_DEPTH:
      raise self._fail(at, f"{key!r} nests arrays deeper than {_MAX_DEPTH}")
    kind = self._integer(f"the element type of {key!r}")
    if kind not in _SMALLEST_BYTES:
      raise self._fail(at, f"{key!r} has the element type {kind}; GGUF has 0 to 12: {_AGAIN}")
    count = self._count(f"elements of {key!r}", _SMALLEST_BYTES[kind])
    if kind in _SCALARS:
      return self._numbers(kind, count, key)
    if kind == _BOOL:
      return self._booleans(count, key)
    if kind == _ARRAY:
      return [self._array(key, depth + 1) for _ in range(count)]
    start = self._at
    self._skip_strings(count, key)
    raw = bytes(self._data[start : self._at])
    strings = _Strings(raw, count, lambda at, what: self._fail(start + at, f"{key!r}: {what}"))
    return strings.decode() if depth else strings

  def _skip_strings(self, count: int, key: str) -> None:
    # The one hot loop: a vocabulary and its merges are half a million strings and more.
    data, unpack, at, last = self._data, _u64, self._at, self._size - 8
    for _ in range(count):
      if at > last:
        break
      at += 8 + unpack(data, at)[0]
    else:
      if at <= self._size:
        self._at = at
        return
    missing = max(at, last + 1) - self._size
    raise self._fail(
      self._at,
      f"the file ends within the strings of {key!r} (at least {max(missing, 1)} bytes are missing) "
      f"or a length among them is damaged: {_AGAIN}",
    )

  def _numbers(self, kind: int, count: int, key: str) -> list[object]:
    dtype = np.dtype(_SCALARS[kind])
    self._expect(count * dtype.itemsize, f"the value of {key!r}")
    values = np.frombuffer(self._data, dtype, count, self._at).tolist() if count else []
    self._at += count * dtype.itemsize
    return values

  def _booleans(self, count: int, key: str) -> list[bool]:
    self._expect(count, f"the value of {key!r}")
    raw = bytes(self._data[self._at : self._at + count])
    if raw.translate(None, b"\0\1"):
      raise self._fail(self._at, f"{key!r} holds a boolean that is neither 0 nor 1: {_AGAIN}")
    self._at += count
    return [bool(byte) for byte in raw]

  def _tensors(self, count: int, alignment: int) -> dict[str, TensorInfo]:
    listed: dict[str, tuple[str, tuple[int, ...], int, int | None]] = {}
    for _ in range(count):
      at = self._at
      name = self._name("a tensor name")
      if name in listed:
        raise self._fail(at, f"tensor {name!r} appears twice")
      num_dims = self._integer(f"the dimensions of {name!r}")
      if num_dims > _MAX_DIMS:
        raise self._fail(at, f"tensor {name!r} has {num_dims} dimensions; at most {_MAX_DIMS}")
      shape = tuple(self._long(f"the shape of {name!r}") for _ in range(num_dims))[::-1]
      if 0 in shape or math.prod(shape) > _MAX_ELEMENTS:
        raise self._fail(at, f"tensor {name!r} has the impossible shape {shape}: {_AGAIN}")
      kind_id = self._integer(f"the type of {name!r}")
      offset = self._long(f"the offset of {name!r}")
      if offset % alignment:
        raise self._fail(
          at, f"tensor {name!r} has the offset {offset}: no multiple of the alignment {alignment}"
        )
      kind, nbytes = _storage(kind_id, shape)
      if nbytes == -1:
        raise self._fail(
          at, f"tensor {name!r} of shape {shape}: its rows are no whole {kind} blocks"
        )
      listed[name] = (kind, shape, offset, nbytes)

    start = -(-self._at // alignment) * alignment
    return self._grouped(self._placed(listed, start), alignment)

  def _placed(
    self, listed: dict[str, tuple[str, tuple[int, ...], int, int | None]], start: int
  ) -> dict[str, TensorInfo]:
    """Give every tensor its place in the file. Raises where one is outside the file or two overlap."""
    end = max((start + offset + (n or 1) for _, _, offset, n in listed.values()), default=0)
    if end > self._size:
      raise self._fail(
        self._size,
        f"the file is truncated: its tensors reach to byte {end}, {end - self._size} bytes are "
        f"missing: {_AGAIN}",
      )
    if not listed:
      return {}
    order = sorted(listed, key=lambda name: listed[name][2])
    following = [start + listed[name][2] for name in order[1:]] + [self._size]
    placed = {}
    for name, limit in zip(order, following, strict=True):
      kind, shape, offset, nbytes = listed[name]
      span = limit - start - offset
      if (nbytes or 1) > span:
        raise self._fail(start + offset, f"tensor {name!r} overlaps the tensor behind it: {_AGAIN}")
      placed[name] = TensorInfo(
        name, kind, shape, start + offset, span if nbytes is None else nbytes
      )
    return {name: placed[name] for name in listed}

  def _grouped(self, tensors: dict[str, TensorInfo], alignment: int) -> dict[str, TensorInfo]:
    """Give each Q2_0 tensor its scale group. Two groups share the type's number; the right one makes the
    tensors fill the room up to what follows, with less padding than the alignment."""
    mine = {name: info for name, info in tensors.items() if info.type == "Q2_0"}
    sizes: dict[str, dict[codecs.Codec, int]] = {}
    for name, info in mine.items():
      rows, width = math.prod(info.shape[:-1]), info.shape[-1]
      whole = [codec for codec in _Q2_0 if width % codec.block == 0]
      sizes[name] = {codec: codec.nbytes(rows, width) for codec in whole}
    fitting = {
      name: [codec for codec, n in sizes[name].items() if n <= info.nbytes < n + alignment]
      for name, info in mine.items()
    }
    for name, fits in fitting.items():
      if not fits:
        takes = " or ".join(f"{n} as {codec.name}" for codec, n in sizes[name].items())
        raise self._fail(
          mine[name].offset,
          f"tensor {name!r} has room for {mine[name].nbytes} bytes and takes {takes}: {_AGAIN}",
        )
    common = [codec for codec in _Q2_0 if all(codec in fits for fits in fitting.values())]
    if mine and len(common) != 1:
      found = ", ".join(f"{n!r} is {f[0].name}" for n, f in fitting.items() if len(f) == 1)
      why = f"do not agree ({found[:200]})" if found else "are too small to tell their groups apart"
      raise self._fail(
        min(info.offset for info in mine.values()), f"the Q2_0 tensors {why}: convert it again"
      )
    return tensors | {
      name: dataclasses.replace(info, type=common[0].name, nbytes=sizes[name][common[0]])
      for name, info in mine.items()
    }


def _storage(kind_id: int, shape: tuple[int, ...]) -> tuple[str, int | None]:
  """Type name and bytes of a tensor: None for an unknown type, -1 for rows of broken blocks."""
  width = shape[-1] if shape else 1
  if kind_id == _Q2_0[0].type_id:
    return "Q2_0", -1 if width % _Q2_0[0].block else None
  if kind_id in _TERNARY:
    codec = _TERNARY[kind_id]
    rows = math.prod(shape[:-1])
    return codec.name, -1 if width % codec.block else codec.nbytes(rows, width)
  try:
    kind = GGMLQuantizationType(kind_id)
    block, block_bytes = GGML_QUANT_SIZES[kind]
  except (ValueError, KeyError):
    return _LATER_TYPES.get(kind_id, f"unknown({kind_id})"), None
  if width % block:
    return kind.name, -1
  return kind.name, math.prod(shape) // block * block_bytes
