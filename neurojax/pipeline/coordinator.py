"""The engine whose layers live on stage servers."""

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np

from neurojax.config import ModelConfig, Sampling, Span
from neurojax.count.serving import Load
from neurojax.count.working import DeviceKind
from neurojax.engine.api import EngineError, StageReport
from neurojax.engine.drive import DrivenEngine
from neurojax.pipeline import messages
from neurojax.pipeline import pipeline_pb2 as pb
from neurojax.pipeline.contact import Contact, PipelineOptions, Timing
from neurojax.pipeline.errors import (
  PipelineError,
  StageFailed,
  StageLost,
  StageTimeout,
)
from neurojax.plan.fleet import Fleet
from neurojax.plan.plan import Placement
from neurojax.plan.proportional import as_planned, proportional
from neurojax.stage.step import StepInput, StepOutput
from neurojax.wire import tensor

log = logging.getLogger(__name__)


@dataclasses.dataclass
class _Mark:
  sent_s: float
  outcomes: dict[int, pb.Outcome] = dataclasses.field(default_factory=dict)
  back_s: float = 0.0


@dataclasses.dataclass
class _Flight:
  """A sequence under way.

  done[i] is the number of steps that stage i has finished. marks keeps, per step of the answer,
  when it was sent and what each stage said of it, until all have.
  """

  opened: set[int]
  done: list[int]
  steps: int = 0
  waiting_for: int = -1
  outcome: asyncio.Future[pb.Outcome | None] | None = None
  failure: EngineError | None = None
  progress_s: float = 0.0
  marks: dict[int, "_Mark"] = dataclasses.field(default_factory=dict)


