"""`neurojax generate`: continue a text."""

import asyncio
import contextlib
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Annotated

import tyro

from neurojax.cli.options import (
  EngineOptions,
  ModelOptions,
  SamplingOptions,
  open_engine,
  open_tokenizer,
)
from neurojax.cli.text import read_stdin, read_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(ModelOptions, EngineOptions, SamplingOptions):
  """Continue a text, streaming to standard output.

  Example: neurojax generate --model smollm2 --prompt "The capital of France is" --max-tokens 32
  Example: neurojax generate --model smollm2 --prompt "Once upon a time" --stages 2 --temperature 0.8 --seed 7
  """

  prompt: str | None = None
  """The text; "-" reads standard input."""
  prompt_file: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
  """Read the text from a file."""
  max_tokens: Annotated[int, tyro.conf.arg(metavar="N")] = 128
  stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
  """End the answer before this text; may be given several times."""
  special: bool = False
  """Recognise control tokens spelled in the prompt (such as <|im_start|>)."""
  ignore_eos: bool = False
  """Go on to max_tokens even past an end-of-sequence token."""
  json: bool = False
  """Print one JSON object with text, tokens, log-probabilities and times."""

  def run(self) -> int:
    text = self._text()
    return asyncio.run(self._generate(text))

  def _text(self) -> str:
    if (self.prompt is None) == (self.prompt_file is None):
      raise ValueError("give --prompt TEXT or --prompt-file FILE")
    if self.prompt_file is not None:
      return read_text(self.prompt_file)
    return read_stdin() if self.prompt == "-" else self.prompt or ""

  async def _generate(self, text: str) -> int:
    from neurojax.engine.api import Request
    from neurojax.engine.text import stream_text

    with self.open() as file:
      tokenizer = open_tokenizer(file)
      request = Request(
        prompt=tokenizer.encode(text, parse_special=self.special, add_special=True),
        max_tokens=self.max_tokens,
        sampling=self.sampling(),
        stop_ids=frozenset() if self.ignore_eos else tokenizer.stop_ids,
      )
      async with open_engine(file, self) as engine:
        began_s = time.perf_counter()
        first_s, pieces, tokens, reason = None, [], [], None
        stream = stream_text(engine, tokenizer, request, stops=self.stop)
        async with contextlib.aclosing(stream):
          async for piece in stream:
            first_s = first_s or time.perf_counter() - began_s
            pieces.append(piece.text)
            reason = piece.finish_reason
            tokens.append(piece.token)
            if not self.json:
              print(piece.text, end="", flush=True)
        total_s = time.perf_counter() - began_s
        if self.json:
          answer = {
            "text": "".join(pieces),
            "prompt_tokens": list(request.prompt),
            "tokens": [token.id for token in tokens],
            "logprobs": [token.logprob for token in tokens],
            "finish_reason": reason,
            "first_token_s": first_s,
            "total_s": total_s,
          }
          print(json.dumps(answer, ensure_ascii=False))
        elif sys.stdout.isatty():
          print()
    return 0
