"""`neurojax inspect`: what a model file is."""

import dataclasses
import json

from rich.console import Console

from neurojax.cli.options import ModelOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect(ModelOptions):
  """Print a model file's architecture, sizes, types, tokenizer and chat template.

  Works on files that cannot be run too, and says why they cannot.

  Example: neurojax inspect --model model.gguf
  """

  json: bool = False
  """Print one JSON object."""
  sha256: bool = False
  """Also print the digest of the whole file (reads all of it)."""

  def run(self) -> int:
    from neurojax.files.inspect import describe, render

    with self.open() as file:
      description = describe(file, sha256=self.sha256)
    if self.json:
      print(json.dumps(description, ensure_ascii=False, indent=1))
    else:
      Console().print(render(description))
    return 0
