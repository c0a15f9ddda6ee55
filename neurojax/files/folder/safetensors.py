"""safetensors files: a reader that believes nothing the header says.

Format: https://github.com/huggingface/safetensors: the length of the header as 8 bytes, little-
endian; the header, a JSON object of tensors by name; their bytes without gaps or overlaps. Every
count and offset is checked against the size of the file before it is used.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ml_dtypes
import numpy as np
from jaxtyping import UInt8

from neurojax.files.mapped import MappedFile
from neurojax.files.tensor_info import TensorInfo

MAX_JSON_BYTES = 8 << 20
"""The largest header, index or config.json that is read. Python needs up to 25 times as much memory for
a hostile one; the format's own limit is 100 MB, and 60,000 tensors fit into this one."""

_AGAIN = "download it again"
_MAX_DIMS = 8
_MAX_ELEMENTS = 2**62

BITS: Mapping[str, int] = {
  "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
  "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
  "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Every element type of the format, by name."""

DTYPES: Mapping[str, np.dtype] = {
  "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16),
  "F64": np.dtype("<f8"), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2), "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
  "U8": np.dtype("u1"), "I8": np.dtype("i1"), "I32": np.dtype("<i4"), "I64": np.dtype("<i8"),
}  # fmt: skip
"""The element types that can be read, and NumPy's dtypes for them."""


