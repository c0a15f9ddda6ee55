"""Writes a checkpoint of a training run as a model file that others read."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from neurojax.data.token_shards import read_spec
from neurojax.data.vocabulary import read_vocabulary
from neurojax.files.write.folder import KINDS, to_folder
from neurojax.files.write.gguf import Converted, to_gguf
from neurojax.files.write.parameter_source import ParameterSource
from neurojax.tokenizer.tokenizer_spec import TokenizerSpec
from neurojax.train.trained_model import read_run


@dataclasses.dataclass(frozen=True)
class Exported:
  """An export and its origin.

  Attributes:
    step: Steps that the checkpoint had taken.
    source: The weights that were written, with their tokenizer.
    made: Architecture and types of the file.
  """

  step: int
  source: ParameterSource
  made: Converted


def export(
  workdir: Path,
  out: Path,
  *,
  step: int | None = None,
  type: str | None = None,
  dtype: str | None = None,
  tokenizer: Path | None = None,
  said: Mapping[str, str | None] | None = None,
  overwrite: bool = False,
  progress: Callable[[int, int], None] | None = None,
) -> Exported:
  """Writes a checkpoint as GGUF, or as a folder for transformers, whole or not at all.

  Args:
    out: GGUF if the name ends in .gguf, else a new folder.
    step: The checkpoint; the newest if absent.
    type: Type of ternary matrices in GGUF, or of all matrices of a model that is not ternary.
    dtype: Dtype of all tensors of a folder.
    tokenizer: A vocabulary, where the run's own data are not where they were.
    said: What the file says of the model: name (that of the run's folder if absent), license, ....
    overwrite: Replace what an earlier export left there.
    progress: Called with the tensors that are written, and all of them.
  Raises: ValueError, FileNotFoundError: no run, a place that is taken, or a type that cannot hold the
    numbers.
  """
  is_gguf = out.suffix.lower() == ".gguf"
  check_export(out, type=type, dtype=dtype, overwrite=overwrite)
  trained = read_run(workdir, step)
  spec = _spec(trained.config.data.folder, tokenizer)
  source = dataclasses.replace(trained.weights, tokenizer=spec)
  names = {**(said or {}), "name": (said or {}).get("name") or workdir.resolve().name}
  general = {f"general.{key}": value for key, value in names.items() if value is not None}
  if is_gguf:
    # A type is for ternary matrices alone where there are any, else for all matrices.
    ternary = source.ternary()
    outer = type if "embedding_VD" in ternary or not ternary else None
    made = to_gguf(
      source, out, kind=type, outer=outer, is_exact=True, overwrite=overwrite, general=general,
      progress=progress,
    )  # fmt: skip
  else:
    kind = next((kind for kind, name in KINDS.items() if name == dtype), None)
    is_empty = out.is_dir() and not any(out.iterdir())
    made = to_folder(
      source, out, kind=kind, is_exact=True, overwrite=overwrite or is_empty, general=general,
      progress=progress,
    )  # fmt: skip
  return Exported(trained.step, source, made)


def check_export(
  out: Path, *, type: str | None = None, dtype: str | None = None, overwrite: bool = False
) -> None:
  """Raises: ValueError: a place or a format that cannot be; before a checkpoint is read."""
  is_gguf = out.suffix.lower() == ".gguf"
  if out.suffix.lower() in (".safetensors", ".bin", ".pt", ".pth", ".onnx"):
    raise ValueError(f"{out}: name a folder, or a file that ends in .gguf")
  if is_gguf and dtype is not None:
    raise ValueError(f"dtype = {dtype} is of a folder: GGUF has a type")
  if not is_gguf and type is not None:
    raise ValueError(f"type = {type} is of GGUF: let the name end in .gguf, or leave the type out")
  if is_gguf and out.exists() and not overwrite:
    raise ValueError(f"{out} exists: name another file, or overwrite it")


def _spec(data: str, tokenizer: Path | None) -> TokenizerSpec:
  if tokenizer is not None:
    return read_vocabulary(tokenizer)
  try:
    return read_spec(Path(data))
  except FileNotFoundError as error:
    raise FileNotFoundError(
      f"{error}: the run's data are not where they were: give the vocabulary (tokenizer=...,"
      " --tokenizer)"
    ) from error
