"""The verb `neurojax tokenize`, which prints the token ids of a text."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from neurojax.files.find import model_path

if TYPE_CHECKING:
  from neurojax.tokenizer.tokenizer import Tokenizer

_ROW = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenize:
  """Print the token ids of a file's exact text, as a table or as one JSON list.

  Control tokens that the text spells are text, unless --parse-special is given.

  Example: neurojax tokenize --model model.gguf --file text.txt --json
  """

  model: Annotated[str, tyro.conf.arg(metavar="MODEL")]
  """A model, as for `neurojax generate`, or its tokenizer.json or tokenizer.model alone."""
  file: Annotated[str, tyro.conf.arg(metavar="FILE")]
  """The file of UTF-8 text, of 256 MiB at most; - is standard input."""
  special: bool = False
  """Add BOS and EOS where the model says so, as `neurojax generate` does."""
  parse_special: bool = False
  """Recognise control tokens that the text spells, such as <|im_start|>."""
  tokenizer: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
  """The tokenizer's file, for model files that come without (llama2.c)."""
  json: bool = False
  """Print one JSON list of ids instead of a table."""

  def run(self) -> int:
    from neurojax.cli.text import read_stdin, read_text

    text = read_stdin() if self.file == "-" else read_text(Path(self.file), "--file")
    tokenizer = _open(self.model, self.tokenizer)
    ids = tokenizer.encode(text, add_special=self.special, parse_special=self.parse_special)
    if self.json:
      print(json.dumps(ids))
    else:
      _print(tokenizer, ids)
    return 0


def _open(model: str, apart: Path | None) -> "Tokenizer":
  """Opens the tokenizer of a model argument. Raises: ValueError: it has none."""
  from neurojax.tokenizer.read.folder import spec_from_file, spec_from_folder
  from neurojax.tokenizer.tokenizer import Tokenizer

  path = model_path(model)
  if path.is_dir():
    spec = spec_from_folder(path)
  elif path.suffix in (".json", ".model"):
    spec = spec_from_file(path)
  else:
    from neurojax.files.open import open_model

    with open_model(path, apart) as file:
      spec = file.tokenizer
  if spec is None:
    raise ValueError(f"{path} has no tokenizer: name a file or folder with one")
  return Tokenizer(spec)


def _print(tokenizer: "Tokenizer", ids: list[int]) -> None:
  """Prints one line for each token: its place, its id, its bytes."""
  write = sys.stdout.write
  write(f"{'':>8} {'id':>8}  piece\n")
  for i, token_id in enumerate(ids):
    piece = tokenizer.piece(token_id)
    shown = _shown(piece)
    write(f"{i:>8} {token_id:>8}  {shown if len(shown) <= _ROW else shown[:_ROW] + '...'}\n")
  write(f"{len(ids)} tokens\n")


def _shown(piece: bytes) -> str:
  """Returns a piece in quotes; unprintable and torn characters are written out."""
  text = piece.decode("utf-8", "backslashreplace")
  return json.dumps(text, ensure_ascii=not text.isprintable())
