"""Continuous batching: many requests share the steps of one model, which this file knows nothing of.

Requests wait in a bounded queue until a slot is free. Rows of prompts take turns with steps in which
all answers go on. `Steps.ahead` steps may be under way: an answer goes on before its last token is
known here, and what turns out to lie past its end is dropped.
"""

import asyncio
import bisect
import contextlib
import dataclasses
import heapq
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine
from collections.abc import Sequence as Items
from typing import Any

import numpy as np

from neurojax.engine.api import (
  Busy,
  EngineError,
  EngineLoad,
  Limits,
  Request,
  Scores,
  Token,
  check_request,
  check_score,
)
from neurojax.engine.draft import MakeDrafter
from neurojax.engine.pace import Pace
from neurojax.engine.prefix import Block, PrefixIndex
from neurojax.engine.schedule import Schedule
from neurojax.engine.sequence import Part, Sequence, answers
from neurojax.engine.steps import Steps
from neurojax.engine.ticket import Ticket
from neurojax.stage.step import RowOutput

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class _Flight:
  """A step under way.

  Attributes:
    began_s: When it was given, or when the step before it came back if that was later.
    is_void: Whether a step before it failed: nothing of it is believed then.
  """

  parts: list[Part]
  task: asyncio.Task[list[RowOutput]]
  began_s: float
  is_void: bool = False


