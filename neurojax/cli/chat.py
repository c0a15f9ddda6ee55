"""`neurojax chat`: talk with a model."""

import asyncio
import contextlib
import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated

import tyro

from neurojax.cli.console import stderr
from neurojax.cli.options import (
  EngineOptions,
  ModelOptions,
  SamplingOptions,
  check_max_tokens,
  open_face,
)
from neurojax.cli.text import lines_of_stdin
from neurojax.config import Sampling

if TYPE_CHECKING:
  from neurojax.api.model import Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat(ModelOptions, EngineOptions, SamplingOptions):
  """Talk with a model through its own chat template. An empty line or Ctrl-D ends the talk.

  Each line of standard input is a message, so that a script can talk too. The model in this package
  has no chat template: it continues texts (`neurojax generate`).

  Example: neurojax chat --model smollm2 --stages 2
  Example: echo "Why is the sky blue?" | neurojax chat --model smollm2
  """

  sequences: Annotated[int, tyro.conf.arg(metavar="N")] = 1
  """Sequences that there is room for; this command uses one."""
  system: str | None = None
  """A system message, which begins the talk."""
  max_tokens: Annotated[int, tyro.conf.arg(metavar="N")] = 256
  """Longest answer, in tokens."""

  def run(self) -> int:
    sampling = self.sampling()
    check_max_tokens(self.max_tokens)
    self._check_template()
    with open_face(self) as model:
      return asyncio.run(self._talk(model, sampling))

  def _check_template(self) -> None:
    """Raises: ValueError: the model has no chat template."""
    with self.open() as file:
      spec = file.tokenizer
    if spec is not None and spec.chat_template is None:
      raise ValueError(
        f"{self.model} has no chat template: `neurojax generate` continues texts with it"
      )

  async def _talk(self, model: "Model", sampling: Sampling) -> int:
    messages = [{"role": "system", "content": self.system}] if self.system is not None else []
    _prompt()
    async for line in lines_of_stdin():
      if not line.strip():
        return 0
      messages.append({"role": "user", "content": line})
      stream = model.aio.stream_chat(messages, max_tokens=self.max_tokens, sampling=sampling)
      async with contextlib.aclosing(stream):
        async for piece in stream:
          print(piece, end="", flush=True)
      print(flush=True)
      messages.append({"role": "assistant", "content": stream.completion.text})
      _prompt()
    return 0


def _prompt() -> None:
  if sys.stdin is not None and sys.stdin.isatty():
    stderr.print("[bold]>[/] ", end="")
