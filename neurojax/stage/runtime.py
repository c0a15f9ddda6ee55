"""Runs steps of many sequences on one compiled stage, and checks every input and output."""

import dataclasses
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

Fetch = Callable[[], RowOutput]
"""Waits for the device, and reads what it computed for a row."""


class Pending:
  """A step that was given to the device.

  Args:
    began_s: When it was, on the clock of `time.perf_counter`.
  """

  def __init__(
    self, runtime: "StageRuntime", rows: Sequence[Row], fetches: list[Fetch], began_s: float
  ):
    self._runtime, self._rows, self._fetches, self._began_s = runtime, rows, fetches, began_s

  def result(self) -> list[RowOutput]:
    """Wait for the device. A row that failed has its error in place of a result, and its slot is closed."""
    outputs = []
    for fetch in self._fetches:
      try:
        outputs.append(fetch())
      except (ValueError, FloatingPointError) as error:
        outputs.append(RowOutput(error=error))
    took_s = time.perf_counter() - self._began_s
    return [dataclasses.replace(output, compute_s=took_s) for output in outputs]


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
    fetches: dict[int, Fetch] = {}
    steps: list[int] = []
    seen: set[int] = set()
    for index, row in enumerate(rows):
      try:
        if row.slot in seen:
          raise ValueError(f"slot {row.slot} has two rows in one step")
        seen.add(row.slot)
        self._slots.check(row)
        if row.role == "prompt":
          fetches[index] = self._prompt(row)
        elif row.length > 1 and not self._is_whole:
          fetches[index] = self._one_by_one(row)
        else:
          steps.append(index)
      except (ValueError, FloatingPointError) as error:
        self.close(row.slot)
        fetches[index] = _failed(error)
    if steps:
      together = self._together([rows[index] for index in steps])
      fetches.update(zip(steps, together, strict=True))
    ordered = [self._closing(row, fetches[index]) for index, row in enumerate(rows)]
    return Pending(self, rows, ordered, began_s)

  @property
  def _is_whole(self) -> bool:
    return self.stage.span.is_first and self.stage.span.is_last

  def _closing(self, row: Row, fetch: Fetch) -> Fetch:
    def run() -> RowOutput:
      try:
        return fetch()
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
      return _hidden(x_TD, row.length)
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
    for array in (drawn, scores):
      if array is not None:
        array.copy_to_host_async()
    return lambda: _prompt_output(row, drawn, scores, x_1D)

  # ---- rows of single tokens

  def _one_by_one(self, row: Row) -> Fetch:
    """Run the tokens of a row one after the other, as they ran when they were drawn."""
    tokens = _tokens(row)
    fetches = []
    for index in range(len(tokens) - 1):
      hidden = None if row.hidden is None else row.hidden[index : index + 1]
      one = dataclasses.replace(row, start=row.start + index, hidden=hidden)
      pair = tokens[index : index + 2]
      out = self._call([one], [pair], [1], [row.role == "replayed" and index == 0])
      fetches.append(self._fetch(row, [(out, 0, 1)]))
    self._advance(row)

    def fetch_all() -> RowOutput:
      outputs = [fetch() for fetch in fetches]
      if outputs[-1].hidden is None:
        return outputs[-1]
      return RowOutput(hidden=np.concatenate([output.hidden for output in outputs]))

    return fetch_all

  def _together(self, rows: list[Row]) -> list[Fetch]:
    """Run rows side by side; one with more tokens than a call takes has several calls."""
    left = {index: _tokens(row) for index, row in enumerate(rows)}
    moved = list(rows)
    fresh = [row.role == "replayed" for row in rows]
    parts: dict[int, list[tuple[jax.Array, int, int]]] = {index: [] for index in left}
    while left:
      # Rows in falling order of their tokens: those that still run are in front at any time.
      counts = {index: min(len(tokens) - 1, self.stage.loop) for index, tokens in left.items()}
      order = sorted(left, key=lambda index: -counts[index])
      out = self._call(
        [moved[index] for index in order],
        [left[index][: counts[index] + 1] for index in order],
        [counts[index] for index in order],
        [fresh[index] for index in order],
      )
      for place, index in enumerate(order):
        count = counts[index]
        parts[index].append((out, place, count))
        moved[index] = dataclasses.replace(moved[index], start=moved[index].start + count)
        fresh[index], left[index] = False, left[index][count:]
        if len(left[index]) == 1:
          del left[index]
    for row in rows:
      self._advance(row)
    return [self._fetch(row, parts[index]) for index, row in enumerate(rows)]

  def _call(
    self, rows: list[Row], tokens: list[list[int]], counts: list[int], fresh: list[bool]
  ) -> jax.Array:
    """Give one call of the decode program to the device.

    Args:
      tokens: For each row those that it runs, and the one after them.
    """
    plan_XR = np.zeros((PLAN, self.stage.width(len(rows))), np.int32)
    plan_XR[4:] = -1
    for place, row in enumerate(rows):
      plan_XR[:4, place] = row.slot, row.start, counts[place], fresh[place]
      plan_XR[4 : 4 + len(tokens[place]), place] = tokens[place]
    out = self._run(rows, plan_XR)
    out.copy_to_host_async()
    return out

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

  def _fetch(self, row: Row, parts: list[tuple[jax.Array, int, int]]) -> Fetch:
    if not self.stage.span.is_last:
      [(out, place, _)] = parts
      return lambda: _hidden_row(out, place)
    return lambda: _drawn(row, parts)

  def _kind(self, rows: Sequence[Row]) -> Kind:
    kinds = [self._slots[row.slot].kind for row in rows]
    return "full" if any(row.allowed is not None for row in rows) else sampling.widest(kinds)


