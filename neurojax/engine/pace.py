"""Whether guessing pays: what steps with and without drafts cost, and what they give."""

import math
import statistics
from collections import deque
from collections.abc import Sequence

from neurojax.engine.draft import SIZES, Guesses
from neurojax.stage.step import Row

GAIN = 1.03
"""Tokens a second with drafts, over those without, from which drafts are given."""

_SAMPLES = 5
_AGAIN = 64
"""Steps with drafts after which a step without is given, and so is measured again."""

_FORGOTTEN = 4096
"""Tokens without drafts after which what drafts cost is measured again."""


class Pace:
  """Measures steps of answers, and says how many tokens to guess.

  Args:
    most_drafts: As `engine.steps.Steps.most_drafts`.
    always: Guess as much as fits, whatever it costs.

  Attributes:
    most_drafts: As it was given.
  """

  def __init__(self, most_drafts: int, *, always: bool = False):
    self.most_drafts, self._always = most_drafts, always
    self._plain: dict[int, _Cost] = {}
    self._single: dict[int, _Cost] = {}
    self._wide: dict[int, _Cost] = {}
    self._is_on = False
    self._steps = self._tokens = 0

  def took(self, rows: Sequence[Row], took_s: float, *, is_guessing: bool = False) -> None:
    """Take the seconds of a step of answers.

    Args:
      is_guessing: Whether the rows would have had drafts, had there been a guess.
    """
    count, drafts = len(rows), sum(row.drafts for row in rows)
    draws = max(row.draws for row in rows)
    self._steps += 1
    if drafts:
      self._cost(self._wide, count + drafts).add(took_s, self._tokens)
    elif is_guessing:
      self._cost(self._single, count).add(took_s, self._tokens)
    else:
      self._tokens += draws * count
      self._steps = 0
      self._cost(self._plain, count).add(took_s / draws, self._tokens)

  def size(self, answers: Sequence[Guesses | None]) -> int:
    """Choose the number of tokens to guess for each of these answers; 0: steps without drafts are as fast.

    Args:
      answers: Their guesses; None for each that takes no drafts.
    """
    count = len(answers)
    sizes = [size for size in SIZES if count + size <= self.most_drafts + 1]
    guesses = [guess for guess in answers if guess is not None]
    if not sizes or not guesses:
      return 0
    if self._always:
      return sizes[-1]
    plain_s = self._known(self._plain, count)
    if plain_s is None or self._steps >= _AGAIN:
      self._is_on = False
      return 0
    gain, size = max((self._gain(guesses, count, size, plain_s), size) for size in sizes)
    self._is_on = gain > (1 if self._is_on else GAIN)
    return size if self._is_on else 0

  def _gain(self, guesses: list[Guesses], count: int, size: int, plain_s: float) -> float:
    """Tokens a second with drafts of a size, over those without."""
    tokens = count + sum(guess.share * guess.right(size) for guess in guesses)
    none = math.prod(1 - guess.share for guess in guesses)
    drafts = size * max(1.0, sum(guess.share for guess in guesses))
    rows = min(count + math.ceil(drafts), self.most_drafts + 1)
    # What was never measured is tried: it takes no less than what has fewer rows.
    single_s = self._known(self._single, count) or plain_s
    known = [self._known(self._wide, r) for r in self._wide if r <= _bucket(rows)]
    wide_s = max((s for s in known if s is not None), default=plain_s)
    step_s = none * single_s + (1 - none) * max(wide_s, plain_s)
    return tokens / count * plain_s / step_s if step_s else 0.0

  def _cost(self, costs: "dict[int, _Cost]", rows: int) -> "_Cost":
    return costs.setdefault(_bucket(rows), _Cost())

  def _known(self, costs: "dict[int, _Cost]", rows: int) -> float | None:
    cost = costs.get(_bucket(rows))
    if cost is None or (costs is not self._plain and self._tokens - cost.at > _FORGOTTEN):
      return None
    return cost.value


class _Cost:
  """The usual seconds of a step. The first one does not count: its program may have been compiled then.

  Attributes:
    at: When it was measured last, in tokens without drafts.
  """

  def __init__(self) -> None:
    self._samples: deque[float] = deque(maxlen=_SAMPLES)
    self._is_first = True
    self.at = 0

  def add(self, took_s: float, at: int) -> None:
    if not self._is_first:
      self._samples.append(took_s)
    self._is_first, self.at = False, at

  @property
  def value(self) -> float | None:
    return statistics.median_low(self._samples) if self._samples else None


def _bucket(rows: int) -> int:
  """The power of two that holds so many rows."""
  return 1 << (rows - 1).bit_length()
