"""The coordinator's view of one stage server: it is met, loaded, linked, and perhaps lost."""

import asyncio
import dataclasses
import time
from collections.abc import Callable
from typing import Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from neurojax.config import ModelConfig, Serving, Span
from neurojax.forms import PREFILL, Forms
from neurojax.pipeline import messages
from neurojax.pipeline import pipeline_pb2 as pb
from neurojax.pipeline import pipeline_pb2_grpc as rpc
from neurojax.pipeline.errors import HandshakeError, PipelineError, StageLost, StageTimeout
from neurojax.pipeline.onward import Outlet
from neurojax.plan.fleet import Host
from neurojax.wire.channel import brief, open_channel
from neurojax.wire.identity import disagreement, printable

NAME = "coordinator"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineOptions:
  """Settings of a pipeline: the serving, and how long each answer may take.

  Attributes:
    serving: How the model is held and run, every choice made (`Serving.resolve`). Its programs are
      fused by "auto" if every stage can, see `stage.programs.programs_of`.
    forms: Forms of the file's matrices (`files.kept.stored_forms`), for weights that keep those.
    connect_s: Seconds to wait for each answer in a first contact.
    load_s: Seconds to wait for a stage to read and compile its layers.
    step_s: Longest seconds in which no stage gets on with a sequence that waits.
  """

  serving: Serving
  forms: Forms | None = None
  connect_s: float = 10.0
  load_s: float = 600.0
  step_s: float = 60.0


@dataclasses.dataclass
class Timing:
  """Sums over decode steps.

  Attributes:
    steps: Number of steps.
    compute_s: Seconds of computing.
    wire_s: Seconds between the end of the step before and the arrival.
  """

  steps: int = 0
  compute_s: float = 0.0
  wire_s: float = 0.0

  def mean(self, total_s: float) -> float | None:
    """A sum per step; None before the first step."""
    return total_s / self.steps if self.steps else None