def _tokens(row: Row) -> list[int]:
  """The tokens that a row runs, and the one after them: -1 for each that is drawn."""
  given = [-1] if row.tokens is None else row.tokens.tolist()
  return given + ([-1] * row.draws if row.draws else [NOT_DRAWN])


def _failed(error: Exception) -> Fetch:
  def fetch() -> RowOutput:
    raise error

  return fetch


def _hidden(x_TD: jax.Array, count: int) -> Fetch:
  x_TD.copy_to_host_async()
  return lambda: RowOutput(hidden=_finite(np.asarray(x_TD)[:count], "activations"))


def _hidden_row(x_RD: jax.Array, place: int) -> RowOutput:
  return RowOutput(hidden=_finite(np.asarray(x_RD)[place : place + 1], "activations"))


def _prompt_output(
  row: Row, drawn: jax.Array | None, scores: jax.Array | None, x_1D: jax.Array
) -> RowOutput:
  output = RowOutput() if drawn is None else _drawn(row, [(drawn, 0, 1)])
  if scores is not None:
    columns = np.asarray(scores)[: row.length]
    logprobs = _finite(columns[:, 0].view(np.float32), "logits")
    tops = _tops(columns[:, 1:], row.top)
    output = dataclasses.replace(output, scores=logprobs, score_tops=tops)
  if drawn is None and scores is None:
    jax.block_until_ready(x_1D)
  return output


def _drawn(row: Row, parts: list[tuple[jax.Array, int, int]]) -> RowOutput:
  """Reads the tokens that a row drew: the last ones of all that it ran."""
  columns = np.concatenate([np.asarray(out)[:count, place] for out, place, count in parts])
  logprobs = np.ascontiguousarray(columns[:, 1]).view(np.float32)
  _finite(logprobs, "logits")
  first = len(columns) - row.draws
  return RowOutput(
    tokens=columns[first:, 0],
    logprobs=logprobs[first:],
    tops=_tops(columns[first:, 2:], row.top),
  )


def _tops(columns: np.ndarray, top: int) -> Tops | None:
  if not top:
    return None
  count = columns.shape[1] // 2
  ids, bits = columns[:, :top], np.ascontiguousarray(columns[:, count : count + top])
  return Tops(ids, bits.view(np.float32))


def _finite(x: np.ndarray, what: str) -> np.ndarray:
  if not np.isfinite(x).all():
    raise FloatingPointError(f"{what} computed here are NaN or infinite")
  return x
