"""Runs steps of many sequences on one compiled stage, and checks every input and output."""

import dataclasses
import functools
import time
from collections.abc import Sequence

import jax
import numpy as np

from neurojax.config import Sampling
from neurojax.model import sample as sampling
from neurojax.model.sample import Kind
from neurojax.stage.compile import CompiledStage
from neurojax.stage.pending import (
  Clock,
  Fetch,
  Part,
  Pending,
  Read,
  raising,
  read_drawn,
  read_hidden,
  read_prompt,
  read_verified,
)
from neurojax.stage.slots import Limits, SlotTable
from neurojax.stage.step import Row, RowOutput
from neurojax.stage.step_programs import DRAFT_PLAN, NOT_DRAWN, PLAN


class StageRuntime:
  """Holds one compiled stage and the sequences that are open in its slots.

  It is not thread-safe: only one call may run at a time, but for `Pending.result`.

  Attributes:
    stage: The stage.
    most_draws: Tokens that a row may draw.
    most_drafts: Drafts that a step may have, see `engine.steps.Steps`.
  """

  def __init__(self, stage: CompiledStage):
    self.stage = stage
    self._state = stage.new_state()
    self._reads: list[Read] = []
    self._clock = Clock()
    self.most_draws = stage.loop if self._is_whole else 1
    self.most_drafts = stage.most_drafts
    self._slots = SlotTable(
      Limits(
        slots=stage.slots,
        places=stage.places,
        block=stage.chunks[0],
        context_length=stage.context_length,
        vocab_size=stage.config.vocab_size,
        most_draws=self.most_draws,
        most_drafts=stage.most_drafts,
        why_no_drafts=stage.why_no_drafts,
        is_first=stage.span.is_first,
        is_last=stage.span.is_last,
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
    own = None
    if self.stage.span.is_last:
      # They are held back until there are so many tokens; else the sampler need not know them.
      held_back = sorted(stop_ids) if settings.min_tokens else ()
      own = sampling.settings_of(settings, held_back, vocab_size)
    counts = sampling.counts_tokens(settings)
    self._slots.open(slot, sampling.kind_of(settings), length, counts=counts)
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

    Rows of prompts run one after the other, those with drafts together, and all others together.
    """
    began_s, compiling_s = time.perf_counter(), self.stage.compiling_s
    self._reads: list[Read] = []
    fetches: list[Fetch | None] = []
    steps: list[Row] = []
    drafted: list[Row] = []
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
          (steps if row.draft is None else drafted).append(row)
          fetches.append(None)
      except (ValueError, FloatingPointError) as error:
        self.close(row.slot)
        fetches.append(raising(error))
    together = iter(self._together(steps) if steps else ())
    verified = iter(self._with_drafts(drafted))
    ordered = []
    for row, fetch in zip(rows, fetches, strict=True):
      if fetch is None:
        fetch = next(together if row.draft is None else verified)
      ordered.append(self._closing(row, fetch))
    # A program that is compiled on the way is no part of what a step takes.
    began_s += self.stage.compiling_s - compiling_s
    return Pending(ordered, self._reads, began_s, self._clock)

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
      return read_hidden(self._read(x_TD), slice(row.length))
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
      read_prompt, row, draws, None if scores is None else self._read(scores)
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
    slot.length = row.start + row.length + max(row.draws - 1, 0) + row.drafts
    slot.drafts = row.drafts
    slot.has_drawn = row.draws > 0

  def _run(self, rows: list[Row], plan_XR: np.ndarray) -> jax.Array:
    is_drafted = self.stage.span.is_last and rows[0].draft is not None
    run = self.stage.verify if is_drafted else self.stage.decode
    top = self.stage.tops if any(row.top for row in rows) else 0
    hidden, allowed = self._extras(rows, plan_XR.shape[1])
    self._state, out = run(
      self._state, plan_XR, kind=self._kind(rows), top=top, hidden=hidden, allowed=allowed
    )
    return out

  def _extras(self, rows: list[Row], width: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Activations and masks of rows, one after the other, filled up to the width of a program."""
    hidden = allowed = None
    if rows[0].hidden is not None:
      given = np.concatenate([row.hidden for row in rows if row.hidden is not None])
      hidden = np.zeros((width, given.shape[1]), given.dtype)
      hidden[: len(given)] = given
    if any(row.allowed is not None for row in rows):
      words = -(-self.stage.config.vocab_size // 32)
      allowed = np.full((width, words), 0xFFFFFFFF, np.uint32)
      place = 0
      for row in rows:
        if row.allowed is not None:
          allowed[place] = row.allowed
        place += 1 + row.drafts
    return hidden, allowed

  # ---- rows with drafts

  def _with_drafts(self, rows: list[Row]) -> list[Fetch]:
    """Run rows with drafts side by side, in several calls if they are too many for one."""
    fetches: list[Fetch] = []
    while rows:
      total = number = 0
      for row in rows:
        total += 1 + row.drafts
        if number and total > 1 + self.most_drafts:
          break
        number += 1
      fetches += self._verify(rows[:number])
      rows = rows[number:]
    return fetches

  def _verify(self, rows: list[Row]) -> list[Fetch]:
    is_last = self.stage.span.is_last
    columns: list[list[int]] = []
    places = []
    for row in rows:
      places.append(len(columns))
      tokens, drafts = _tokens(row)[:1], [] if row.draft is None else row.draft.tolist()
      for after, token in enumerate(tokens + drafts):
        draft = drafts[after] if after < len(drafts) else -1
        at = row.start + after
        columns.append(
          [row.slot, at, 1, after, token, draft]
          if is_last
          else _column(row.slot, at, 1, False, [token])
        )
    plan_XR = np.zeros((DRAFT_PLAN if is_last else PLAN, self.stage.width(len(columns))), np.int32)
    plan_XR[:, : len(columns)] = np.array(columns, np.int32).T
    read = self._read(self._run(rows, plan_XR))
    for row in rows:
      self._advance(row)
    if not is_last:
      pairs = zip(rows, places, strict=True)
      return [read_hidden(read, slice(place, place + 1 + row.drafts)) for row, place in pairs]
    return [
      functools.partial(read_verified, row, self._slots[row.slot], read, place)
      for row, place in zip(rows, places, strict=True)
    ]

  def _fetch(self, row: Row, parts: "list[Part]") -> Fetch:
    if not self.stage.span.is_last:
      [(read, place, _)] = parts
      return read_hidden(read, slice(place, place + 1))
    return functools.partial(read_drawn, row, parts)

  def _kind(self, rows: Sequence[Row]) -> Kind:
    return sampling.widest(self._slots[row.slot].kind for row in rows)


def _tokens(row: Row) -> list[int]:
  """The tokens that a row runs, and the one after them: -1 for each that is drawn."""
  given = [-1] if row.tokens is None else row.tokens.tolist()
  return given + ([-1] * row.draws if row.draws else [NOT_DRAWN])


def _column(slot: int, start: int, count: int, is_fresh: bool, tokens: list[int]) -> list[int]:
  """What a program is told of one row, see `CompiledStage.decode`."""
  return [slot, start, count, int(is_fresh), *tokens, *([-1] * (PLAN - 4 - len(tokens)))]
