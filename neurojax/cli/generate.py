"""`neurojax generate`: continue a text."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import tyro

from neurojax.cli.options import (
  EngineOptions,
  ModelOptions,
  SamplingOptions,
  check_max_tokens,
  open_face,
)
from neurojax.cli.text import read_stdin, read_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(ModelOptions, EngineOptions, SamplingOptions):
  """Continue a text, and print the answer while it is computed.

  Example: neurojax generate --model neurollm --prompt "Once upon a time" --max-tokens 32
  Example: neurojax generate --model neurollm --prompt "The sea was" --stages 2 --temperature 0.8 --seed 7
  """

  sequences: Annotated[int, tyro.conf.arg(metavar="N")] = 1
  """Sequences that there is room for; this command uses one."""
  prompt: str | None = None
  """The text to continue; "-" reads it from standard input."""
  prompt_file: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
  """Read the text from a UTF-8 file, instead of --prompt."""
  max_tokens: Annotated[int, tyro.conf.arg(metavar="N")] = 128
  """Longest answer, in tokens."""
  stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
  """End the answer before this text. May be given several times."""
  special: bool = False
  """Read control tokens that the prompt spells, such as <|im_start|>, as control tokens."""
  ignore_eos: bool = False
  """Continue to --max-tokens, even past an end-of-sequence token."""
  json: bool = False
  """Print one JSON object with text, tokens, log-probabilities and times."""

  def run(self) -> int:
    text, sampling = self._text(), self.sampling()
    check_max_tokens(self.max_tokens)
    with open_face(self) as model:
      stream = model.stream(
        text,
        max_tokens=self.max_tokens,
        sampling=sampling,
        stop=self.stop,
        ignore_eos=self.ignore_eos,
        special=self.special,
      )
      for piece in stream:
        if not self.json:
          print(piece, end="", flush=True)
    answer = stream.completion
    if self.json:
      table = dataclasses.asdict(answer)
      times = table.pop("times")
      print(
        json.dumps(
          {**table, "first_token_s": times["first_token_s"], "total_s": times["total_s"]},
          ensure_ascii=False,
        )
      )
    elif sys.stdout.isatty():
      print()
    return 0

  def _text(self) -> str:
    if (self.prompt is None) == (self.prompt_file is None):
      raise ValueError("give --prompt TEXT or --prompt-file FILE")
    if self.prompt_file is not None:
      return read_text(self.prompt_file, "--prompt-file")
    return read_stdin() if self.prompt == "-" else self.prompt or ""