@dataclasses.dataclass(eq=False)
class Contact:
  """One stage server, made by `meet`.

  Attributes:
    host: Name and address, as the fleet has them.
    options: Settings of the pipeline.
    identity: Versions, model and serving that all stages of the pipeline share.
    description: The server's last answer about itself.
    clock_ahead_s: Seconds that the server's clock is ahead of ours, to about half a round trip.
    span: The layers that it is to hold.
    lost: Why nothing can be sent any more; None while it can.
    places: Places for kept blocks that the server grants while the link lasts.
    block: Positions of a kept block there, and the grid on which prompts are cut.
    timing: Times of its decode steps.
  """

  host: Host
  channel: grpc.aio.Channel
  stub: rpc.StageStub
  options: PipelineOptions
  identity: pb.Identity
  description: pb.Description
  clock_ahead_s: float
  span: Span
  lost: str | None = "not linked yet"
  places: int = 0
  block: int = 0
  timing: Timing = dataclasses.field(default_factory=Timing)
  _outlet: Outlet | None = None
  _reader: asyncio.Task[None] | None = None

  @classmethod
  async def meet(
    cls, host: Host, config: ModelConfig, identity: pb.Identity, options: PipelineOptions
  ) -> Self:
    """Ask a server who it is and what time it has.

    Raises:
      StageLost, StageTimeout: no answer.
      HandshakeError: another protocol, package or model.
    """
    limit = messages.message_limit(config, PREFILL)
    address = host.reach()
    channel = open_channel(address, limit=limit)
    stub = rpc.StageStub(channel)
    label = f"{host.name} at {address}" if host.name else address
    best_s, ahead_s = float("inf"), 0.0
    try:
      # The health check says at once whether someone is there; the first description may take as
      # long as the digest of a large file does.
      await _knock(channel, options.connect_s)
      for _ in range(4):
        sent_s = time.time()
        description = await stub.Describe(pb.DescribeRequest(), timeout=options.load_s)
        trip_s = time.time() - sent_s
        # Cristian's algorithm: the shortest round trip bounds the error of the clock's offset best.
        if trip_s < best_s:
          best_s, ahead_s = trip_s, description.clock_s - (sent_s + trip_s / 2)
      # Within half a trip it cannot be told from no offset at all, which hosts in step have.
      ahead_s = 0.0 if abs(ahead_s) <= best_s / 2 else ahead_s
      if difference := disagreement(identity, description.identity, fields=messages.SAME_MODEL):
        raise HandshakeError(
          label,
          f"{NAME} and {printable(description.name, 80)} do not agree: {difference} "
          "(here is the coordinator, there the stage)",
        )
    except grpc.aio.AioRpcError as error:
      await channel.close()
      raise _from_rpc(label, error) from error
    except BaseException:
      await channel.close()
      raise
    whole = Span.whole(config)
    return cls(host, channel, stub, options, identity, description, ahead_s, whole)

  @property
  def name(self) -> str:
    return self.host.name or printable(self.description.name, 80)

  @property
  def label(self) -> str:
    """The name of the stage in errors, with address and layers."""
    where = "" if self.name == self.host.address else f" at {self.host.address}"
    return f"{self.name}{where} (layers {self.span})"

  async def load(self) -> None:
    """Have the server load `span`. Raises: as `meet` does; HandshakeError also if it refuses."""
    request = messages.load_request(self.identity, self.span, self.options.serving)
    try:
      self.description = await self.stub.Load(request, timeout=self.options.load_s)
    except grpc.aio.AioRpcError as error:
      raise _from_rpc(self.label, error) from error

  async def link(
    self, on_frame: Callable[[Self, pb.Frame], None], on_lost: Callable[[Self], None]
  ) -> None:
    """Open the stream that carries sequences. Raises: as `load` does.

    Args:
      on_frame: Called with every frame that comes.
      on_lost: Called once, when the stream has ended; `lost` says why.
    """
    call = self.stub.Link()
    hello = pb.Hello(
      identity=self.identity,
      name=NAME,
      your_first_layer=self.span.first_layer,
      your_last_layer=self.span.last_layer,
      places=self.options.serving.places,
    )
    try:
      await asyncio.wait_for(call.write(pb.Frame(hello=hello)), self.options.connect_s)
      answer = await asyncio.wait_for(call.read(), self.options.connect_s)
    except grpc.aio.AioRpcError as error:
      raise _from_rpc(self.label, error) from error
    except TimeoutError as error:
      raise StageTimeout(self.label, f"no Hello within {self.options.connect_s:g} s") from error
    except asyncio.InvalidStateError:
      answer = grpc.aio.EOF
    if answer is grpc.aio.EOF:
      raise HandshakeError(self.label, f"it refused the link: {printable(await call.details())}")
    if answer.WhichOneof("body") != "hello" or not 1 <= answer.hello.block <= PREFILL:
      raise HandshakeError(
        self.label, f"its Hello names blocks of {answer.hello.block}: 1 to {PREFILL}"
      )
    self.places = min(answer.hello.places, self.options.serving.places)
    self.block = answer.hello.block
    self._outlet, self.lost = Outlet(call.write, limit_s=self.options.step_s), None
    self._reader = asyncio.create_task(self._read(call, on_frame, on_lost))

  async def send(self, frame: pb.Frame) -> None:
    """Send a frame.

    Raises: StageLost: the stream has ended. StageTimeout: the server takes nothing for `step_s`.
    """
    if self.lost is not None or self._outlet is None:
      raise StageLost(self.label, self.lost or "not linked")
    try:
      await self._outlet.send(frame)
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
      raise StageLost(self.label, f"connection lost ({brief(error)})") from error
    except TimeoutError as error:
      raise StageTimeout(self.label, f"took no frame within {self.options.step_s:g} s") from error

  async def is_responsive(self) -> bool:
    """Ask the server's health service; true if it answers within 2 s that it serves."""
    stub = health_pb2_grpc.HealthStub(self.channel)
    try:
      answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=2.0)
    except grpc.aio.AioRpcError:
      return False
    return answer.status == health_pb2.HealthCheckResponse.SERVING

  async def close(self) -> None:
    self.lost = self.lost or "closed"
    if self._reader:
      self._reader.cancel()
    await self.channel.close()

  async def _read(
    self,
    call: grpc.aio.StreamStreamCall,
    on_frame: Callable[[Self, pb.Frame], None],
    on_lost: Callable[[Self], None],
  ) -> None:
    reason = "it ended the link"
    try:
      while (frame := await call.read()) is not grpc.aio.EOF:
        on_frame(self, frame)
      said = printable(await call.details() or "")
      reason = f"it ended the link: {said or (await call.code()).name}"
    except grpc.aio.AioRpcError as error:
      reason = brief(error)
    except asyncio.CancelledError:
      if self.lost:
        return
      reason = "the call was cancelled"
    self.lost = f"connection lost ({reason})"
    on_lost(self)


async def _knock(channel: grpc.aio.Channel, limit_s: float) -> None:
  """Find out whether anyone is there, by a health check.

  Any answer will do, even that there is no health service.
  """
  try:
    await health_pb2_grpc.HealthStub(channel).Check(
      health_pb2.HealthCheckRequest(), timeout=limit_s
    )
  except grpc.aio.AioRpcError as error:
    if error.code() != grpc.StatusCode.UNIMPLEMENTED:
      raise


def _from_rpc(label: str, error: grpc.aio.AioRpcError) -> PipelineError:
  code, said = error.code(), printable(error.details() or "")
  if code == grpc.StatusCode.DEADLINE_EXCEEDED:
    return StageTimeout(label, f"no answer in time ({said})")
  if code == grpc.StatusCode.UNAVAILABLE:
    return StageLost(label, f"cannot be reached ({said})")
  return HandshakeError(label, said or code.name)
