"""Opens a model file: its content decides which reader presents it."""

from pathlib import Path

from neurojax.files.folder.file import CONFIG, FolderFile
from neurojax.files.gguf.file import GgufFile
from neurojax.files.llama2c import Header, Llama2cFile
from neurojax.files.model_file import ModelFile

# Files that people hand over by mistake: (first bytes, what the file is, what to do).
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
  """Open a model file, or a folder with config.json and safetensors. The content decides the format,
  never the extension.

  Args:
    tokenizer: The tokenizer file of a llama2.c checkpoint. GGUF and folders carry their own.
  Raises:
    FileNotFoundError: no such file.
    ValueError: no regular file, empty, damaged, or of no known format.
    NotImplementedError: a version of the format that is not read.
  """
  path = Path(path)
  if path.is_dir():
    if not (path / CONFIG).is_file():
      raise ValueError(f"{path}: this is a folder without {CONFIG}: name the model file in it")
    if tokenizer is not None:
      raise ValueError(f"{path}: a folder carries its tokenizer: leave {tokenizer} away")
    return FolderFile(path)
  size_bytes = _regular_file(path, "model")
  if tokenizer is not None:
    tokenizer = Path(tokenizer)
    _regular_file(tokenizer, "tokenizer")
  with path.open("rb") as file:
    head = file.read(64)

  if head.startswith(b"GGUF"):
    if tokenizer is not None:
      raise ValueError(f"{path}: a GGUF file carries its tokenizer: leave {tokenizer} away")
    return GgufFile(path)
  for magic, what, remedy in _FOREIGN:
    if head.startswith(magic):
      raise ValueError(f"{path}: this is {what}: {remedy}")
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
