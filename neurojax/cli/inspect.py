"""`neurojax inspect` describes a model file."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from neurojax.files.find import model_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect:
  """Print a model's architecture, sizes, types, tokenizer, chat template, and the memory it takes.

  Also reads model files that cannot be run, and says why they cannot.

  Example: neurojax inspect --model neurollm
  """

  file: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = None
  """The same as --model MODEL."""
  model: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
  """A model, as for `neurojax generate`."""
  tokenizer: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
  """The tokenizer, for formats that keep it apart (llama2.c)."""
  json: bool = False
  """Print one JSON object."""
  sha256: bool = False
  """Also print the digest of the whole file, which takes reading all of it."""

  def run(self) -> int:
    from neurojax.files.inspect import describe, describe_tokenizer, render
    from neurojax.files.open import open_model

    if (self.file is None) == (self.model is None):
      raise ValueError("name one model: neurojax inspect --model MODEL")
    path = model_path(str(self.file if self.model is None else self.model))
    try:
      with open_model(path, self.tokenizer) as file:
        description = describe(file, sha256=self.sha256)
    except (ValueError, NotImplementedError):
      found = describe_tokenizer(path) if path.exists() else None
      if found is None:
        raise
      description = found
    if self.json:
      print(json.dumps(description, ensure_ascii=False, indent=1))
    else:
      Console().print(render(description))
    return 0
