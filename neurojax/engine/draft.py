"""Guesses of the tokens that an answer goes on with, and how often they would have been right."""

from collections.abc import Callable, Iterable
from typing import Protocol

SIZES = (1, 3, 7, 15)
"""Numbers of guessed tokens that a row may have, beside what is left at the end of an answer."""


class Drafter(Protocol):
  """Guesses how one sequence goes on. Guesses never change an answer, only how soon it comes."""

  def accept(self, tokens: Iterable[int]) -> None:
    """Take tokens that the sequence went on with; the first ones are its prompt."""
    ...

  def propose(self, most: int) -> list[int]:
    """Guess up to `most` tokens that follow; [] if there is nothing to go by."""
    ...


MakeDrafter = Callable[[], Drafter]
"""Makes the drafter of one sequence."""


class Lookup:
  """Guesses what followed the last few tokens when they occurred before: prompt lookup.

  The longest match counts, and of several the latest. A guess that reaches the present end goes on with
  itself, as in a loop. A token costs the same at any length of the sequence.

  Args:
    longest, shortest: Lengths of the last tokens that are looked for.
    most: Places that are remembered for each length; the oldest are forgotten.
  Source: https://github.com/apoorvumang/prompt-lookup-decoding; LLMA, arXiv:2304.04487.
  """

  def __init__(self, *, longest: int = 4, shortest: int = 2, most: int = 1 << 16):
    if not 1 <= shortest <= longest or most < 1:
      raise ValueError(
        f"longest = {longest}, shortest = {shortest}, most = {most}: 1 <= shortest <= longest"
      )
    self._lengths = range(longest, shortest - 1, -1)
    self._most = most
    self._tokens: list[int] = []
    # Where the tokens after the last occurrence begin.
    self._after: dict[tuple[int, ...], int] = {}

  def accept(self, tokens: Iterable[int]) -> None:
    known, after = self._tokens, self._after
    tokens = list(tokens)
    skipped = max(0, len(tokens) - self._most)
    known += tokens[:skipped]
    for token in tokens[skipped:]:
      # The last tokens become findable once something follows them.
      end = len(known)
      for length in self._lengths:
        if length <= end:
          last = tuple(known[end - length :])
          after.pop(last, None)
          after[last] = end
      known.append(token)
    while len(after) > self._most * len(self._lengths):
      del after[next(iter(after))]

  def propose(self, most: int) -> list[int]:
    known = self._tokens
    for length in self._lengths:
      at = self._after.get(tuple(known[-length:])) if length <= len(known) else None
      if at is not None:
        draft = known[at : at + most]
        while len(draft) < most:
          draft.append(draft[at - len(known)])
        return draft
    return []


class Guesses:
  """The guesses of one answer, judged by the tokens that came.

  The tokens do not depend on the guesses, so that all that would have been guessed is judged, whether it
  was tried or not: the tokens are gone through as if each step had the longest guess.

  Attributes:
    share: Mean share of late steps that there was a guess for.
  """

  def __init__(self, drafter: Drafter, prompt: Iterable[int]):
    self._drafter = drafter
    drafter.accept(prompt)
    self._draft: list[int] | None = None
    self._right = 0
    self._share, self._rights = _Mean(0.9), {size: _Mean(0.8) for size in SIZES}

  def accept(self, token: int) -> None:
    """Take the next token of the answer."""
    if self._draft is None:
      self._draft, self._right = self._drafter.propose(SIZES[-1]), 0
    self._drafter.accept([token])
    if self._right < len(self._draft) and token == self._draft[self._right]:
      self._right += 1
      return
    self._share.add(float(bool(self._draft)))
    if self._draft:
      for size, mean in self._rights.items():
        mean.add(min(self._right, size))
    self._draft = None

  def propose(self, most: int) -> list[int]:
    return self._drafter.propose(most)

  @property
  def share(self) -> float:
    return self._share.value

  def right(self, size: int) -> float:
    """Mean number of tokens that are right of a guess of so many."""
    return self._rights[size].value


class _Mean:
  """A mean in which what is older weighs less; 0 of nothing."""

  def __init__(self, keep: float):
    self._keep, self._sum, self._weight = keep, 0.0, 0.0

  def add(self, value: float) -> None:
    self._sum = self._keep * self._sum + value
    self._weight = self._keep * self._weight + 1

  @property
  def value(self) -> float:
    return self._sum / self._weight if self._weight else 0.0
