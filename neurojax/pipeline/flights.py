"""Follows the sequences of a coordinator: sends their steps and takes the stages' answers."""

import asyncio
import contextlib
import dataclasses
import time

import numpy as np

from neurojax.config import Sampling
from neurojax.engine.api import EngineError
from neurojax.pipeline import messages
from neurojax.pipeline import pipeline_pb2 as pb
from neurojax.pipeline.contact import Contact, Timing
from neurojax.pipeline.errors import (
  PipelineError,
  ProtocolError,
  StageFailed,
  StageLost,
  StageTimeout,
)
from neurojax.pipeline.stages import Stages
from neurojax.stage.step import StepInput, StepOutput
from neurojax.wire import tensor
from neurojax.wire.identity import printable


@dataclasses.dataclass
class _Mark:
  """Times of one decode step.

  Attributes:
    sent_s: When it was sent.
    outcomes: The stages' outcomes of the step, by the stage's index.
    back_s: When the last stage's outcome arrived.
  """

  sent_s: float
  outcomes: dict[int, pb.Outcome] = dataclasses.field(default_factory=dict)
  back_s: float = 0.0


@dataclasses.dataclass
class _Flight:
  """A sequence under way.

  Attributes:
    done: Number of steps that each stage has finished.
    opened: Indices of the stages that have opened the sequence.
    steps: Number of steps that were sent.
    waiting_for: Index of the step whose outcome is awaited.
    outcome: Set with that outcome; with None once all stages have opened, or with a failure.
    failure: Why the sequence ended; None while it goes on.
    progress_s: When some stage last got on with it, or a step was sent.
    marks: Decode steps whose times not all stages have told yet, by index.
  """

  done: list[int]
  opened: set[int] = dataclasses.field(default_factory=set)
  steps: int = 0
  waiting_for: int = -1
  outcome: asyncio.Future[pb.Outcome | None] | None = None
  failure: EngineError | None = None
  progress_s: float = 0.0
  marks: dict[int, _Mark] = dataclasses.field(default_factory=dict)