class SafetensorsFile:
  """An open safetensors file. The header is checked on opening; tensors are mapped one by one.

  Attributes:
    path: The file.
    size_bytes: Bytes of the file.
    metadata: The header's own words about the file.
    tensors: The tensors by name, in the order of their bytes. Offsets are from the start of the file.
  Raises: ValueError: truncated, damaged or contradictory.
  """

  def __init__(self, path: str | Path) -> None:
    self.path = Path(path)
    with contextlib.ExitStack() as undo:
      self._mapped = MappedFile(path)
      undo.callback(self._mapped.close)
      self.size_bytes = self._mapped.size_bytes
      table, start = self._header()
      said = table.pop("__metadata__", {})
      if not isinstance(said, dict) or not all(isinstance(v, str) for v in said.values()):
        raise ValueError(f"{self.path}: the header's __metadata__ must map strings to strings")
      self.metadata: Mapping[str, str] = said
      self.tensors: Mapping[str, TensorInfo] = self._tensors(table, start)
      undo.pop_all()

  def view(self, name: str) -> UInt8[np.ndarray, "bytes"]:
    """The bytes of a tensor: a read-only view of the file. Raises: KeyError, or ValueError: closed."""
    info = self.tensors[name]
    return self._mapped.view(info.offset, info.nbytes)

  @contextlib.contextmanager
  def array(self, name: str) -> Iterator[np.ndarray]:
    """A tensor in its own dtype, read-only; its pages leave the process afterwards.

    Raises:
      KeyError: no such tensor.
      NotImplementedError: a dtype that is not in `DTYPES`.
    """
    info = self.tensors[name]
    if info.type not in DTYPES:
      raise NotImplementedError(
        f"{self.path}: tensor {name!r} has the type {info.type}; {', '.join(DTYPES)} are read"
      )
    with self._mapped.range(info.offset, info.nbytes) as raw:
      yield raw.view(DTYPES[info.type]).reshape(info.shape)

  def check_unchanged(self) -> None:
    """Raises ValueError if the file was replaced, changed or removed since it was opened."""
    self._mapped.check_unchanged()

  def sha256(self) -> str:
    """Hex digest of the whole file (cached per user)."""
    return self._mapped.sha256()

  def close(self) -> None:
    """Views that were given out stay valid; the map goes with the last of them."""
    self._mapped.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self.close()

  def _header(self) -> tuple[dict[str, Any], int]:
    """The JSON object, and where the tensors begin."""
    if self.size_bytes < 8:
      raise ValueError(f"{self.path}: {self.size_bytes} bytes: this is no safetensors file")
    nbytes = int.from_bytes(self._mapped.view(0, 8).tobytes(), "little")
    if nbytes > self.size_bytes - 8:
      raise ValueError(
        f"{self.path}: a header of {nbytes} bytes does not fit into the {self.size_bytes - 8} that"
        f" follow: the file is truncated or no safetensors file: {_AGAIN}"
      )
    if nbytes > MAX_JSON_BYTES:
      raise ValueError(
        f"{self.path}: a header of {nbytes} bytes: at most {MAX_JSON_BYTES} are read: split the file"
      )
    table = parse_json(self._mapped.view(8, nbytes).tobytes(), f"{self.path}: the header")
    return table, 8 + nbytes

  def _tensors(self, table: Mapping[str, Any], start: int) -> dict[str, TensorInfo]:
    room = self.size_bytes - start
    placed = []
    for name, entry in table.items():
      kind, shape, first, last = self._entry(name, entry)
      bits = math.prod(shape) * BITS[kind]
      if bits % 8 or bits // 8 != last - first:
        raise ValueError(
          f"{self.path}: tensor {name!r} is {kind} {shape}, {bits} bits, and its place in the file"
          f" has {last - first} bytes: the file is damaged: {_AGAIN}"
        )
      if last > room:
        raise ValueError(
          f"{self.path}: tensor {name!r} reaches to byte {start + last} of {self.size_bytes}: the"
          f" file is truncated: {_AGAIN}"
        )
      placed.append(TensorInfo(name, kind, shape, start + first, last - first))
    placed.sort(key=lambda info: (info.offset, info.nbytes))
    end, before = start, "the header"
    for info in placed:
      if info.offset != end:
        what = "overlaps" if info.offset < end else "leaves a gap behind"
        raise ValueError(f"{self.path}: tensor {info.name!r} {what} {before}: {_AGAIN}")
      end, before = end + info.nbytes, repr(info.name)
    if end != self.size_bytes:
      raise ValueError(
        f"{self.path}: {self.size_bytes - end} bytes behind the last tensor belong to none: the file"
        f" is damaged: {_AGAIN}"
      )
    return {info.name: info for info in placed}

  def _entry(self, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    def fail(what: str) -> ValueError:
      return ValueError(f"{self.path}: tensor {name[:100]!r}: {what}")

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
      raise fail("its entry must have dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in BITS:
      raise fail(f"dtype {str(kind)[:40]!r}: choose one of {', '.join(BITS)}")
    if not _is_counts(shape) or len(shape) > _MAX_DIMS or math.prod(shape) > _MAX_ELEMENTS:
      raise fail(f"shape {str(shape)[:80]}: at most {_MAX_DIMS} counts")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
      raise fail(f"data_offsets {str(offsets)[:80]}: two bytes, the first one first")
    return kind, tuple(shape), offsets[0], offsets[1]


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
  """A JSON object, strictly: no key twice, no NaN, no endless integer.

  Raises: ValueError: it is none; `where` names it.
  """

  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
      seen: set[str] = set()
      twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
      raise ValueError(f"{twice[:100]!r} appears twice")
    return table

  def constant(word: str) -> Any:
    raise ValueError(f"{word} is no number of JSON")

  def integer(digits: str) -> int:
    # No count or size is longer, and what is could become no float.
    if len(digits) > 20:
      raise ValueError(f"{digits[:20]}... is an integer of {len(digits)} digits")
    return int(digits)

  try:
    table = json.loads(
      str(raw, "utf-8"),
      object_pairs_hook=unique,
      parse_constant=constant,
      parse_int=integer,
    )
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{where} is not valid JSON: {error}: {_AGAIN}") from error
  if not isinstance(table, dict):
    raise ValueError(f"{where} is no JSON object: {_AGAIN}")
  return table


def read_json(path: Path) -> dict[str, Any]:
  """The JSON object in a file, as `parse_json`. Raises: ValueError: as there, or too large."""
  with path.open("rb") as file:
    raw = file.read(MAX_JSON_BYTES + 1)
  if len(raw) > MAX_JSON_BYTES:
    raise ValueError(f"{path}: more than {MAX_JSON_BYTES} bytes of JSON are not read")
  return parse_json(raw, str(path))


def _is_counts(value: Any) -> bool:
  return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
