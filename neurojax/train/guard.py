"""Judges whether a training step went wrong, and what to do about it."""

import collections
import dataclasses
import math
import statistics
from typing import Any, Literal

Verdict = Literal["fine", "skipped", "back"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
  """Limits of what a run recovers from.

  A step whose loss or gradient is not finite changes nothing and is skipped (the step function sees
  to that). Going back to the last checkpoint and on with later batches is the remedy of PaLM,
  arXiv:2204.02311, section 5.1.

  Attributes:
    skips: Number of skipped steps in a row that send the run back to its last checkpoint.
    spike_factor: A loss above this times the median of recent ones does so too; None: never.
    spike_window: Number of losses that are recent; with fewer than half of it there is no judgement.
    returns: Number of returns after which the next one ends the run with an error.
  """

  skips: int = 5
  spike_factor: float | None = None
  spike_window: int = 100
  returns: int = 3

  def __post_init__(self) -> None:
    if self.skips < 1 or self.spike_window < 2 or self.returns < 0:
      raise ValueError(
        f"guard: skips = {self.skips}, spike_window = {self.spike_window}, returns = {self.returns}:"
        " at least 1, 2 and 0"
      )
    if self.spike_factor is not None and not 1 < self.spike_factor < math.inf:
      raise ValueError(f"guard: spike_factor = {self.spike_factor}: above 1 and finite, or absent")


class Guard:
  """Judges the loss of every step, in order."""

  def __init__(self, config: GuardConfig):
    self._config = config
    self._recent: collections.deque[float] = collections.deque(maxlen=config.spike_window)
    self._skipped_in_a_row = 0
    self.returns = 0
    self.reason = ""

  def observe(self, loss: float, finite: bool) -> Verdict:
    """Decides what to do after this step; `reason` says why, if not "fine"."""
    if not finite or not math.isfinite(loss):
      self._skipped_in_a_row += 1
      self.reason = "loss or gradient is not finite"
      if self._skipped_in_a_row < self._config.skips:
        return "skipped"
      self.reason += f", {self._skipped_in_a_row} steps in a row"
      return "back"
    self._skipped_in_a_row = 0
    factor = self._config.spike_factor
    if factor is not None and 2 * len(self._recent) >= self._config.spike_window:
      median = statistics.median(self._recent)
      if loss > factor * median:
        self.reason = f"loss {loss:.4g} is above {factor:g} times the median {median:.4g}"
        return "back"
    self._recent.append(loss)
    return "fine"

  def get_state(self) -> dict[str, Any]:
    """The state as plain values, for a checkpoint."""
    return {
      "recent": list(self._recent),
      "skipped_in_a_row": self._skipped_in_a_row,
      "returns": self.returns,
    }

  def set_state(self, state: dict[str, Any]) -> None:
    self._recent = collections.deque(state["recent"], maxlen=self._config.spike_window)
    self._skipped_in_a_row = state["skipped_in_a_row"]
    self.returns = state["returns"]
