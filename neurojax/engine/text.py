"""Turns the token streams of any engine into text, and ends them at stop strings."""

import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Sequence

from neurojax.engine.api import Engine, FinishReason, Request, Token
from neurojax.tokenizer.stop_strings import StopStrings
from neurojax.tokenizer.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TextPiece:
  """The text that became certain with one token.

  Attributes:
    text: May be empty; never part of a stop string.
    token: The token.
    finish_reason: Set on the last piece of an answer.
  """

  text: str
  token: Token
  finish_reason: FinishReason | None = None


async def stream_text(
  engine: Engine, tokenizer: Tokenizer, request: Request, *, stops: Sequence[str] = ()
) -> AsyncGenerator[TextPiece, None]:
  """Stream an answer as text.

  Args:
    stops: Strings that end the answer; neither they nor stop ids are rendered.
  """
  detokenizer = tokenizer.stream(continues=not _starts_text(tokenizer, request))
  stopping = StopStrings(stops)
  async with contextlib.aclosing(engine.generate(request)) as tokens:
    async for token in tokens:
      stopped_by_id = token.finish_reason == "stop"
      text = "" if stopped_by_id else detokenizer.push(token.id)
      if token.finish_reason:
        text += detokenizer.finish()
      text, hit = stopping.push(text)
      if hit:
        yield TextPiece(text, token, "stop")
        return
      reason = token.finish_reason
      if reason:
        text += stopping.finish()
        # A stop that might have been the start of a longer one is certain only now.
        reason = "stop" if stopping.hit else reason
      yield TextPiece(text, token, reason)


def _starts_text(tokenizer: Tokenizer, request: Request) -> bool:
  """True if the answer begins a text, as after a lone BOS.

  The first word of a text has no space before it.
  """
  return list(request.prompt) == [tokenizer.bos_id]
