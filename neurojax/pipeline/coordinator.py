"""The engine whose layers live on stage servers."""

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Self

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from neurojax.config import ModelConfig, Sampling, Span
from neurojax.engine.api import EngineError, StageReport
from neurojax.engine.drive import PREFILL_CHUNK, DrivenEngine
from neurojax.pipeline import pipeline_pb2 as pb
from neurojax.pipeline import pipeline_pb2_grpc as rpc
from neurojax.pipeline import wire
from neurojax.pipeline.errors import (
  HandshakeError,
  PipelineError,
  StageFailed,
  StageLost,
  StageTimeout,
)
from neurojax.scaling import count, plan
from neurojax.scaling.count import Weights
from neurojax.scaling.fleet import Fleet, Host
from neurojax.stage.step import StepInput, StepOutput

log = logging.getLogger(__name__)

NAME = "coordinator"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineOptions:
  """How a pipeline is set up and how patient it is.

  Attributes:
    connect_s: For each answer to a first contact.
    load_s: For a stage to read and compile its layers.
    step_s: Longest time in which no stage finishes any step of a sequence that waits.
  """

  dtype: str = "float32"
  weights: Weights = "dense"
  context_length: int = 2048
  max_sequences: int = 4
  connect_s: float = 10.0
  load_s: float = 600.0
  step_s: float = 60.0


@dataclasses.dataclass
class _Timing:
  steps: int = 0
  compute_s: float = 0.0
  wire_s: float = 0.0


@dataclasses.dataclass
class _Stage:
  """One stage server as the coordinator sees it."""

  host: Host
  stub: rpc.StageStub
  channel: grpc.aio.Channel
  description: pb.Description
  clock_ahead_s: float
  span: Span
  call: grpc.aio.StreamStreamCall | None = None
  reader: asyncio.Task[None] | None = None
  lost: str | None = None
  lock: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)
  timing: _Timing = dataclasses.field(default_factory=_Timing)

  @property
  def label(self) -> str:
    name = self.host.name or self.description.name
    where = "" if name == self.host.address else f" at {self.host.address}"
    return f"{name}{where} (layers {self.span})"


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
  failure: PipelineError | None = None
  progress_s: float = 0.0
  marks: dict[int, "_Mark"] = dataclasses.field(default_factory=dict)


