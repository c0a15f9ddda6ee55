"""A model file of any format, as its reader presents it, and the one way to open one."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np

from neurojax.config import ModelConfig
from neurojax.tokenizer.spec import TokenizerSpec

if TYPE_CHECKING:
  from neurojax.files.names import Interpretation
  from neurojax.quant.rows import GroupedRows
  from neurojax.scaling.count import Form


@dataclasses.dataclass(frozen=True)
class TensorInfo:
  """One tensor as the file lists it.

  Attributes:
    name: The file's own name.
    type: The element type as ggml spells it ("Q4_1"), with the group where two share a number
      ("Q2_0 (group 128)"); "unknown(57)" for an id nobody documents.
    shape: Row-major: the last axis is contiguous.
    offset: Of the first byte, from the start of the file.
    nbytes: Of the data. For a type whose block size the reader does not know: everything up to
      the next tensor or the end of the file, padding included.
  """

  name: str
  type: str
  shape: tuple[int, ...]
  offset: int
  nbytes: int


class ModelFile(Protocol):
  """A model file. Listing works on every intact file; `config` and `read` refuse by name what the
  model does not compute yet.

  Attributes:
    path: The file, or the folder.
    format: "gguf", "llama2c" or "huggingface".
    version: Of the format, as the file states it; of transformers, for a folder.
    file_bytes: Of the file, or of a folder's weights.
    metadata: What the file says about itself, under its own keys, as plain Python values.
    tensors: Its tensors under its own names, in file order.
    interpretation: What the reader makes of it: architecture, config, and reasons to refuse.
  """

  path: Path
  format: str
  version: int | str
  file_bytes: int
  metadata: Mapping[str, object]
  tensors: Mapping[str, TensorInfo]
  interpretation: "Interpretation"

  @property
  def config(self) -> ModelConfig:
    """The architecture.

    Raises:
      NotImplementedError: the file asks for something the model does not compute; all of it named.
      ValueError: the file contradicts itself or lacks something.
    """
    ...

  @property
  def tokenizer(self) -> TokenizerSpec | None:
    """The vocabulary, or None where the file has none. Raises like `config`."""
    ...

  def info(self, name: str, layer: int | None = None) -> TensorInfo:
    """The stored tensor behind a canonical name. Raises like `read`."""
    ...

  def read(self, name: str, layer: int | None = None) -> np.ndarray:
    """Float32 values of a canonical name ("q_DNH"), axes in the order of its letters.

    The array owns its memory; its strides are those of the file's axis order.

    Args:
      name: One of `names.WHOLE_MODEL` (layer must be None) or `names.PER_LAYER` (layer required).
    Raises:
      ValueError: no such name, a layer out of range, `head_DV` of a tied model.
      NotImplementedError: the stored type has no decoder here, or as `config`.
    """
    ...

  def read_ternary(
    self, name: str, layer: int | None = None
  ) -> tuple[np.ndarray, np.ndarray, int | None]:
    """Codes, scales and group size of a ternary matrix, as `ternary.array.TernaryArray` has them.

    A row is an output channel, or an entry of the vocabulary; those of experts stand one after the
    other. Scales keep the file's bits; where the group size is None there is one, or one for each
    expert, in rows of one.

    Raises: ValueError: the stored type is not ternary, or the data are damaged; and like `read`.
    """
    ...

  def narrow_form(self, name: str, layer: int | None = None) -> "Form | None":
    """What keeps a canonical name's numbers in the width of the file: `read_ternary` reads those of a
    form `Scales`, `read_grouped` those of `Grouped`, `read_plain` those of `Plain`. None: nothing that
    is narrower than `read`. Raises like `read`."""
    ...

  def read_grouped(self, name: str, layer: int | None = None) -> "GroupedRows":
    """The numbers and scales of a quantized matrix: a row is an output channel, or an entry of the
    vocabulary; those of experts stand one after the other. Raises: ValueError: no such form, a scale that is not finite; and like `read`."""
    ...

  def read_plain(self, name: str, layer: int | None = None) -> np.ndarray:
    """As `read`, in the file's own dtype. Raises: ValueError: no plain numbers; and like `read`."""
    ...

  def stored_bytes(self, name: str, layer: int | None = None) -> np.ndarray:
    """The undecoded bytes of a canonical name: uint8, one axis, a read-only view of the file."""
    ...

  def problems(self) -> list[str]:
    """Every reason why this file cannot be run from end to end; empty when it can."""
    ...

  def check(self) -> None:
    """Raises NotImplementedError or ValueError unless every tensor could be read."""
    ...

  def check_unchanged(self) -> None:
    """Raises ValueError if the file was replaced, changed or removed since it was opened."""
    ...

  def sha256(self) -> str:
    """Hex digest of the whole file (cached per user)."""
    ...

  def close(self) -> None: ...

  def __enter__(self) -> Self: ...

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None: ...