class Batch:
  """Serves requests with the steps of one model. Use from one event loop at a time.

  Args:
    steps: Computes the steps.
    limits: Bounds that every request has to keep.
    queue: Requests that may wait for a slot; more of them are refused as `Busy`.
    few_draws: Tokens that a row draws while others wait; a quarter of `steps.most_draws` if absent.
    cohorts: Groups of answers whose steps are under way at the same time. If absent: 1 where a step can
      go on from the tokens of the last one (`steps.chains`), which has all answers in each step; else
      `steps.ahead`, such as the number of stages, each of which computes for another group.
    make_drafter: Makes the drafter of each answer, where drafts are wanted and `steps.most_drafts` allows
      them. Drafts change no answer.
    always_drafts: Whether drafts are given even where they are not seen to pay.
    close_s: Seconds that `close` waits for steps under way.
    clock: Seconds that pass, for `RequestTimes`.
  """

  def __init__(
    self,
    steps: Steps,
    limits: Limits,
    *,
    queue: int = 256,
    few_draws: int | None = None,
    cohorts: int | None = None,
    make_drafter: MakeDrafter | None = None,
    always_drafts: bool = False,
    close_s: float = 10.0,
    clock: Callable[[], float] = time.perf_counter,
  ):
    block = steps.chunks[0]
    if list(steps.chunks) != sorted(steps.chunks) or any(chunk % block for chunk in steps.chunks):
      raise ValueError(f"chunks = {steps.chunks}: they must be ascending multiples of the first")
    self._steps, self._limits, self._queue = steps, limits, queue
    self._close_s, self._clock = close_s, clock
    self._line: list[Sequence] = []
    self._tickets: set[Ticket[Sequence]] = set()
    self._slots: list[Sequence | None] = [None] * steps.slots
    self._free = list(range(steps.slots))
    # Slots that may still be open on some stage: they are closed before they are used.
    self._doubtful: set[int] = set()
    self._flights: deque[_Flight] = deque()
    self._index = PrefixIndex(steps.places)
    self._make_drafter = make_drafter if make_drafter and steps.most_drafts else None
    self._pace = Pace(steps.most_drafts, always=always_drafts) if self._make_drafter else None
    self._landed_s: float | None = None
    self._schedule = Schedule(
      steps,
      self._index,
      few_draws=few_draws,
      cohorts=cohorts,
      pace=self._pace,
      on_failure=self._fail_one,
    )
    self._number = 0
    self._load = EngineLoad(slots=steps.slots, places=steps.places)
    self._is_closed = False
    self._loop: asyncio.AbstractEventLoop | None = None
    self._task: asyncio.Task[None] | None = None
    self._helpers: set[asyncio.Task[None]] = set()
    self._wake = asyncio.Event()

  # ---- what it does

  async def generate(self, request: Request) -> AsyncGenerator[Token, int | None]:
    """Stream the answers of a request, as `engine.api.Engine.generate` promises it."""
    check_request(request, self._limits)
    ticket = self._ticket(request.priority)
    # A replayed row keeps others waiting; where each token costs a round trip it is worth it.
    ticket.sequences = answers(
      ticket,
      request,
      block=self._steps.chunks[0],
      replays=not self._steps.chains,
      make_drafter=self._make_drafter,
    )
    async with self._served(ticket):
      left = set(range(request.n))
      while left:
        token = await ticket.next()
        assert isinstance(token, Token)
        if token.answer not in left:
          continue
        if token.finish_reason is not None:
          left.discard(token.answer)
        ended = yield token
        if ended is not None and ended in left:
          left.discard(ended)
          self._end_answer(ticket.sequences[ended])

  async def score(
    self, tokens: Items[int], *, first: int = 1, top: int = 0, priority: int = 0
  ) -> Scores:
    """Score tokens after those before them, as `engine.api.Engine.score` promises it."""
    check_score(tokens, first, self._limits, top)
    ids = np.asarray(tokens, np.int32)
    ticket = self._ticket(priority)
    ticket.sequences = [
      Sequence(
        ticket,
        ids[:-1],
        block=self._steps.chunks[0],
        targets=ids[1:],
        first=first,
        score_top=top,
      )
    ]
    async with self._served(ticket):
      scores = await ticket.next()
      assert isinstance(scores, Scores)
      return scores

  def load(self) -> EngineLoad:
    """What it is busy with now."""
    return dataclasses.replace(
      self._load,
      running=len(self._slots) - len(self._free),
      queued=self._queued(),
      blocks=len(self._index),
    )

  async def close(self) -> None:
    """End every request with an error and free all slots; nothing is served afterwards."""
    self._is_closed = True
    for ticket in list(self._tickets):
      self._end(ticket, EngineError("the engine is closed"))
    task = self._task
    if task is None or task.done() or self._loop is not asyncio.get_running_loop():
      return
    self._wake.set()
    _, late = await asyncio.wait({task}, timeout=self._close_s)
    if late:
      _LOG.warning("steps were still under way %.0f s after the engine was closed", self._close_s)
      task.cancel()
      await asyncio.wait({task})

  # ---- requests come and go

  def _ticket(self, priority: int) -> Ticket[Sequence]:
    self._number += 1
    return Ticket(priority, self._number, self._clock())

  @contextlib.asynccontextmanager
  async def _served(self, ticket: Ticket[Sequence]) -> AsyncGenerator[None, None]:
    """Queue a request, and free what it holds. Who leaves early goes on once that is done."""
    self._submit(ticket)
    try:
      yield
    except (GeneratorExit, asyncio.CancelledError):
      if not ticket.is_over:
        self._end(ticket)
        await ticket.freed.wait()
      raise
    finally:
      self._end(ticket)

  def _submit(self, ticket: Ticket[Sequence]) -> None:
    if self._is_closed:
      raise EngineError("the engine is closed")
    self._attach()
    queued = self._queued()
    if not self._free and queued >= self._queue:
      self._load = dataclasses.replace(self._load, refused=self._load.refused + 1)
      raise Busy(queued)
    self._tickets.add(ticket)
    for sequence in ticket.sequences:
      bisect.insort(self._line, sequence, key=lambda waiting: waiting.order)
    self._admit()
    self._wake.set()
    if self._task is None or self._task.done():
      self._task = asyncio.create_task(self._run())

  def _attach(self) -> None:
    loop = asyncio.get_running_loop()
    if self._loop is not loop:
      self._wake = asyncio.Event()
      self._abandon(EngineError("the event loop of the engine ended"))
      self._loop, self._task = loop, None

  def _queued(self) -> int:
    return sum(not ticket.has_begun for ticket in self._tickets)

  def _end(self, ticket: Ticket[Sequence], error: Exception | None = None) -> None:
    """End a request, once; its slots are freed by and by."""
    if ticket.is_over:
      return
    ticket.is_over = True
    self._tickets.discard(ticket)
    for sequence in ticket.sequences:
      sequence.is_over = True
      if sequence.phase == "queued" and sequence in self._line:
        self._line.remove(sequence)
    if error is not None:
      ticket.post(error)
    self._wake.set()

  def _end_answer(self, sequence: Sequence) -> None:
    """End one answer of a request, whose others go on."""
    if sequence.is_over:
      return
    sequence.is_over = True
    if sequence.phase == "queued" and sequence in self._line:
      self._line.remove(sequence)
    self._count(sequence)
    self._wake.set()

  def _admit(self) -> None:
    """Give free slots to those who wait, and make room for better priorities."""
    while self._line and self._free:
      sequence, slot = self._line.pop(0), heapq.heappop(self._free)
      sequence.admit(slot, self._clock())
      sequence.ticket.hold()
      self._slots[slot] = sequence
    self._preempt()

  def _preempt(self) -> None:
    """Make running sequences leave for waiting ones of better priority, the worst and latest first."""
    running = [sequence for sequence in self._slots if sequence is not None]
    staying = sorted((s for s in running if not s.is_leaving), key=lambda s: s.order)
    for sequence in self._line[len(running) - len(staying) :]:
      if not staying or staying[-1].ticket.priority <= sequence.ticket.priority:
        return
      staying.pop().is_preempted = True
      self._load = dataclasses.replace(self._load, preempted=self._load.preempted + 1)

  # ---- the one task

  async def _run(self) -> None:
    """Serve until nothing is left to do."""
    try:
      while True:
        self._wake.clear()
        self._land()
        self._leave()
        self._begin()
        self._give()
        self._landed_s = None
        if not self._flights and len(self._free) == len(self._slots):
          return
        await self._wake.wait()
    except BaseException as error:
      # The event loop ends, or this file has a fault: nobody may wait for ever.
      reason = EngineError(f"the engine stopped: {error!r}")
      self._abandon(reason)
      if isinstance(error, Exception):
        _LOG.exception("the batch of requests stopped")
      else:
        raise

  def _abandon(self, error: EngineError) -> None:
    """Forget all that runs, without waiting for it."""
    for ticket in list(self._tickets):
      self._end(ticket, error)
    for slot, sequence in enumerate(self._slots):
      if sequence is not None:
        self._doubtful.add(slot)
        self._vacate(sequence)
    for work in [*self._helpers, *(flight.task for flight in self._flights)]:
      if not work.done() and not work.get_loop().is_closed():
        work.cancel()
    self._flights.clear()
    self._index = self._schedule.index = PrefixIndex(self._steps.places)

  def _land(self) -> None:
    """Take what came back, in the order in which the steps were given."""
    while self._flights and self._flights[0].task.done():
      flight = self._flights.popleft()
      for part in flight.parts:
        part.sequence.flying -= 1
      error = _failure(flight)
      if error is not None and not flight.is_void:
        self._fail_all(error, flight)
      if error is not None or flight.is_void:
        for part in flight.parts:
          self._settle(part, is_kept=False)
        continue
      now_s = self._clock()
      self._measure(flight, now_s)
      for part, output in zip(flight.parts, flight.task.result(), strict=True):
        self._settle(part, is_kept=output.error is None)
        self._take(part, output, now_s)

  def _measure(self, flight: _Flight, now_s: float) -> None:
    """Tell what a step of answers took, from when the one before it came back."""
    self._landed_s = now_s
    if self._flights:
      self._flights[0].began_s = now_s
    rows = [part.row for part in flight.parts]
    if self._pace is not None and all(row.role == "drawn" for row in rows):
      is_guessing = flight.parts[0].is_guessing
      self._pace.took(rows, now_s - flight.began_s, is_guessing=is_guessing)

  def _settle(self, part: Part, *, is_kept: bool) -> None:
    if part.blocks:
      self._index.settle(part.blocks, is_kept=is_kept)
      self._index.release([block.key for block in part.blocks], part.sequence)

  def _take(self, part: Part, output: RowOutput, now_s: float) -> None:
    sequence = part.sequence
    if part.row.drafts and output.tokens is not None:
      load = self._load
      self._load = dataclasses.replace(
        load,
        drafts=load.drafts + part.row.drafts,
        right_drafts=load.right_drafts + len(output.tokens) - 1,
      )
    if sequence.is_over:
      return
    try:
      if output.error is not None:
        raise output.error
      sequence.take(part.row, output, now_s)
    except Exception as error:
      self._fail_one(sequence, error)
      return
    if sequence.is_over:
      self._count(sequence)
      if all(other.is_over for other in sequence.ticket.sequences):
        self._end(sequence.ticket)

  def _count(self, sequence: Sequence) -> None:
    usage, load = sequence.usage, self._load
    self._load = dataclasses.replace(
      load,
      prompt_tokens=load.prompt_tokens + usage.prompt_tokens,
      cached_tokens=load.cached_tokens + usage.cached_tokens,
      answer_tokens=load.answer_tokens + usage.answer_tokens,
    )

  def _fail_one(self, sequence: Sequence, error: Exception) -> None:
    self._end(sequence.ticket, _as_engine_error(error))

  def _fail_all(self, error: EngineError, failed: _Flight) -> None:
    """A step failed: so have those behind it, and what a stage kept may be lost."""
    for flight in [failed, *self._flights]:
      flight.is_void = True
      for part in flight.parts:
        if not part.sequence.is_over:
          self._end(part.sequence.ticket, error)
    self._index.clear()

  # ---- slots

  def _leave(self) -> None:
    """Close the slots of those who have ended or must go, once nothing of theirs is under way."""
    for slot, sequence in enumerate(self._slots):
      if sequence is None or not sequence.is_leaving or sequence.phase == "queued":
        continue
      if sequence.flying or sequence.holds or sequence.phase == "opening":
        continue
      self._index.release(sequence.keys, sequence)
      if sequence.phase == "waiting":
        self._vacate(sequence)
        self._requeue(sequence)
      else:
        sequence.phase = "queued"
        self._help(self._close(slot, sequence))
    self._admit()

  async def _close(self, slot: int, sequence: Sequence) -> None:
    try:
      await self._steps.close(slot)
    except (Exception, asyncio.CancelledError):
      _LOG.exception("slot %d could not be closed; it will be before it is used again", slot)
      self._doubtful.add(slot)
    if self._slots[slot] is sequence:
      self._vacate(sequence)
      self._requeue(sequence)
      self._admit()
    self._wake.set()

  def _vacate(self, sequence: Sequence) -> None:
    slot = sequence.slot
    assert slot is not None and self._slots[slot] is sequence
    self._slots[slot] = None
    heapq.heappush(self._free, slot)
    sequence.slot = None
    sequence.ticket.let_go()

  def _requeue(self, sequence: Sequence) -> None:
    if not sequence.is_over:
      try:
        sequence.reset()
      except Exception as error:
        self._fail_one(sequence, error)
        return
      bisect.insort(self._line, sequence, key=lambda waiting: waiting.order)

  def _help(self, work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.create_task(work)
    self._helpers.add(task)
    task.add_done_callback(self._helpers.discard)

  def _begin(self) -> None:
    """Open the slots of those who have one, unless what they need is just being computed."""
    for sequence in self._slots:
      if sequence is None or sequence.phase != "waiting" or sequence.is_leaving:
        continue
      most = sequence.last_block // self._steps.chunks[0]
      found = self._index.find(sequence.keys[:most]) if sequence.reads_cache else []
      leader = _leader(sequence) if len(found) < most and sequence.reads_cache else None
      if leader is not None and not (leader.at == leader.last_block and not leader.flying):
        continue
      if leader is None and len(found) < most and self._is_coming(sequence, len(found)):
        continue
      sequence.phase = "opening"
      if leader is not None:
        leader.holds += 1
        found = []
      else:
        self._index.claim(sequence.keys[len(found) :], sequence)
      self._index.pin(found)
      self._help(self._open(sequence, found, leader))

  def _is_coming(self, sequence: Sequence, number: int) -> bool:
    """Whether somebody who does not wait longer is about to compute a block of a prompt."""
    owner = self._index.claimant(sequence.keys[number]) if sequence.reads_cache else None
    if not isinstance(owner, Sequence) or owner.is_leaving:
      return False
    return owner.ticket.priority <= sequence.ticket.priority

  async def _open(self, sequence: Sequence, found: list[Block], leader: Sequence | None) -> None:
    slot, index = sequence.slot, self._index
    assert slot is not None
    position = leader.last_block if leader else len(found) * self._steps.chunks[0]
    copy = (leader.slot, position) if leader is not None and leader.slot is not None else None
    error = None
    try:
      if slot in self._doubtful:
        await self._steps.close(slot)
        self._doubtful.discard(slot)
      restore = [block.place for block in found]
      await self._steps.open(
        slot, sequence.sampling, stop_ids=sequence.stop_ids, restore=restore, copy=copy
      )
    except (Exception, asyncio.CancelledError) as failure:
      # Only `_abandon` cancels this task, and has freed the slot then; else the steps were cancelled.
      error = failure
    finally:
      index.unpin(found)
      if leader is not None:
        leader.holds -= 1
    if self._slots[slot] is not sequence:
      return
    sequence.phase = "prompt"
    if error is None:
      sequence.opened(position)
    elif found and not isinstance(error, ValueError):
      # A stage may have lost what it kept: the prompt is computed then.
      for block in found:
        index.forget(block)
      sequence.phase = "waiting"
      self._doubtful.add(slot)
    else:
      self._end(
        sequence.ticket, error if isinstance(error, ValueError) else _as_engine_error(error)
      )
    self._wake.set()

  # ---- steps

  def _give(self) -> None:
    while len(self._flights) < self._steps.ahead:
      running = [s for s in self._slots if s is not None and not s.is_leaving]
      parts = self._schedule.next(running, are_waiting=bool(self._line))
      if not parts:
        return
      for part in parts:
        part.sequence.flying += 1
      task = asyncio.create_task(self._steps.step([part.row for part in parts]))
      task.add_done_callback(lambda _: self._wake.set())
      began_s = self._clock() if self._landed_s is None else self._landed_s
      self._flights.append(_Flight(parts, task, began_s))


def _leader(sequence: Sequence) -> Sequence | None:
  """Another answer of the same request that is about to have the prompt up to its last block."""
  for other in sequence.ticket.sequences:
    in_prompt = other.phase in ("opening", "prompt") and other.at <= other.last_block
    if other is not sequence and in_prompt and not other.is_leaving:
      return other
  return None


def _failure(flight: _Flight) -> EngineError | None:
  """Why a step failed, if it did."""
  if flight.task.cancelled():
    return EngineError("a step was cancelled")
  error = flight.task.exception()
  if error is not None:
    return _as_engine_error(error)
  if len(flight.task.result()) != len(flight.parts):
    return EngineError(f"a step of {len(flight.parts)} rows gave another number of outputs")
  return None


def _as_engine_error(error: BaseException) -> EngineError:
  if isinstance(error, EngineError):
    return error
  made = EngineError(f"{type(error).__name__}: {error}")
  made.__cause__ = error
  return made
