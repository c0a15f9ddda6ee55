"""Reads a vocabulary from any file or folder that holds one."""

import dataclasses
from pathlib import Path

from neurojax.data.token_shards import META, read_spec
from neurojax.files.find import model_path
from neurojax.files.open import open_model
from neurojax.tokenizer.read.folder import spec_from_file
from neurojax.tokenizer.read.tokenizer_json import spec_from_json
from neurojax.tokenizer.tokenizer_spec import TokenizerSpec


def read_vocabulary(path: Path, *, eos: str | None = None) -> TokenizerSpec:
  """Reads the tokenizer of a model file, tokenizer.json, tokenizer.model or folder of prepared data.

  Args:
    eos: The token that ends a text, for a tokenizer.json or tokenizer.model that does not say.
  Raises:
    ValueError: the file holds no tokenizer, or names no end of text.
    NotImplementedError: the tokenizer has rules that this package does not read.
    FileNotFoundError: no such file.
  """
  if path.is_dir() and (path / META).is_file():
    spec = read_spec(path)
  elif path.suffix == ".json":
    spec = _from_json(path, eos)
  elif path.suffix == ".model":
    spec = _ending_with(spec_from_file(path), eos, path)
  else:
    with open_model(model_path(str(path))) as file:
      if file.tokenizer is None:
        raise ValueError(f"{path} has no tokenizer")
      spec = file.tokenizer
  if eos is not None and (spec.eos_id is None or spec.tokens[spec.eos_id] != eos):
    raise ValueError(f"--eos {eos!r}: {path} has its own end of text, or none of that name")
  if spec.eos_id is None:
    raise ValueError(
      f"{path} names no end of text: give --eos TOKEN with a tokenizer.json or tokenizer.model"
    )
  return spec


def _from_json(path: Path, eos: str | None) -> TokenizerSpec:
  """Reads a tokenizer.json in GGUF's terms if nothing is lost, else for its library."""
  spec = spec_from_file(path)
  if eos is None and spec.eos_id is not None:
    eos = spec.tokens[spec.eos_id]
  try:
    return spec_from_json(path.read_text(encoding="utf-8"), eos=eos)
  except (ValueError, NotImplementedError):
    pass
  return _ending_with(spec, eos, path)


def _ending_with(spec: TokenizerSpec, eos: str | None, path: Path) -> TokenizerSpec:
  """Returns the spec with an end of text, where it names none itself."""
  if spec.eos_id is not None or eos is None:
    return spec
  if eos not in spec.tokens:
    raise ValueError(f"--eos {eos!r} is no token of {path}")
  end = spec.tokens.index(eos)
  return dataclasses.replace(spec, eos_id=end, stop_ids=spec.stop_ids | {end})
