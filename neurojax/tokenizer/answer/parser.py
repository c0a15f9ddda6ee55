"""Parts an answer, as it comes, into content, reasoning and calls of tools."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

from neurojax.tokenizer.answer.calls import Call, Schemas, read_calls
from neurojax.tokenizer.answer.family import Family


@dataclasses.dataclass(frozen=True)
class Delta:
  """What a piece of an answer adds to each of its parts."""

  content: str = ""
  reasoning: str = ""
  calls: tuple[Call, ...] = ()

  def __bool__(self) -> bool:
    return bool(self.content or self.reasoning or self.calls)

  def __add__(self, other: "Delta") -> "Delta":
    return Delta(
      self.content + other.content,
      self.reasoning + other.reasoning,
      self.calls + other.calls,
    )


class AnswerParser:
  """Takes the text and the marks of one answer in order.

  Marks that are tokens of their own are pushed as such (`push_mark`), so that text which spells one
  stays text. The other ones are found in the text, however that is cut.

  Args:
    spelled: Marks that are no tokens of their own.
    in_reasoning: Whether the prompt ends within the reasoning.
    schemas: Tools that were offered; None reads no calls.

  Attributes:
    in_reasoning: Whether what comes next is reasoning.
  """

  def __init__(
    self,
    family: Family,
    *,
    spelled: Sequence[str] = (),
    in_reasoning: bool = False,
    schemas: Schemas | None = None,
  ):
    self._reasoning, self._schemas = family.reasoning, schemas
    self._calls = family.calls if schemas is not None else None
    self._spelled = tuple(spelled)
    self._state: Literal["content", "reasoning", "call"] = (
      "reasoning" if in_reasoning else "content"
    )
    # Text that may begin a spelled mark; white space whose fate is open; the call so far.
    self._tail = self._space = self._call = ""
    # What is cut off where content or reasoning begins.
    self._trims = in_reasoning
    self._drops = family.reasoning.drops if in_reasoning and family.reasoning else ""
    self._has_content = self._has_call = self._is_bare = False

  @property
  def in_reasoning(self) -> bool:
    return self._state == "reasoning"

  def push(self, text: str) -> Delta:
    """Take text that holds no mark which is a token."""
    delta = Delta()
    for part, is_mark in self._cut(text):
      delta += self._mark(part) if is_mark else self._text(part)
    return delta

  def push_mark(self, mark: str) -> Delta:
    """Take a mark that is a token."""
    text, self._tail = self._tail, ""
    return self._text(text) + self._mark(mark)

  def finish(self) -> Delta:
    """The rest, once nothing more comes. A call that was not closed counts if it is whole."""
    text, self._tail = self._tail, ""
    delta = self._text(text)
    if self._state == "call":
      delta += self._end_call("")
    if self._state == "content" and not self._has_call:
      delta += Delta(self._space)
    self._space = ""
    return delta

  # ---- how

  def _cut(self, text: str) -> Iterator[tuple[str, bool]]:
    """The text in parts, marks in it apart; what may begin a mark is held back."""
    if not self._spelled:
      yield text, False
      return
    text, self._tail = self._tail + text, ""
    while True:
      found = [(at, -len(mark), mark) for mark in self._spelled if (at := text.find(mark)) >= 0]
      if not found:
        break
      at, _, mark = min(found)
      yield text[:at], False
      yield mark, True
      text = text[at + len(mark) :]
    held = max(_overlap(text, mark) for mark in self._spelled)
    self._tail = text[len(text) - held :]
    yield text[: len(text) - held], False

  def _text(self, text: str) -> Delta:
    if not text:
      return Delta()
    if self._state == "call":
      self._call += text
      return Delta()
    if self._begins_bare(text):
      self._state, self._is_bare = "call", True
      self._call, self._space = self._space + text, ""
      return Delta()
    if self._trims:
      text = (self._space + text).lstrip()
      self._space = ""
      if self._drops and self._drops.startswith(text[: len(self._drops)]):
        if len(text) < len(self._drops):
          self._space = text
          return Delta()
        text = text.removeprefix(self._drops).lstrip()
        self._drops = ""
      if not text:
        return Delta()
      self._trims = False
    text = self._space + text
    # White space at the end is shown only once something of the same part follows.
    kept = text.rstrip() if self._state == "reasoning" or self._calls else text
    self._space = text[len(kept) :]
    if self._state == "reasoning":
      return Delta(reasoning=kept)
    self._has_content = self._has_content or bool(kept)
    return Delta(kept)

  def _begins_bare(self, text: str) -> bool:
    if self._calls is None or self._calls.bare is None or self._state != "content":
      return False
    return not (self._has_content or self._has_call) and text.lstrip()[:1] == self._calls.bare

  def _mark(self, mark: str) -> Delta:
    reasoning, calls = self._reasoning, self._calls
    if self._state == "call":
      assert calls is not None
      if mark == calls.close:
        return self._end_call(mark)
      if mark == calls.open:
        if not self._call.strip():
          return Delta()
        delta = self._end_call("")
        return delta + self._begin_call()
      self._call += mark
      return Delta()
    if calls is not None and mark == calls.open:
      return self._begin_call()
    if reasoning is not None and mark == reasoning.open:
      delta = self._flush()
      self._state, self._trims, self._drops = "reasoning", True, reasoning.drops
      return delta
    if reasoning is not None and mark == reasoning.close:
      was_reasoning = self._state == "reasoning"
      if was_reasoning:
        self._state, self._space, self._trims, self._drops = "content", "", True, ""
      return Delta()
    if calls is not None and mark == calls.quote:
      return self._text(mark)
    return Delta()

  def _flush(self) -> Delta:
    space, self._space = self._space, ""
    return Delta(space) if self._has_content and not self._has_call else Delta()

  def _begin_call(self) -> Delta:
    # White space in front of a call belongs to neither; reasoning that was not closed ends here.
    self._state, self._call, self._space, self._is_bare = "call", "", "", False
    self._trims = False
    return Delta()

  def _end_call(self, close: str) -> Delta:
    assert self._calls is not None and self._schemas is not None
    text, self._call, self._state = self._call, "", "content"
    found = read_calls(text, self._calls, self._schemas)
    if found and self._is_bare and not all(call.name in self._schemas for call in found):
      found = None
    if found:
      self._has_call, self._trims = True, True
      return Delta(calls=tuple(found))
    shown = text if self._is_bare else f"{self._calls.open}{text}{close}"
    self._has_content, self._is_bare = True, False
    return Delta(shown)


def _overlap(text: str, mark: str) -> int:
  """Length of the longest end of the text that begins the mark."""
  for size in range(min(len(text), len(mark) - 1), 0, -1):
    if mark.startswith(text[-size:]):
      return size
  return 0