class PipelineEngine(DrivenEngine):
  """Made by `connect`. Use from one event loop."""

  def __init__(self, config: ModelConfig, identity: pb.Identity, options: PipelineOptions):
    self._config, self._identity, self._options = config, identity, options
    self._stages: list[_Stage] = []
    self._flights: dict[str, _Flight] = {}
    self._attaching = asyncio.Lock()
    self._return = _Timing()
    self.placements: tuple[plan.Placement, ...] = ()

  @classmethod
  async def connect(
    cls,
    config: ModelConfig,
    sha256: str,
    fleet: Fleet,
    options: PipelineOptions = PipelineOptions(),
  ) -> Self:
    """Meet every host, plan, load and link.

    Args:
      sha256: Of the model file; every host must have the same.
    Raises: HandshakeError, StageLost, StageTimeout: naming the host. ValueError: the fleet is too
      small, or the context is longer than the model's.
    """
    if options.context_length > config.context_length:
      raise ValueError(
        f"context_length = {options.context_length}: the model was made for {config.context_length} positions"
      )
    identity = wire.identity(
      config, sha256=sha256, dtype=options.dtype, context_length=options.context_length
    )
    self = cls(config, identity, options)
    try:
      met = await asyncio.gather(*(self._meet(host) for host in fleet.hosts))
      await self._place(met)
      await asyncio.gather(*(self._load(stage) for stage in self._stages))
      await asyncio.gather(*(self._link(stage) for stage in self._stages))
    except BaseException:
      await self.close()
      raise
    return self

  @property
  def vocab_size(self) -> int:
    return self._config.vocab_size

  @property
  def context_length(self) -> int:
    return self._options.context_length

  async def reports(self) -> tuple[StageReport, ...]:
    return tuple(
      StageReport(
        host=stage.host.name or stage.description.name,
        address=stage.host.address,
        first_layer=stage.span.first_layer,
        last_layer=stage.span.last_layer,
        weight_bytes=stage.description.weight_bytes,
        cache_bytes=stage.description.cache_bytes,
        decode_steps=stage.timing.steps,
        step_s=stage.timing.compute_s / stage.timing.steps if stage.timing.steps else None,
        wire_s=stage.timing.wire_s / stage.timing.steps if stage.timing.steps else None,
      )
      for stage in self._stages
    )

  @property
  def return_s(self) -> float | None:
    """Mean time of a token from the last stage back to here."""
    return self._return.wire_s / self._return.steps if self._return.steps else None

  async def close(self) -> None:
    for stage in self._stages:
      if stage.reader:
        stage.reader.cancel()
      await stage.channel.close()
    self._stages.clear()

  # ---- setting up

  async def _meet(self, host: Host) -> _Stage:
    limit = wire.message_limit(self._config, PREFILL_CHUNK)
    channel = grpc.aio.insecure_channel(host.address, options=wire.channel_options(limit))
    stub = rpc.StageStub(channel)
    label = f"{host.name} at {host.address}" if host.name else host.address
    best_s, ahead_s = float("inf"), 0.0
    try:
      for _ in range(4):
        sent_s = time.time()
        description = await stub.Describe(pb.DescribeRequest(), timeout=self._options.connect_s)
        trip_s = time.time() - sent_s
        # Cristian's algorithm: the shortest round trip bounds the error of the clock's offset best.
        if trip_s < best_s:
          best_s, ahead_s = trip_s, description.clock_s - (sent_s + trip_s / 2)
      # Within half a trip it cannot be told from no offset at all, which hosts in step have.
      ahead_s = 0.0 if abs(ahead_s) <= best_s / 2 else ahead_s
    except grpc.aio.AioRpcError as error:
      await channel.close()
      raise _from_rpc(label, error) from error
    if difference := wire.disagreement(
      self._identity, description.identity, fields=wire.SAME_MODEL
    ):
      await channel.close()
      raise HandshakeError(
        label,
        f"{NAME} and {description.name} do not agree: {difference} "
        "(here is the coordinator, there the stage)",
      )
    whole = Span.whole(self._config)
    return _Stage(host, stub, channel, description, ahead_s, whole)

  async def _place(self, met: Sequence[_Stage]) -> None:
    free = {
      stage.host.address: min(stage.host.memory_bytes or 1 << 62, stage.description.memory_bytes)
      for stage in met
    }
    load = plan.Load(
      dtype=self._options.dtype,
      weights=self._options.weights,
      capacity=count.capacity_for(self._options.context_length),
      max_sequences=self._options.max_sequences,
    )
    try:
      self.placements = plan.proportional(self._config, list(free.items()), load)
    except ValueError:
      for stage in met:
        await stage.channel.close()
      raise
    spans = {placement.host: placement.span for placement in self.placements}
    for stage in met:
      if stage.host.address in spans:
        stage.span = spans[stage.host.address]
        self._stages.append(stage)
      else:
        log.warning("%s is left out: the plan gives it no layer", stage.host.address)
        await stage.channel.close()

  async def _load(self, stage: _Stage) -> None:
    request = pb.LoadRequest(
      identity=self._identity,
      first_layer=stage.span.first_layer,
      last_layer=stage.span.last_layer,
      weights=self._options.weights,
      max_sequences=self._options.max_sequences,
    )
    try:
      stage.description = await stage.stub.Load(request, timeout=self._options.load_s)
    except grpc.aio.AioRpcError as error:
      raise _from_rpc(stage.label, error) from error

  async def _link(self, stage: _Stage) -> None:
    call = stage.stub.Link()
    hello = pb.Hello(
      identity=self._identity,
      name=NAME,
      your_first_layer=stage.span.first_layer,
      your_last_layer=stage.span.last_layer,
    )
    try:
      await asyncio.wait_for(call.write(pb.Frame(hello=hello)), self._options.connect_s)
      answer = await asyncio.wait_for(call.read(), self._options.connect_s)
    except grpc.aio.AioRpcError as error:
      raise _from_rpc(stage.label, error) from error
    except TimeoutError as error:
      raise StageTimeout(stage.label, f"no Hello within {self._options.connect_s:g} s") from error
    except asyncio.InvalidStateError:
      answer = grpc.aio.EOF
    if answer is grpc.aio.EOF:
      raise HandshakeError(stage.label, f"it refused the link: {await call.details()}")
    stage.call, stage.lost = call, None
    stage.reader = asyncio.create_task(self._read(stage, call))

  async def _relink(self) -> None:
    """Meet again whatever was lost since; a server that was started anew is loaded again."""
    async with self._attaching:
      for index, stage in enumerate(self._stages):
        if stage.lost is None:
          continue
        await stage.channel.close()
        fresh = await self._meet(stage.host)
        fresh.span, fresh.timing, fresh.lost = stage.span, stage.timing, stage.lost
        self._stages[index] = fresh
        await self._load(fresh)
        await self._link(fresh)

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
      message = pb.Open(sequence=sequence, sampling=wire.sampling(sampling))
      if index + 1 < len(self._stages):
        after = self._stages[index + 1]
        message.next_address = after.host.address
        message.next_first_layer, message.next_last_layer = (
          after.span.first_layer,
          after.span.last_layer,
        )
      await self._send(stage, pb.Frame(open=message))
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
    await self._send(self._stages[0], pb.Frame(step=wire.step(sequence, index, given)))
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
        wire.array(outcome.scores, what="scores", max_dims=1)
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
    for stage in self._stages:
      with contextlib.suppress(PipelineError):
        await self._send(stage, frame)

  async def _send(self, stage: _Stage, frame: pb.Frame) -> None:
    if stage.lost or stage.call is None:
      raise StageLost(stage.label, stage.lost or "not linked")
    try:
      async with stage.lock:
        await asyncio.wait_for(stage.call.write(frame), self._options.step_s)
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
      self._lose(stage, _brief(error))
      raise StageLost(stage.label, stage.lost or "") from error
    except TimeoutError as error:
      raise StageTimeout(stage.label, f"took no frame within {self._options.step_s:g} s") from error

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
    healthy = await asyncio.gather(*(self._is_responsive(self._stages[index]) for index in behind))
    silent = [index for index, ok in zip(behind, healthy, strict=True) if not ok]
    culprit = self._stages[(silent or behind)[0]]
    what = "open the sequence" if opening else f"finish step {flight.done[(silent or behind)[0]]}"
    return StageTimeout(culprit.label, f"did not {what} within {self._options.step_s:g} s")

  async def _is_responsive(self, stage: _Stage) -> bool:
    stub = health_pb2_grpc.HealthStub(stage.channel)
    try:
      answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=2.0)
    except grpc.aio.AioRpcError:
      return False
    return answer.status == health_pb2.HealthCheckResponse.SERVING

  # ---- what comes back

  async def _read(self, stage: _Stage, call: grpc.aio.StreamStreamCall) -> None:
    reason = "it ended the link"
    try:
      while (frame := await call.read()) is not grpc.aio.EOF:
        kind = frame.WhichOneof("body")
        if kind == "outcome":
          self._on_outcome(stage, frame.outcome)
        elif kind == "opened":
          self._on_opened(stage, frame.opened.sequence)
        elif kind == "failure":
          self._on_failure(stage, frame.failure)
      reason = f"it ended the link: {await call.details() or (await call.code()).name}"
    except grpc.aio.AioRpcError as error:
      reason = _brief(error)
    except asyncio.CancelledError:
      return
    self._lose(stage, reason)

  def _on_opened(self, stage: _Stage, sequence: str) -> None:
    flight = self._flights.get(sequence)
    if flight is None:
      return
    flight.opened.add(self._stages.index(stage))
    flight.progress_s = time.monotonic()
    if len(flight.opened) == len(self._stages) and flight.outcome and not flight.outcome.done():
      flight.outcome.set_result(None)

  def _on_outcome(self, stage: _Stage, outcome: pb.Outcome) -> None:
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

  def _on_failure(self, stage: _Stage, failure: pb.Failure) -> None:
    flight = self._flights.get(failure.sequence)
    if flight is None:
      return
    make = StageLost if failure.kind == "lost" else StageFailed
    self._fail(flight, make(stage.label, failure.message))

  def _lose(self, stage: _Stage, reason: str) -> None:
    if stage.lost is None:
      stage.lost = f"connection lost ({reason})"
      for flight in self._flights.values():
        self._fail(flight, StageLost(stage.label, stage.lost))

  def _fail(self, flight: _Flight, error: PipelineError) -> None:
    flight.failure = flight.failure or error
    if flight.outcome and not flight.outcome.done():
      flight.outcome.set_result(None)


def _brief(error: BaseException) -> str:
  if isinstance(error, grpc.aio.AioRpcError):
    return f"{error.code().name}: {error.details()}"
  return str(error) or type(error).__name__


def _from_rpc(label: str, error: grpc.aio.AioRpcError) -> PipelineError:
  code = error.code()
  if code == grpc.StatusCode.DEADLINE_EXCEEDED:
    return StageTimeout(label, f"no answer in time ({error.details()})")
  if code == grpc.StatusCode.UNAVAILABLE:
    return StageLost(label, f"cannot be reached ({error.details()})")
  return HandshakeError(label, error.details() or code.name)
