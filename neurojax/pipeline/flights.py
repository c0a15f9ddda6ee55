"""Sends the steps of a pipeline's sequences to the stages, and takes the stages' answers."""

import asyncio
import contextlib
import dataclasses
import time
import uuid
from collections.abc import Iterator, Sequence

from neurojax.config import Sampling
from neurojax.engine.api import EngineError
from neurojax.pipeline import messages
from neurojax.pipeline import pipeline_pb2 as pb
from neurojax.pipeline import rows as wire
from neurojax.pipeline.contact import Contact
from neurojax.pipeline.errors import PipelineError, ProtocolError, StageFailed, StageLost
from neurojax.pipeline.marks import Marks
from neurojax.pipeline.stages import Stages
from neurojax.pipeline.work import OPENING, Flown, Work, blame
from neurojax.stage.step import Row, RowOutput
from neurojax.wire.identity import printable


class Flights:
  """The `engine.steps.Steps` of a pipeline. Use from one event loop.

  Several steps may be under way, each on another stage, or behind others on the way to it. They are
  carried out in the order in which they are given: each stage takes the frames of a link in order.

  Args:
    slots: Sequences that may be open at the same time.
    vocab_size: Tokens that the last stage may answer.
    step_s: Longest seconds in which no stage gets on with what is waited for, or was asked before it.

  Attributes:
    marks: Times of decode steps.
  """

  most_draws = 1
  chains = False

  def __init__(self, stages: Stages, *, slots: int, vocab_size: int, step_s: float):
    self.slots, self.marks = slots, Marks(stages)
    self._stages, self._vocab_size, self._step_s = stages, vocab_size, step_s
    self._slots: dict[int, Flown] = {}
    self._names: dict[str, Flown] = {}
    # In the order in which they were asked.
    self._works: list[Work] = []
    self._sending = asyncio.Lock()

  @property
  def chunks(self) -> tuple[int, ...]:
    return (self._stages.block,)

  @property
  def places(self) -> int:
    """Places that every stage grants."""
    return self._stages.places

  @property
  def ahead(self) -> int:
    """One step for each stage, and one that is on its way back or forth."""
    return len(self._stages) + 1

  # ---- what it does

  async def open(
    self,
    slot: int,
    sampling: Sampling,
    *,
    stop_ids: frozenset[int] = frozenset(),
    restore: Sequence[int] = (),
    copy: tuple[int, int] | None = None,
  ) -> None:
    stages = self._stages
    if not len(stages):
      raise EngineError("the pipeline is closed")
    if any(contact.lost for contact in stages):
      await stages.relink()
    if restore and max(restore) >= self.places:
      raise EngineError("the kept blocks are gone, with the link to a stage")
    assert slot not in self._slots, "a slot is closed before it is opened again"
    message = pb.Open(
      sequence=uuid.uuid4().hex,
      sampling=messages.sampling(sampling),
      stop_ids=sorted(stop_ids),
      restore=restore,
    )
    if copy is not None:
      message.copy_sequence, message.copy_positions = self._slots[copy[0]].name, copy[1]
    sequence = Flown(message.sequence, [OPENING] * len(stages))
    self._slots[slot] = self._names[sequence.name] = sequence
    with self._under_way({sequence: (OPENING, None)}) as work:
      for index, contact in enumerate(stages):
        await contact.send(pb.Frame(open=self._addressed(message, index)))
      await self._wait(work)

  def _addressed(self, message: pb.Open, index: int) -> pb.Open:
    """The message for one stage, which says who comes after it."""
    own = pb.Open()
    own.CopyFrom(message)
    if index + 1 < len(self._stages):
      after = self._stages[index + 1]
      own.next_address = after.host.address
      own.next_first_layer, own.next_last_layer = after.span.first_layer, after.span.last_layer
    return own

  async def step(self, rows: Sequence[Row]) -> list[RowOutput]:
    sequences = [self._slots.get(row.slot) for row in rows]
    parts, sent = {}, []
    for row, sequence in zip(rows, sequences, strict=True):
      if sequence is not None and not sequence.failure:
        parts[sequence] = (sequence.steps, row)
        sent.append(wire.row(sequence.name, sequence.steps, self._granted(row)))
        sequence.steps += 1
    outputs: dict[Flown, RowOutput] = {}
    if parts:
      with self._under_way(parts) as work:
        await self._send(rows, list(wire.steps(sent)))
        await self._wait(work)
        outputs = work.outputs
    return [outputs.get(sequence) or _unsent(sequence) for sequence in sequences]

  async def _send(self, rows: Sequence[Row], frames: list[pb.Step]) -> None:
    # The frames of one step stay together: another step may go on with a sequence of the last one.
    async with self._sending:
      if len(frames) == 1 and any(row.role == "drawn" for row in rows):
        self.marks.sent(frames[0].rows[0])
      for frame in frames:
        await self._stages[0].send(pb.Frame(step=frame))

  def _granted(self, row: Row) -> Row:
    """A row that keeps nothing where a stage that was linked again grants no places any more.

    What is said to be kept then is not restored either: no stage restores a place that nobody kept there.
    """
    if not row.keep or max(row.keep) < self.places:
      return row
    return dataclasses.replace(row, keep=())

  async def close(self, slot: int) -> None:
    sequence = self._slots.get(slot)
    if sequence is None:
      return
    self._names.pop(sequence.name, None)
    frame = pb.Frame(close=pb.Close(sequence=sequence.name))
    await asyncio.gather(*(_tell(contact, frame) for contact in self._stages))
    if self._slots.get(slot) is sequence:
      del self._slots[slot]

  def end(self) -> None:
    """Fail every sequence, because the pipeline closes."""
    self._fail_all(EngineError("the pipeline is closed"))

  # ---- waiting

  @contextlib.contextmanager
  def _under_way(self, parts: dict[Flown, tuple[int, Row | None]]) -> Iterator[Work]:
    work = Work(parts, asyncio.get_running_loop().create_future(), time.monotonic())
    self._works.append(work)
    for sequence, (index, _) in parts.items():
      sequence.works[index] = work
    try:
      yield work
    finally:
      self._works.remove(work)
      for sequence, (index, _) in parts.items():
        sequence.works.pop(index, None)

  async def _wait(self, work: Work) -> None:
    """Wait as long as some stage gets on with the work, or with what was asked before, within `step_s`."""
    while not work.over.done():
      left_s = work.progress_s + self._step_s - time.monotonic()
      if left_s > 0:
        await asyncio.wait((work.over,), timeout=left_s)
        continue
      error = await blame(work, list(self._stages), self._step_s)
      # What was asked later waits behind it.
      for late in self._works[self._works.index(work) :]:
        late.end(error)
    if error := work.over.result():
      raise error

  def _progress(self, work: Work) -> None:
    now_s = time.monotonic()
    for behind in self._works[self._works.index(work) :]:
      behind.progress_s = now_s

  def _fail(self, sequence: Flown, error: EngineError) -> None:
    sequence.failure = sequence.failure or error
    for index, work in list(sequence.works.items()):
      if index == OPENING:
        work.end(error)
      else:
        work.take(sequence, RowOutput(error=error))

  def _fail_all(self, error: EngineError) -> None:
    for sequence in self._names.values():
      sequence.failure = sequence.failure or error
    for work in self._works:
      work.end(error)

  # ---- what comes back

  def on_frame(self, contact: Contact, frame: pb.Frame) -> None:
    """Take a frame that a stage sent."""
    kind = frame.WhichOneof("body")
    if kind == "outcome":
      self.marks.take(contact, frame.outcome)
      for row in frame.outcome.rows:
        if sequence := self._names.get(row.sequence):
          self._on_row(contact, sequence, row)
    elif kind == "opened":
      self._on_opened(contact, frame.opened.sequence)
    elif kind == "failure":
      self._on_failure(contact, frame.failure)

  def on_lost(self, contact: Contact) -> None:
    """End every sequence: each needs every stage."""
    self._fail_all(StageLost(contact.label, contact.lost or ""))

  def _on_opened(self, contact: Contact, name: str) -> None:
    sequence = self._names.get(name)
    if sequence is None or sequence.failure:
      return
    index = self._stages.index(contact)
    if sequence.done[index] != OPENING:
      self._fail(sequence, ProtocolError(contact.label, "it opened the sequence twice"))
      return
    sequence.done[index] = 0
    if work := sequence.works.get(OPENING):
      self._progress(work)
      if OPENING not in sequence.done:
        work.end(None)

  def _on_row(self, contact: Contact, sequence: Flown, row: pb.RowOutcome) -> None:
    if sequence.failure:
      return
    index = self._stages.index(contact)
    done = sequence.done[index]
    if not 0 <= done == row.index < sequence.steps:
      due = f"step {done} is due" if 0 <= done < sequence.steps else "none is due"
      said = f"it answered step {row.index} where {due}"
      self._fail(sequence, ProtocolError(contact.label, said))
      return
    sequence.done[index] = row.index + 1
    work = sequence.works.get(row.index)
    if work is None:
      return
    self._progress(work)
    if index < len(self._stages) - 1:
      return
    try:
      given = work.parts[sequence][1]
      assert given is not None
      work.take(sequence, wire.read_outcome(row, given, self._vocab_size))
    except ValueError as error:
      self._fail(sequence, ProtocolError(contact.label, str(error)))

  def _on_failure(self, contact: Contact, failure: pb.Failure) -> None:
    sequence = self._names.get(failure.sequence)
    if sequence is None:
      return
    index, message = self._stages.index(contact), printable(failure.message)
    if failure.kind == "lost" and index + 1 < len(self._stages):
      # A stage that loses the next one may say so before our own link to that one breaks.
      lost = self._stages[index + 1]
      self._fail(sequence, StageLost(lost.label, f"{message}, says {contact.name}"))
    else:
      self._fail(sequence, StageFailed(contact.label, message))


def _unsent(sequence: Flown | None) -> RowOutput:
  """The output of a row that was not sent."""
  return RowOutput(error=sequence.failure if sequence else EngineError("the slot is not open"))


async def _tell(contact: Contact, frame: pb.Frame) -> None:
  with contextlib.suppress(PipelineError):
    await contact.send(frame)
