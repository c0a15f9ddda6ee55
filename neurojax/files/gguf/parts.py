"""Joins the parts of a GGUF file that llama-gguf-split cut: their places, names and order.

Source: llama.cpp, src/llama-model-loader.cpp and src/llama.cpp, `llama_split_path`.
"""

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from neurojax.files.gguf.header import Header
from neurojax.files.mapped import MappedFile
from neurojax.files.tensor_info import TensorInfo

_NAME = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")
_MOST = 1000


class Parts:
  """The open parts of a GGUF file. Most files have one part.

  Attributes:
    header: The header of the first part, which has the metadata.
    tensors: The tensors of all parts. Offsets are within the part that holds the tensor.
    count: The number of parts.
  Raises:
    ValueError: a part is missing, damaged or of another file; or this is not the first.
    NotImplementedError: a version or byte order that is not read.
  """

  def __init__(self, path: Path) -> None:
    self._files: list[MappedFile] = []
    with contextlib.ExitStack() as undo:
      undo.callback(self.close)
      self.header = self._open(path)
      self.tensors: Mapping[str, TensorInfo] = self.header.tensors
      self._part_of = dict.fromkeys(self.tensors, 0)
      self._open_others(path)
      undo.pop_all()

  @property
  def count(self) -> int:
    return len(self._files)

  @property
  def size_bytes(self) -> int:
    return sum(file.size_bytes for file in self._files)

  def first(self, offset: int, nbytes: int) -> UInt8[np.ndarray, "bytes"]:
    """Bytes of the first part, like `MappedFile.view`."""
    return self._files[0].view(offset, nbytes)

  def range(self, info: TensorInfo) -> contextlib.AbstractContextManager[np.ndarray]:
    """The bytes of a tensor, like `MappedFile.range`."""
    return self._files[self._part_of[info.name]].range(info.offset, info.nbytes)

  def view(self, info: TensorInfo) -> UInt8[np.ndarray, "bytes"]:
    """The bytes of a tensor, like `MappedFile.view`."""
    return self._files[self._part_of[info.name]].view(info.offset, info.nbytes)

  def check_unchanged(self) -> None:
    for file in self._files:
      file.check_unchanged()

  def sha256(self) -> str:
    """The hex digest of the file. For several parts it is the digest of their digests, in order."""
    if self.count == 1:
      return self._files[0].sha256()
    return hashlib.sha256("\n".join(file.sha256() for file in self._files).encode()).hexdigest()

  def close(self) -> None:
    for file in self._files:
      file.close()

  def _open(self, path: Path) -> Header:
    file = MappedFile(path)
    self._files.append(file)
    with memoryview(file.view(0, file.size_bytes)) as data:
      return Header(path, data)

  def _open_others(self, path: Path) -> None:
    said = self.header.metadata
    count, number = said.get("split.count", 0), said.get("split.no", 0)
    name = _NAME.fullmatch(path.name)
    # A file under another name stays a part, which is refused with the remedy.
    if type(count) is not int or not 1 < count <= _MOST or name is None or int(name[3]) != count:
      return
    if number != 0 or int(name[2]) != 1:
      raise ValueError(
        f"{path}: this is part {name[2]} of {count}: name the first, {name[1]}-00001-of-{name[3]}.gguf"
      )
    tensors = dict(self.tensors)
    for other in range(1, count):
      part = path.with_name(f"{name[1]}-{other + 1:05}-of-{name[3]}.gguf")
      if not part.is_file():
        raise ValueError(f"{path}: {part.name} is missing, one of {count} parts: download it too")
      header = self._open(part)
      if (header.metadata.get("split.no"), header.metadata.get("split.count")) != (other, count):
        raise ValueError(f"{part}: it says of itself to be no part {other + 1} of {count}")
      for tensor, info in header.tensors.items():
        if tensor in tensors:
          raise ValueError(f"{part}: tensor {tensor!r} is in another part too")
        tensors[tensor], self._part_of[tensor] = info, other
    wanted = said.get("split.tensors.count", len(tensors))
    if wanted != len(tensors):
      raise ValueError(
        f"{path}: its {count} parts hold {len(tensors)} tensors, and it says {wanted}"
      )
    self.tensors = tensors


def whole_metadata(parts: Parts) -> Mapping[str, object]:
  """The metadata of the first part, without the keys that say that it is a part."""
  if parts.count == 1:
    return parts.header.metadata
  return _Without(parts.header.metadata, "split.")


class _Without(Mapping[str, object]):
  """Metadata without the keys of a namespace; values are decoded when asked for, as before."""

  def __init__(self, whole: Mapping[str, object], prefix: str) -> None:
    self._whole, self._prefix = whole, prefix

  def __getitem__(self, key: str) -> object:
    if key.startswith(self._prefix):
      raise KeyError(key)
    return self._whole[key]

  def __iter__(self) -> Iterator[str]:
    return (key for key in self._whole if not key.startswith(self._prefix))

  def __len__(self) -> int:
    return sum(1 for _ in self)

  def __contains__(self, key: object) -> bool:
    return isinstance(key, str) and not key.startswith(self._prefix) and key in self._whole
