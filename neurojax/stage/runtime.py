"""Runs steps of many sequences on one compiled stage, and checks every input and output."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from neurojax.config import Sampling
from neurojax.model import sample as sampling
from neurojax.model.sample import Kind
from neurojax.stage.compile import CompiledStage
from neurojax.stage.slots import Limits, SlotTable
from neurojax.stage.step import Row, RowOutput, Tops
from neurojax.stage.step_programs import NOT_DRAWN, PLAN

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


class Pending:
  """A step that was given to the device.

  Args:
    fetches: One for each row.
    reads: All that the device has to compute for them.
    began_s: When the step was given, on the clock of `time.perf_counter`.
  """

  def __init__(self, fetches: list[Fetch], reads: list[Read], began_s: float):
    self._fetches, self._reads, self._began_s = fetches, reads, began_s

  def result(self) -> list[RowOutput]:
    """Wait for the device. A row that failed has its error in place of a result, and its slot is closed."""
    for read in self._reads:
      _ = read.numpy
    took_s = time.perf_counter() - self._began_s
    outputs = []
    for fetch in self._fetches:
      try:
        outputs.append(fetch(took_s))
      except (ValueError, FloatingPointError) as error:
        outputs.append(RowOutput(error=error, compute_s=took_s))
    return outputs


class StageRuntime:
  """Holds one compiled stage and the sequences that are open in its slots.

  It is not thread-safe: only one call may run at a time, but for `Pending.result`.

  Attributes:
    stage: The stage.
    most_draws: Tokens that a row may draw.
  """

  def __init__(self, stage: CompiledStage):
    self.stage = stage
    self._state = stage.new_state()
    self._reads: list[Read] = []
    self.most_draws = stage.loop if self._is_whole else 1
    self._slots = SlotTable(
      Limits(
        slots=stage.slots,
        places=stage.places,
        block=stage.chunks[0],
        context_length=stage.context_length,
        vocab_size=stage.config.vocab_size,
        most_draws=self.most_draws,
        is_first=stage.span.is_first,
        hidden=(stage.config.model_dim, np.dtype(stage.activations)),
      )
    )

  @property
  def num_sequences(self) -> int:
    """Sequences that are open."""
    return len(self._slots)

  def open(
    self,
    slot: int,
    settings: Sampling,
    *,
    stop_ids: frozenset[int] = frozenset(),
    restore: Sequence[int] = (),
    copy: tuple[int, int] | None = None,
  ) -> None:
    """Begin a sequence in a free slot. Arguments as for `engine.steps.Steps.open`.

    Raises: ValueError: the slot is open, or there is no such slot, place or position.
    """
    length = len(restore) * self.stage.chunks[0]
    if copy is not None:
      source, length = copy
      if restore or not 0 <= length <= self._slots[source].length:
        raise ValueError(
          f"{length} positions to copy from slot {source}, which holds {self._slots[source].length}"
        )
    self._slots.check_places(tuple(restore))
    vocab_size = self.stage.config.vocab_size
    own = (
      sampling.settings_of(settings, sorted(stop_ids), vocab_size)
      if self.stage.span.is_last
      else None
    )
    self._slots.open(slot, sampling.kind_of(settings), length)
    self._state = self.stage.open(
      self._state, slot, own, restore=restore, copy=None if copy is None else copy[0]
    )

  def close(self, slot: int) -> None:
    """Free a slot; closing one that is not open does nothing."""
    self._slots.close(slot)

  def step(self, rows: Sequence[Row]) -> list[RowOutput]:
    """Advance some sequences, and wait for what comes of it."""
    return self.dispatch(rows).result()

  def dispatch(self, rows: Sequence[Row]) -> Pending:
    """Give a step to the device. A row that does not fit its slot, or fails, closes the slot.

    Rows of prompts run one after the other, all others together.
    """
    began_s = time.perf_counter()
    self._reads: list[Read] = []
    fetches: list[Fetch | None] = []
    steps: list[Row] = []
    seen: set[int] = set()
    for row in rows:
      try:
        if row.slot in seen:
          raise ValueError(f"slot {row.slot} has two rows in one step")
        seen.add(row.slot)
        self._slots.check(row)
        if row.role == "prompt":
          fetches.append(self._prompt(row))
        elif row.length > 1 and not self._is_whole:
          fetches.append(self._one_by_one(row))
        else:
          steps.append(row)
          fetches.append(None)
      except (ValueError, FloatingPointError) as error:
        self.close(row.slot)
        fetches.append(_failed(error))
    together = iter(self._together(steps) if steps else ())
    ordered = [
      self._closing(row, next(together) if fetch is None else fetch)
      for row, fetch in zip(rows, fetches, strict=True)
    ]
    return Pending(ordered, self._reads, began_s)

  @property
  def _is_whole(self) -> bool:
    return self.stage.span.is_first and self.stage.span.is_last

  def _closing(self, row: Row, fetch: Fetch) -> Fetch:
    def run(took_s: float) -> RowOutput:
      try:
        return fetch(took_s)
      except (ValueError, FloatingPointError):
        self.close(row.slot)
        raise

    return run

  # ---- rows of prompts

  def _prompt(self, row: Row) -> Fetch:
    stage, slot = self.stage, self._slots[row.slot]
    assert row.tokens is not None
    if row.seen is not None and stage.span.is_last:
      self._state = stage.observe(self._state, row.slot, row.seen)
    self._state, x_TD, x_1D = stage.prompt(self._state, row.slot, row.start, row.tokens, row.hidden)
    slot.length += row.length
    for index, place in enumerate(row.keep):
      start = row.start + index * stage.chunks[0]
      self._state = stage.keep(self._state, row.slot, start, place)
    if not stage.span.is_last:
      return _hidden(self._read(x_TD), slice(row.length))
    top = stage.tops if row.top else 0
    drawn = scores = None
    if row.draws:
      masks = {} if row.allowed is None else {"allowed": row.allowed[None]}
      self._state, drawn = stage.draw(
        self._state, row.slot, x_1D, kind=self._kind([row]), top=top, **masks
      )
      slot.has_drawn = True
    if row.targets is not None:
      scores = stage.score(x_TD, row.targets, top=top)
    if drawn is None and scores is None:
      self._read(x_1D)
    draws = None if drawn is None else [(self._read(drawn), 0, 1)]
    return functools.partial(
      _prompt_output, row, draws, None if scores is None else self._read(scores)
    )

  def _read(self, array: jax.Array) -> Read:
    read = Read(array)
    self._reads.append(read)
    return read

  # ---- rows of single tokens

  def _one_by_one(self, row: Row) -> Fetch:
    """Run the tokens of a row one after the other, as they ran when they were drawn."""
    tokens = _tokens(row)
    fetches = []
    for index in range(len(tokens) - 1):
      hidden = None if row.hidden is None else row.hidden[index : index + 1]
      one = dataclasses.replace(row, start=row.start + index, hidden=hidden)
      is_fresh = row.role == "replayed" and index == 0
      read = self._call(
        [one], [_column(one.slot, one.start, 1, is_fresh, tokens[index : index + 2])]
      )
      fetches.append(self._fetch(row, [(read, 0, 1)]))
    self._advance(row)

    def fetch_all(took_s: float) -> RowOutput:
      outputs = [fetch(took_s) for fetch in fetches]
      if outputs[-1].hidden is None:
        return outputs[-1]
      hidden = np.concatenate([output.hidden for output in outputs])
      return RowOutput(hidden=hidden, compute_s=took_s)

    return fetch_all

  def _together(self, rows: list[Row]) -> list[Fetch]:
    """Run rows side by side; one with more tokens than a call takes has several calls."""
    left = {index: _tokens(row) for index, row in enumerate(rows)}
    starts = [row.start for row in rows]
    parts: list[list[Part]] = [[] for _ in rows]
    while left:
      # Rows in falling order of their tokens: those that still run are in front at any time.
      counts = {index: min(len(tokens) - 1, self.stage.loop) for index, tokens in left.items()}
      order = sorted(left, key=lambda index: -counts[index])
      columns = []
      for index in order:
        row, count = rows[index], counts[index]
        is_fresh = row.role == "replayed" and not parts[index]
        tokens = left[index][: count + 1]
        columns.append(_column(row.slot, starts[index], count, is_fresh, tokens))
      read = self._call([rows[index] for index in order], columns)
      for place, index in enumerate(order):
        count = counts[index]
        parts[index].append((read, place, count))
        starts[index] += count
        left[index] = left[index][count:]
        if len(left[index]) == 1:
          del left[index]
    for row in rows:
      self._advance(row)
    return [self._fetch(row, parts[index]) for index, row in enumerate(rows)]

  def _call(self, rows: list[Row], columns: list[list[int]]) -> Read:
    """Give one call of the decode program to the device. columns: The plan of each row."""
    plan_XR = np.zeros((PLAN, self.stage.width(len(rows))), np.int32)
    plan_XR[:, : len(rows)] = np.array(columns, np.int32).T
    return self._read(self._run(rows, plan_XR))

  def _advance(self, row: Row) -> None:
    slot = self._slots[row.slot]
    slot.length += row.length + max(row.draws - 1, 0)
    slot.has_drawn = row.draws > 0

  def _run(self, rows: list[Row], plan_XR: np.ndarray) -> jax.Array:
    width = plan_XR.shape[1]
    hidden = allowed = None
    if rows[0].hidden is not None:
      hidden = np.zeros((width, rows[0].hidden.shape[1]), rows[0].hidden.dtype)
      for place, row in enumerate(rows):
        hidden[place] = row.hidden[0]
    if any(row.allowed is not None for row in rows):
      words = -(-self.stage.config.vocab_size // 32)
      allowed = np.full((width, words), 0xFFFFFFFF, np.uint32)
      for place, row in enumerate(rows):
        if row.allowed is not None:
          allowed[place] = row.allowed
    top = self.stage.tops if any(row.top for row in rows) else 0
    self._state, out = self.stage.decode(
      self._state, plan_XR, kind=self._kind(rows), top=top, hidden=hidden, allowed=allowed
    )
    return out

  def _fetch(self, row: Row, parts: "list[Part]") -> Fetch:
    if not self.stage.span.is_last:
      [(read, place, _)] = parts
      return _hidden(read, slice(place, place + 1))
    return functools.partial(_drawn, row, parts)

  def _kind(self, rows: Sequence[Row]) -> Kind:
    kinds = [self._slots[row.slot].kind for row in rows]
    return "full" if any(row.allowed is not None for row in rows) else sampling.widest(kinds)


def _tokens(row: Row) -> list[int]:
  """The tokens that a row runs, and the one after them: -1 for each that is drawn."""
  given = [-1] if row.tokens is None else row.tokens.tolist()
  return given + ([-1] * row.draws if row.draws else [NOT_DRAWN])


def _column(slot: int, start: int, count: int, is_fresh: bool, tokens: list[int]) -> list[int]:
  """What a program is told of one row, see `CompiledStage.decode`."""
  return [slot, start, count, int(is_fresh), *tokens, *([-1] * (PLAN - 4 - len(tokens)))]


Part = tuple[Read, int, int]
"""What a call of the decode program gave, the place of a row in it, and how many tokens the row ran."""


def _failed(error: Exception) -> Fetch:
  def fetch(took_s: float) -> RowOutput:
    raise error

  return fetch


def _hidden(read: Read, rows: slice) -> Fetch:
  return lambda took_s: RowOutput(hidden=_finite(read.numpy[rows], "activations"), compute_s=took_s)


def _prompt_output(
  row: Row, drawn: list[Part] | None, scores: Read | None, took_s: float
) -> RowOutput:
  output = RowOutput(compute_s=took_s) if drawn is None else _drawn(row, drawn, took_s)
  if scores is None:
    return output
  logprobs = _finite(scores.floats[: row.length, 0], "logits")
  tops = _tops(scores.numpy[: row.length, 1:], row.top)
  return dataclasses.replace(output, scores=logprobs, score_tops=tops)


def _drawn(row: Row, parts: list[Part], took_s: float) -> RowOutput:
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
