"""The safetensors of a folder: one file, or several that an index lists, all of them checked."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from neurojax.files import digest
from neurojax.files.folder.safetensors import SafetensorsFile, read_json
from neurojax.files.tensor_info import TensorInfo

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_MAX_SHARDS = 1000


class Shards:
  """The open files of a folder, with the tensors of all of them.

  Attributes:
    tensors: Tensors by the files' own names. Offsets are within the file that holds the tensor.
  Raises:
    ValueError: a file is missing, truncated, damaged or contradicts the index or another.
    NotImplementedError: the weights are in another format.
  """

  def __init__(self, folder: Path) -> None:
    self._folder = folder
    self._index: os.stat_result | None = None
    self._files: dict[str, SafetensorsFile] = {}
    with contextlib.ExitStack() as undo:
      undo.callback(self.close)
      self._open()
      undo.pop_all()
    self._file_of = {name: file for file in self._files.values() for name in file.tensors}
    self.tensors: Mapping[str, TensorInfo] = {
      name: file.tensors[name] for name, file in self._file_of.items()
    }

  @property
  def metadata(self) -> Mapping[str, str]:
    """The words about the model in all headers; the last file wins where several have the same key."""
    return {key: value for file in self._files.values() for key, value in file.metadata.items()}

  @property
  def size_bytes(self) -> int:
    return sum(file.size_bytes for file in self._files.values())

  def array(self, name: str) -> contextlib.AbstractContextManager[np.ndarray]:
    """A tensor's values, like `SafetensorsFile.array`."""
    return self._file_of[name].array(name)

  def view(self, name: str) -> UInt8[np.ndarray, "bytes"]:
    """A tensor's bytes, like `SafetensorsFile.view`."""
    return self._file_of[name].view(name)

  def check_unchanged(self) -> None:
    """Raises ValueError if a file was replaced, changed or removed since it was opened."""
    if self._index is not None:
      digest.check_unchanged(self._folder / INDEX, self._index)
    for file in self._files.values():
      file.check_unchanged()

  def digests(self) -> Iterator[tuple[str, str]]:
    """Name and SHA-256 of each file, the index first."""
    if self._index is not None:
      yield INDEX, digest.sha256_of(self._folder / INDEX, opened_as=self._index)
    for name, file in sorted(self._files.items()):
      yield name, file.sha256()

  def close(self) -> None:
    """Views that were given out stay valid."""
    for file in self._files.values():
      file.close()

  def _open(self) -> None:
    # transformers takes the whole file where there are both.
    if (self._folder / WEIGHTS).is_file():
      self._files[WEIGHTS] = SafetensorsFile(self._folder / WEIGHTS)
      return
    if not (self._folder / INDEX).is_file():
      raise _no_weights(self._folder)
    self._index = (self._folder / INDEX).stat()
    placed = read_json(self._folder / INDEX).get("weight_map")
    if not isinstance(placed, dict) or not placed:
      raise ValueError(f"{self._folder / INDEX}: it has no weight_map: download it again")
    for tensor, shard in placed.items():
      if not isinstance(shard, str) or not _is_plain_name(shard):
        raise ValueError(
          f"{self._folder / INDEX}: tensor {tensor[:100]!r} is in {str(shard)[:100]!r}: a file of this"
          " folder is named by its name alone"
        )
    files = sorted(set(placed.values()))
    if len(files) > _MAX_SHARDS:
      raise ValueError(
        f"{self._folder / INDEX}: {len(files)} files: at most {_MAX_SHARDS} are read"
      )
    for file in files:
      if not (self._folder / file).is_file():
        raise ValueError(
          f"{self._folder}: {file} is missing, one of {len(files)} files that the index lists: download"
          " it again"
        )
      self._files[file] = SafetensorsFile(self._folder / file)
    seen: dict[str, str] = {}
    for file, shard in self._files.items():
      for tensor in shard.tensors:
        if tensor in seen:
          raise ValueError(f"{self._folder}: tensor {tensor!r} is in {seen[tensor]} and in {file}")
        seen[tensor] = file
    for tensor, file in placed.items():
      if seen.get(tensor) != file:
        raise ValueError(
          f"{self._folder}: the index has tensor {tensor[:100]!r} in {file}, which does not hold it:"
          " download it again"
        )


def _no_weights(folder: Path) -> Exception:
  for pattern, what in (("*.bin", "PyTorch's"), ("*.pth", "PyTorch's"), ("*.gguf", "GGUF")):
    if other := sorted(folder.glob(pattern)):
      remedy = "name the file" if what == "GGUF" else "convert them to safetensors"
      return NotImplementedError(
        f"{folder}: no {WEIGHTS}, and weights in {what} format ({other[0].name}): {remedy}"
      )
  return ValueError(f"{folder}: neither {WEIGHTS} nor {INDEX}: download them")


def _is_plain_name(name: str) -> bool:
  return (
    name.endswith(".safetensors")
    and not name.startswith(".")
    and os.path.basename(name) == name
    and not set(name) & {"/", "\\", "\0", ":"}
  )
