"""Turns the token streams of any engine into text, and ends them at stop strings."""

import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Sequence
from collections.abc import Set as AbstractSet

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
    is_mark: Whether the token is one of the marks that were asked for: its own text is not in `text`,
      and all text before it is certain.
  """

  text: str
  token: Token
  finish_reason: FinishReason | None = None
  is_mark: bool = False


class AnswerText:
  """Turns the tokens of one answer into text, one at a time, up to the earliest stop string.

  Args:
    continues: Whether other text comes before the answer.
    stops: Strings that end the answer; neither they nor stop ids are rendered.
    marks: Ids of tokens that are told apart from text (`TextPiece.is_mark`) and not rendered.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    *,
    continues: bool = True,
    stops: Sequence[str] = (),
    marks: AbstractSet[int] = frozenset(),
  ):
    self._detokenizer = tokenizer.stream(continues=continues)
    self._stops, self._stopping, self._marks = stops, StopStrings(stops), marks

  def push(self, token: Token) -> TextPiece:
    """Returns what a token adds; nothing may be pushed after a piece with a finish reason."""
    reason = token.finish_reason
    is_mark = token.id in self._marks and reason != "stop"
    text = "" if is_mark or reason == "stop" else self._detokenizer.push(token.id)
    if reason or is_mark:
      text += self._detokenizer.finish()
    text, hit = self._stopping.push(text)
    if not hit and (reason or is_mark):
      text += self._stopping.finish()
      # A stop that might have been the start of a longer one is certain only now.
      hit = self._stopping.hit
      self._stopping = StopStrings(self._stops)
    return TextPiece(text, token, "stop" if hit else reason, is_mark and not hit)


async def stream_text(
  engine: Engine,
  tokenizer: Tokenizer,
  request: Request,
  *,
  stops: Sequence[str] = (),
  marks: AbstractSet[int] = frozenset(),
) -> AsyncGenerator[TextPiece, None]:
  """Stream the answers of a request as text; `piece.token.answer` says which a piece belongs to.

  Args:
    stops, marks: As for `AnswerText`. An answer that a stop string ends computes nothing more, while
      the others go on.
  """
  continues = not _starts_text(tokenizer, request)
  texts = {
    answer: AnswerText(tokenizer, continues=continues, stops=stops, marks=marks)
    for answer in range(request.n)
  }
  ended = None
  async with contextlib.aclosing(engine.generate(request)) as tokens:
    while True:
      try:
        token = await tokens.asend(ended)
      except StopAsyncIteration:
        return
      ended, text = None, texts.get(token.answer)
      if text is None:
        continue
      piece = text.push(token)
      if piece.finish_reason is not None:
        del texts[token.answer]
        ended = token.answer if token.finish_reason is None else None
      yield piece
      if not texts:
        return


def _starts_text(tokenizer: Tokenizer, request: Request) -> bool:
  """True if the answer begins a text, as after a lone BOS.

  The first word of a text has no space before it.
  """
  return list(request.prompt) == [tokenizer.bos_id]