class PipelineEngine(DrivenEngine):
  """Made by `connect`. Use from one event loop."""

  def __init__(self, config: ModelConfig, identity: pb.Identity, options: PipelineOptions):
    self._config, self._identity, self._options = config, identity, options
    self._stages: list[Contact] = []
    self._flights: dict[str, _Flight] = {}
    self._attaching = asyncio.Lock()
    self._return = Timing()
    self.placements: tuple[Placement, ...] = ()

  @classmethod
  async def connect(
    cls,
    config: ModelConfig,
    sha256: str,
    fleet: Fleet,
    options: PipelineOptions,
    *,
    spans: Mapping[str, Span] | None = None,
  ) -> Self:
    """Meet every host, plan, load and link.

    Args:
      sha256: Of the model file; every host must have the same.
      spans: Layers by address, one for each host in the order of the fleet, as `plan.plan_file` has
        them of a plan; in proportion to free memory if None.
    Raises: HandshakeError, StageLost, StageTimeout: naming the host. ValueError: the fleet is too
      small, or the context is longer than the model's.
    """
    serving = options.serving.resolve(config, options.forms)
    options = dataclasses.replace(options, serving=serving)
    assert serving.context is not None
    identity = messages.identity(
      config,
      sha256=sha256,
      dtype=serving.dtype,
      context_length=serving.context,
      programs=serving.programs,
    )
    self = cls(config, identity, options)
    try:
      await self._place(await self._meet_all(fleet), spans)
      await self._load()
      await asyncio.gather(*(stage.link(self._on_frame, self._on_lost) for stage in self._stages))
    except BaseException:
      await self.close()
      raise
    return self

  @property
  def vocab_size(self) -> int:
    return self._config.vocab_size

  @property
  def context_length(self) -> int:
    return self._options.serving.context

  async def reports(self) -> tuple[StageReport, ...]:
    return tuple(
      StageReport(
        host=stage.name,
        address=stage.host.address,
        first_layer=stage.span.first_layer,
        last_layer=stage.span.last_layer,
        weight_bytes=stage.description.weight_bytes,
        cache_bytes=stage.description.cache_bytes,
        decode_steps=stage.timing.steps,
        step_s=stage.timing.mean(stage.timing.compute_s),
        wire_s=stage.timing.mean(stage.timing.wire_s),
      )
      for stage in self._stages
    )

  @property
  def return_s(self) -> float | None:
    """Mean time of a token from the last stage back to here."""
    return self._return.mean(self._return.wire_s)

  async def close(self) -> None:
    for flight in self._flights.values():
      self._fail(flight, EngineError("the pipeline is closed"))
    for stage in self._stages:
      await stage.close()
    self._stages.clear()

  # ---- setting up

  async def _meet_all(self, fleet: Fleet) -> list[Contact]:
    meetings = (
      Contact.meet(host, self._config, self._identity, self._options) for host in fleet.hosts
    )
    met = await asyncio.gather(*meetings, return_exceptions=True)
    contacts = [contact for contact in met if isinstance(contact, Contact)]
    failed = [error for error in met if isinstance(error, BaseException)]
    if failed:
      for contact in contacts:
        await contact.close()
      raise failed[0]
    return contacts

  async def _place(self, met: Sequence[Contact], planned: Mapping[str, Span] | None) -> None:
    free = {
      stage.host.address: min(stage.host.memory_bytes or 1 << 62, stage.description.memory_bytes)
      for stage in met
    }
    load = Load(serving=self._options.serving, forms=self._options.forms)
    kinds: dict[str, DeviceKind] = {
      stage.host.address: "cpu" if stage.description.device == "cpu" else "cuda" for stage in met
    }
    try:
      if planned is None:
        self.placements = proportional(self._config, list(free.items()), load, list(kinds.values()))
      else:
        self.placements = as_planned(self._config, planned, free, load, kinds)
    except ValueError:
      for stage in met:
        await stage.close()
      raise
    spans = {placement.host: placement.span for placement in self.placements}
    for stage in met:
      if stage.host.address in spans:
        stage.span = spans[stage.host.address]
        self._stages.append(stage)
      else:
        log.warning("%s is left out: the plan gives it no layer", stage.host.address)
        await stage.close()

  async def _load(self) -> None:
    """Have all stages load, and run by the same programs: others' activations are not theirs."""
    await asyncio.gather(*(stage.load() for stage in self._stages))
    kinds = {stage.label: stage.description.identity.programs for stage in self._stages}
    # The message that all contacts share: what is loaded again later has to become the same.
    self._identity.programs = "fused" if set(kinds.values()) == {"fused"} else "model"
    fused = [stage for stage in self._stages if kinds[stage.label] != self._identity.programs]
    if fused:
      log.warning(
        "not every stage can run the fused programs, so none does: %s; ask for 'model' to have these"
        " loaded only once",
        ", ".join(f"{label}: {kind}" for label, kind in kinds.items()),
      )
      await asyncio.gather(*(stage.load() for stage in fused))

  async def _relink(self) -> None:
    """Meet again whatever was lost since; a server that was started anew is loaded again."""
    async with self._attaching:
      for index, stage in enumerate(self._stages):
        if stage.lost is None:
          continue
        await stage.close()
        fresh = await Contact.meet(stage.host, self._config, self._identity, self._options)
        fresh.span, fresh.timing = stage.span, stage.timing
        self._stages[index] = fresh
        await fresh.load()
        await fresh.link(self._on_frame, self._on_lost)

  # ---- sequences

  async def _open(self, sequence: str, sampling: Sampling) -> None:
    if not self._stages:
      raise EngineError("the pipeline is closed")
    if any(stage.lost for stage in self._stages):
      await self._relink()
    flight = _Flight(opened=set(), done=[0] * len(self._stages), progress_s=time.monotonic())
    flight.outcome = asyncio.get_running_loop().create_future()
    self._flights[sequence] = flight
    for index, stage in enumerate(self._stages):
      message = pb.Open(sequence=sequence, sampling=messages.sampling(sampling))
      if index + 1 < len(self._stages):
        after = self._stages[index + 1]
        message.next_address = after.host.address
        message.next_first_layer, message.next_last_layer = (
          after.span.first_layer,
          after.span.last_layer,
        )
      await stage.send(pb.Frame(open=message))
    await self._wait(flight)

  async def _step(self, sequence: str, given: StepInput) -> StepOutput | None:
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
    if given.sample != outcome.sampled or (given.targets is not None) != outcome.HasField("scores"):
      raise StageFailed(self._stages[-1].label, "it answered something that was not asked")
    if outcome.sampled and not (outcome.token < self.vocab_size and np.isfinite(outcome.logprob)):
      raise StageFailed(
        self._stages[-1].label,
        f"it answered token {outcome.token}, log-probability {outcome.logprob}",
      )
    try:
      scores = (
        tensor.decode(outcome.scores, what="scores", max_dims=1)
        if outcome.HasField("scores")
        else None
      )
    except ValueError as error:
      raise StageFailed(self._stages[-1].label, str(error)) from error
    if scores is not None and (scores.shape != given.tokens.shape or not np.isfinite(scores).all()):
      raise StageFailed(
        self._stages[-1].label, f"it answered {len(scores)} scores for {len(given.tokens)} tokens"
      )
    sampled = outcome.sampled
    return StepOutput(
      token=outcome.token if sampled else None,
      logprob=outcome.logprob if sampled else None,
      scores=scores,
    )

  async def _close(self, sequence: str) -> None:
    if self._flights.pop(sequence, None) is None:
      return
    frame = pb.Frame(close=pb.Close(sequence=sequence))
    for stage in list(self._stages):
      with contextlib.suppress(PipelineError):
        await stage.send(frame)

  async def _wait(self, flight: _Flight) -> pb.Outcome | None:
    """Wait as long as some stage gets on with the sequence within `step_s`."""
    assert flight.outcome is not None
    while True:
      if flight.failure:
        raise flight.failure
      left_s = flight.progress_s + self._options.step_s - time.monotonic()
      if left_s <= 0:
        raise await self._blame(flight)
      with contextlib.suppress(TimeoutError):
        outcome = await asyncio.wait_for(asyncio.shield(flight.outcome), left_s)
        if flight.failure:
          raise flight.failure
        return outcome

  async def _blame(self, flight: _Flight) -> PipelineError:
    """Which stage hangs: the first one behind that does not even answer a health check."""
    opening = flight.steps == 0
    behind = [
      index
      for index in range(len(self._stages))
      if (index not in flight.opened if opening else flight.done[index] < flight.steps)
    ]
    healthy = await asyncio.gather(*(self._stages[index].is_responsive() for index in behind))
    silent = [index for index, ok in zip(behind, healthy, strict=True) if not ok]
    culprit = self._stages[(silent or behind)[0]]
    what = "open the sequence" if opening else f"finish step {flight.done[(silent or behind)[0]]}"
    return StageTimeout(culprit.label, f"did not {what} within {self._options.step_s:g} s")

  # ---- what comes back

  def _on_frame(self, stage: Contact, frame: pb.Frame) -> None:
    kind = frame.WhichOneof("body")
    if kind == "outcome":
      self._on_outcome(stage, frame.outcome)
    elif kind == "opened":
      self._on_opened(stage, frame.opened.sequence)
    elif kind == "failure":
      self._on_failure(stage, frame.failure)

  def _on_lost(self, stage: Contact) -> None:
    for flight in self._flights.values():
      self._fail(flight, StageLost(stage.label, stage.lost or ""))

  def _on_opened(self, stage: Contact, sequence: str) -> None:
    flight = self._flights.get(sequence)
    if flight is None:
      return
    flight.opened.add(self._stages.index(stage))
    flight.progress_s = time.monotonic()
    if len(flight.opened) == len(self._stages) and flight.outcome and not flight.outcome.done():
      flight.outcome.set_result(None)

  def _on_outcome(self, stage: Contact, outcome: pb.Outcome) -> None:
    flight = self._flights.get(outcome.sequence)
    if flight is None:
      return
    now_s = time.time()
    index = self._stages.index(stage)
    is_last = index == len(self._stages) - 1
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
    for index, stage in enumerate(self._stages):
      outcome = mark.outcomes[index]
      stage.timing.steps += 1
      stage.timing.compute_s += outcome.compute_s
      stage.timing.wire_s += outcome.received_s - stage.clock_ahead_s - before_s
      before_s = outcome.finished_s - stage.clock_ahead_s
    self._return.steps += 1
    self._return.wire_s += mark.back_s - before_s

  def _on_failure(self, stage: Contact, failure: pb.Failure) -> None:
    flight = self._flights.get(failure.sequence)
    if flight is None:
      return
    index = self._stages.index(stage)
    if failure.kind == "lost" and index + 1 < len(self._stages):
      # A stage that loses the next one may say so before our own link to that one breaks.
      lost = self._stages[index + 1]
      self._fail(flight, StageLost(lost.label, f"{failure.message}, says {stage.name}"))
    else:
      self._fail(flight, StageFailed(stage.label, failure.message))

  def _fail(self, flight: _Flight, error: EngineError) -> None:
    flight.failure = flight.failure or error
    if flight.outcome and not flight.outcome.done():
      flight.outcome.set_result(None)
