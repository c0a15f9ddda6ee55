"""`neurojax chat`: talk with a model."""

import asyncio
import contextlib
import dataclasses
import sys
from typing import Annotated

import tyro

from neurojax.cli.options import (
  EngineOptions,
  ModelOptions,
  SamplingOptions,
  open_engine,
  open_tokenizer,
  stderr,
)
from neurojax.cli.text import lines_of_stdin


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat(ModelOptions, EngineOptions, SamplingOptions):
  """Talk with a model through its own chat template. An empty line or Ctrl-D ends the talk.

  Lines come from standard input, so that a script can talk too.

  Example: neurojax chat --model smollm2 --stages 2
  Example: echo "Why is the sky blue?" | neurojax chat --model smollm2
  """

  system: str | None = None
  """A system message to begin with."""
  max_tokens: Annotated[int, tyro.conf.arg(metavar="N")] = 256
  """Of each answer."""

  def run(self) -> int:
    return asyncio.run(self._chat())

  async def _chat(self) -> int:
    from neurojax.engine.api import Request
    from neurojax.engine.text import stream_text
    from neurojax.tokenizer.chat.prompt import encode_chat

    with self.open() as file:
      tokenizer = open_tokenizer(file)
      messages = [{"role": "system", "content": self.system}] if self.system is not None else []
      async with open_engine(file, self) as engine:
        _prompt()
        async for line in lines_of_stdin():
          if not line.strip():
            return 0
          messages.append({"role": "user", "content": line})
          prompt = encode_chat(tokenizer, messages)
          room = engine.context_length - len(prompt)
          if room < 1:
            raise ValueError(
              f"the talk has grown to {len(prompt)} tokens and the context is {engine.context_length}: "
              "start with a longer --context"
            )
          request = Request(
            prompt=prompt,
            max_tokens=min(self.max_tokens, room),
            sampling=self.sampling(),
            stop_ids=tokenizer.stop_ids,
          )
          answer = []
          async with contextlib.aclosing(stream_text(engine, tokenizer, request)) as stream:
            async for piece in stream:
              print(piece.text, end="", flush=True)
              answer.append(piece.text)
          print(flush=True)
          messages.append({"role": "assistant", "content": "".join(answer)})
          _prompt()
    return 0


def _prompt() -> None:
  if sys.stdin is not None and sys.stdin.isatty():
    stderr.print("[bold]>[/] ", end="")
