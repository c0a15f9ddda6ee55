"""Text in, text out, over any engine: tokenizing, detokenizing and stop strings."""

import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Sequence

from neurojax.engine.api import Engine, FinishReason, Request, Token
from neurojax.tokenizer.stop_strings import StopStrings
from neurojax.tokenizer.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TextPiece:
  """Text that became certain with one token; may be empty, and is never part of a stop string.

  The last piece of an answer has a finish_reason.
  """

  text: str
  token: Token
  finish_reason: FinishReason | None = None


async def stream_text(
  engine: Engine, tokenizer: Tokenizer, request: Request, *, stops: Sequence[str] = ()
) -> AsyncGenerator[TextPiece, None]:
  """Stream an answer as text. Stop ids are not rendered; a stop string ends the answer before it."""
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
  """After a lone BOS the answer is the beginning of a text, with no space before its first word."""
  return list(request.prompt) == [tokenizer.bos_id]