class Flights:
  """The `engine.steps.Steps` of a pipeline. Use from one event loop.

  Args:
    vocab_size: Tokens that the last stage may answer.
    step_s: Longest seconds in which no stage gets on with a sequence that waits.

  Attributes:
    returned: Times of tokens from the last stage back to here.
  """

  def __init__(self, stages: Stages, *, vocab_size: int, step_s: float):
    self._stages, self._vocab_size, self._step_s = stages, vocab_size, step_s
    self._flights: dict[str, _Flight] = {}
    self.returned = Timing()

  async def open(self, sequence: str, sampling: Sampling) -> None:
    stages = self._stages
    if not len(stages):
      raise EngineError("the pipeline is closed")
    if any(contact.lost for contact in stages):
      await stages.relink()
    flight = _Flight(done=[0] * len(stages), progress_s=time.monotonic())
    flight.outcome = asyncio.get_running_loop().create_future()
    self._flights[sequence] = flight
    for index, contact in enumerate(stages):
      message = pb.Open(sequence=sequence, sampling=messages.sampling(sampling))
      if index + 1 < len(stages):
        after = stages[index + 1]
        message.next_address = after.host.address
        message.next_first_layer = after.span.first_layer
        message.next_last_layer = after.span.last_layer
      await contact.send(pb.Frame(open=message))
    await self._wait(flight)

  async def step(self, sequence: str, given: StepInput) -> StepOutput | None:
    flight = self._flights[sequence]
    if flight.failure:
      raise flight.failure
    index, flight.steps = flight.steps, flight.steps + 1
    flight.progress_s = time.monotonic()
    if given.is_answer:
      flight.marks[index] = _Mark(time.time())
    wants = given.sample or given.targets is not None
    if wants:
      flight.waiting_for, flight.outcome = index, asyncio.get_running_loop().create_future()
    await self._stages[0].send(pb.Frame(step=messages.step(sequence, index, given)))
    if not wants:
      return None
    outcome = await self._wait(flight)
    assert outcome is not None
    return self._checked(given, outcome)

  async def close(self, sequence: str) -> None:
    if self._flights.pop(sequence, None) is None:
      return
    frame = pb.Frame(close=pb.Close(sequence=sequence))
    for contact in list(self._stages):
      with contextlib.suppress(PipelineError):
        await contact.send(frame)

  def end(self) -> None:
    """Fail every sequence that is under way, because the pipeline closes."""
    for flight in self._flights.values():
      _fail(flight, EngineError("the pipeline is closed"))

  def _checked(self, given: StepInput, outcome: pb.Outcome) -> StepOutput:
    """Check the last stage's answer. Raises: ProtocolError: it does not fit what was asked."""
    last = self._stages[-1].label
    if given.sample != outcome.sampled or (given.targets is not None) != outcome.HasField("scores"):
      raise ProtocolError(last, "it answered something that was not asked")
    if outcome.sampled and not (outcome.token < self._vocab_size and np.isfinite(outcome.logprob)):
      raise ProtocolError(
        last, f"it answered token {outcome.token}, log-probability {outcome.logprob}"
      )
    scores = None
    if outcome.HasField("scores"):
      try:
        scores = tensor.decode(outcome.scores, what="scores", max_dims=1)
      except ValueError as error:
        raise ProtocolError(last, str(error)) from error
      if scores.shape != given.tokens.shape or not np.isfinite(scores).all():
        raise ProtocolError(
          last, f"it answered {len(scores)} scores for {len(given.tokens)} tokens"
        )
    return StepOutput(
      token=outcome.token if outcome.sampled else None,
      logprob=outcome.logprob if outcome.sampled else None,
      scores=scores,
    )

  # ---- waiting

  async def _wait(self, flight: _Flight) -> pb.Outcome | None:
    """Wait as long as some stage gets on with the sequence within `step_s`."""
    assert flight.outcome is not None
    while True:
      if flight.failure:
        raise flight.failure
      if flight.outcome.done():
        return flight.outcome.result()
      left_s = flight.progress_s + self._step_s - time.monotonic()
      if left_s <= 0:
        raise await self._blame(flight)
      with contextlib.suppress(TimeoutError):
        outcome = await asyncio.wait_for(asyncio.shield(flight.outcome), left_s)
        if flight.failure:
          raise flight.failure
        return outcome

  async def _blame(self, flight: _Flight) -> PipelineError:
    """Name the stage that hangs: the first one behind that does not even answer a health check."""
    contacts = list(self._stages)
    opening = flight.steps == 0
    behind = [
      index
      for index in range(len(contacts))
      if (index not in flight.opened if opening else flight.done[index] < flight.steps)
    ]
    healthy = await asyncio.gather(*(contacts[index].is_responsive() for index in behind))
    silent = [index for index, ok in zip(behind, healthy, strict=True) if not ok]
    culprit = (silent or behind)[0]
    what = "open the sequence" if opening else f"finish step {flight.done[culprit]}"
    return StageTimeout(contacts[culprit].label, f"did not {what} within {self._step_s:g} s")

  # ---- what comes back

  def on_frame(self, contact: Contact, frame: pb.Frame) -> None:
    """Take a frame that a stage sent."""
    kind = frame.WhichOneof("body")
    if kind == "outcome":
      self._on_outcome(contact, frame.outcome)
    elif kind == "opened":
      self._on_opened(contact, frame.opened.sequence)
    elif kind == "failure":
      self._on_failure(contact, frame.failure)

  def on_lost(self, contact: Contact) -> None:
    """End every sequence: each needs every stage."""
    for flight in self._flights.values():
      _fail(flight, StageLost(contact.label, contact.lost or ""))

  def _on_opened(self, contact: Contact, sequence: str) -> None:
    flight = self._flights.get(sequence)
    if flight is None:
      return
    index = self._stages.index(contact)
    if index in flight.opened:
      _fail(flight, ProtocolError(contact.label, "it opened the sequence twice"))
      return
    flight.opened.add(index)
    flight.progress_s = time.monotonic()
    if len(flight.opened) == len(self._stages) and flight.outcome and not flight.outcome.done():
      flight.outcome.set_result(None)

  def _on_outcome(self, contact: Contact, outcome: pb.Outcome) -> None:
    flight = self._flights.get(outcome.sequence)
    if flight is None:
      return
    now_s = time.time()
    index = self._stages.index(contact)
    is_last = index == len(self._stages) - 1
    if not flight.done[index] == outcome.index < flight.steps:
      due = (
        f"step {flight.done[index]} is due" if flight.done[index] < flight.steps else "none is due"
      )
      _fail(flight, ProtocolError(contact.label, f"it answered step {outcome.index} where {due}"))
      return
    flight.done[index] = outcome.index + 1
    flight.progress_s = time.monotonic()
    if mark := flight.marks.get(outcome.index):
      mark.outcomes[index] = outcome
      mark.back_s = now_s if is_last else mark.back_s
      if len(mark.outcomes) == len(self._stages):
        self._account(flight.marks.pop(outcome.index))
    if (
      is_last
      and outcome.index == flight.waiting_for
      and flight.outcome
      and not flight.outcome.done()
    ):
      flight.outcome.set_result(outcome)

  def _account(self, mark: _Mark) -> None:
    """Add one step's times, once every stage has reported it."""
    before_s = mark.sent_s
    for index, contact in enumerate(self._stages):
      outcome = mark.outcomes[index]
      contact.timing.steps += 1
      contact.timing.compute_s += outcome.compute_s
      contact.timing.wire_s += outcome.received_s - contact.clock_ahead_s - before_s
      before_s = outcome.finished_s - contact.clock_ahead_s
    self.returned.steps += 1
    self.returned.wire_s += mark.back_s - before_s

  def _on_failure(self, contact: Contact, failure: pb.Failure) -> None:
    flight = self._flights.get(failure.sequence)
    if flight is None:
      return
    index, message = self._stages.index(contact), printable(failure.message)
    if failure.kind == "lost" and index + 1 < len(self._stages):
      # A stage that loses the next one may say so before our own link to that one breaks.
      lost = self._stages[index + 1]
      _fail(flight, StageLost(lost.label, f"{message}, says {contact.name}"))
    else:
      _fail(flight, StageFailed(contact.label, message))


def _fail(flight: _Flight, error: EngineError) -> None:
  flight.failure = flight.failure or error
  if flight.outcome and not flight.outcome.done():
    flight.outcome.set_result(None)