# What people hand over by mistake: (first bytes, what it is, what to do).
_FOREIGN: tuple[tuple[bytes, str, str], ...] = (
  (b"version https://git-lfs", "a Git LFS pointer, not the file", "run `git lfs pull`"),
  (b"<!DOCTYPE", "a web page, not a model", "download the file itself"),
  (b"<!doctype", "a web page, not a model", "download the file itself"),
  (b"<html", "a web page, not a model", "download the file itself"),
  (b"PK\x03\x04", "a zip archive (PyTorch checkpoints are)", "convert it to GGUF"),
  (b"lmgg", "GGML, the format before GGUF", "convert it to GGUF again from its source"),
  (b"fmgg", "GGMF, the format before GGUF", "convert it to GGUF again from its source"),
  (b"tjgg", "GGJT, the format before GGUF", "convert it to GGUF again from its source"),
  (b"24ka", "a llama2.c checkpoint of version 1 or 2", "export it with --version 0"),
)


def open_model(path: str | Path, tokenizer: str | Path | None = None) -> ModelFile:
  """Open a model file, or a Hugging Face folder (config.json and safetensors). The content decides the
  format, never the extension.

  Args:
    tokenizer: The tokenizer file of a llama2.c checkpoint. GGUF and folders carry their own.
  Raises:
    FileNotFoundError: no such file.
    ValueError: no regular file, empty, damaged, or of no known format.
    NotImplementedError: a version of the format that is not read.
  """
  path = Path(path)
  # Imported where they are needed: the readers import this module for TensorInfo.
  if path.is_dir():
    from neurojax.files.huggingface import CONFIG, HuggingFaceFile

    if not (path / CONFIG).is_file():
      raise ValueError(f"{path}: this is a folder without {CONFIG}: name the model file in it")
    if tokenizer is not None:
      raise ValueError(f"{path}: a folder carries its tokenizer: leave {tokenizer} away")
    return HuggingFaceFile(path)
  size_bytes = _regular_file(path, "model")
  if tokenizer is not None:
    tokenizer = Path(tokenizer)
    _regular_file(tokenizer, "tokenizer")
  with path.open("rb") as file:
    head = file.read(64)

  if head.startswith(b"GGUF"):
    from neurojax.files.gguf import GgufFile

    if tokenizer is not None:
      raise ValueError(f"{path}: a GGUF file carries its tokenizer: leave {tokenizer} away")
    return GgufFile(path)
  for magic, what, remedy in _FOREIGN:
    if head.startswith(magic):
      raise ValueError(f"{path}: this is {what}: {remedy}")
  from neurojax.files.llama2c import Header, Llama2cFile

  header = Header.parse(head)
  if header is not None and header.file_bytes == size_bytes:
    return Llama2cFile(path, tokenizer)
  if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size_bytes:
    raise ValueError(
      f"{path}: this is a safetensors file: name its folder {path.parent}, where config.json is"
    )
  reason = f"{path}: unknown format (first bytes {head[:8]!r}): GGUF, llama2.c and folders of safetensors are read"
  if header is not None and size_bytes < header.file_bytes:
    # Junk can look like a header, so this stays a conjecture.
    missing = header.file_bytes - size_bytes
    reason += (
      f"; as a llama2.c checkpoint ({header}) it would lack {missing} of {header.file_bytes} "
      "bytes: if it is one, download it again"
    )
  raise ValueError(reason)


def _regular_file(path: Path, what: str) -> int:
  """The size in bytes of a file that can be read."""
  if not path.exists():
    raise FileNotFoundError(f"{path}: no such {what} file")
  if path.is_dir():
    raise ValueError(f"{path}: this is a folder: name the {what} file in it")
  if not path.is_file():
    raise ValueError(f"{path}: this is no regular file: a {what} file is memory-mapped")
  size_bytes = path.stat().st_size
  if size_bytes == 0:
    raise ValueError(f"{path}: this {what} file is empty: download it again")
  return size_bytes
