"""Waits for steps that were given to the device, and reads what they computed for each row."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable

import jax
import numpy as np

from neurojax.stage.slots import Slot
from neurojax.stage.step import Row, RowOutput, Tops

Fetch = Callable[[float], RowOutput]
"""Reads what the device computed for a row; is told the seconds that the step took."""


class Read:
  """An array on its way from the device, brought to the host once for all rows that have a part in it."""

  def __init__(self, array: jax.Array):
    array.copy_to_host_async()
    self._array = array

  @functools.cached_property
  def numpy(self) -> np.ndarray:
    """The array; waits for the device."""
    return np.asarray(self._array)

  @functools.cached_property
  def floats(self) -> np.ndarray:
    """The same bits as float32."""
    return self.numpy.view(np.float32)


class Clock:
  """Knows when a device was done with its last step: the next one waited for that, and took only what is
  left."""

  def __init__(self) -> None:
    self._done_s = 0.0

  def took(self, began_s: float) -> float:
    """The seconds that a step took which is done now and was given at `began_s`."""
    now_s = time.perf_counter()
    took_s, self._done_s = now_s - max(began_s, self._done_s), now_s
    return took_s


class Pending:
  """A step that was given to the device.

  Args:
    fetches: One for each row.
    reads: All that the device has to compute for them.
    began_s: When the step was given, on the clock of `time.perf_counter`.
    clock: Shared by all steps of a device, whose results are waited for in the order of the steps.
  """

  def __init__(self, fetches: list[Fetch], reads: list[Read], began_s: float, clock: Clock):
    self._fetches, self._reads, self._began_s, self._clock = fetches, reads, began_s, clock

  def result(self) -> list[RowOutput]:
    """Wait for the device. A row that failed has its error in place of a result, and its slot is closed."""
    for read in self._reads:
      _ = read.numpy
    took_s = self._clock.took(self._began_s)
    outputs = []
    for fetch in self._fetches:
      try:
        outputs.append(fetch(took_s))
      except (ValueError, FloatingPointError) as error:
        outputs.append(RowOutput(error=error, compute_s=took_s))
    return outputs


Part = tuple[Read, int, int]
"""What a call of the decode program gave, the place of a row in it, and how many tokens the row ran."""


def raising(error: Exception) -> Fetch:
  """Raises an error in place of an output."""

  def fetch(took_s: float) -> RowOutput:
    raise error

  return fetch


def read_hidden(read: Read, rows: slice) -> Fetch:
  """Reads activations for the next stage."""
  return lambda took_s: RowOutput(hidden=_finite(read.numpy[rows], "activations"), compute_s=took_s)


def read_prompt(
  row: Row, drawn: list[Part] | None, scores: Read | None, took_s: float
) -> RowOutput:
  """Reads what a row of a prompt drew, and the scores of its targets."""
  output = RowOutput(compute_s=took_s) if drawn is None else read_drawn(row, drawn, took_s)
  if scores is None:
    return output
  logprobs = _finite(scores.floats[: row.length, 0], "logits")
  tops = _tops(scores.numpy[: row.length, 1:], row.top)
  return dataclasses.replace(output, scores=logprobs, score_tops=tops)


def read_drawn(row: Row, parts: list[Part], took_s: float) -> RowOutput:
  """Reads the tokens that a row drew: the last ones of all that it ran."""
  if len(parts) == 1:
    [(read, place, count)] = parts
    columns, floats = read.numpy[:count, place], read.floats[:count, place]
  else:
    columns = np.concatenate([read.numpy[:count, place] for read, place, count in parts])
    floats = columns.view(np.float32)
  logprobs = floats[:, 1]
  if not math.isfinite(logprobs.sum()):
    _finite(logprobs, "logits")
  first = len(columns) - row.draws
  return RowOutput(
    tokens=columns[first:, 0],
    logprobs=logprobs[first:],
    tops=_tops(columns[first:, 2:], row.top),
    compute_s=took_s,
  )


def read_verified(row: Row, slot: Slot, read: Read, place: int, took_s: float) -> RowOutput:
  """Reads the tokens up to the first that differs from its draft, and sets the slot behind them."""
  assert row.draft is not None
  columns = read.numpy[place : place + 1 + row.drafts]
  wrong = columns[:-1, 0] != row.draft
  count = 1 + (int(wrong.argmax()) if wrong.any() else row.drafts)
  slot.length, slot.drafts = row.start + count, 0
  columns = columns[:count]
  return RowOutput(
    tokens=columns[:, 0],
    logprobs=_finite(read.floats[place : place + count, 1], "logits"),
    tops=_tops(columns[:, 2:], row.top),
    compute_s=took_s,
  )


def _tops(columns: np.ndarray, top: int) -> Tops | None:
  if not top:
    return None
  count = columns.shape[1] // 2
  # A vocabulary may be smaller than what was asked for.
  top = min(top, count)
  ids, bits = columns[:, :top], np.ascontiguousarray(columns[:, count : count + top])
  return Tops(ids, bits.view(np.float32))


def _finite(x: np.ndarray, what: str) -> np.ndarray:
  if not np.isfinite(x).all():
    raise FloatingPointError(f"{what} computed here are NaN or infinite")
  return x
