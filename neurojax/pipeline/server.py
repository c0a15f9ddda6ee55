"""The stage server: holds a span of layers and steps sequences through it."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import logging
import time
import typing
from collections.abc import Callable
from typing import TypeVar

import grpc
import jax
import jax.numpy as jnp
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from neurojax.config import Span
from neurojax.count.serving import Load, stage_bytes
from neurojax.count.working import DeviceKind
from neurojax.files.load import load_span, stored_forms
from neurojax.files.model_file import ModelFile
from neurojax.forms import PREFILL
from neurojax.model.neurollm import NeuroLLM
from neurojax.pipeline import messages
from neurojax.pipeline import pipeline_pb2 as pb
from neurojax.pipeline import pipeline_pb2_grpc as rpc
from neurojax.pipeline.echo import echo
from neurojax.pipeline.onward import HELLO_S, Lost, NextLink, Outlet
from neurojax.stage import programs
from neurojax.stage.compile import CompiledStage
from neurojax.stage.memory import free_memory_bytes
from neurojax.stage.runtime import StageRuntime
from neurojax.wire import tensor
from neurojax.wire.channel import listen, make_server
from neurojax.wire.identity import PACKAGE, disagreement

T = TypeVar("T")
log = logging.getLogger(__name__)

SERVICE = "neurojax.pipeline.v1.Stage"


@dataclasses.dataclass(frozen=True)
class _Loaded:
  """asked: The `programs` of requests that this answers; `identity` has what they became."""

  runtime: StageRuntime
  identity: pb.Identity
  weights: str
  span: Span
  asked: frozenset[str]

  def answers(self, request: pb.LoadRequest, span: Span) -> bool:
    """Whether a request asks for just this."""
    return request.identity.programs in self.asked and self.is_like(request, span)

  def is_like(self, request: pb.LoadRequest, span: Span) -> bool:
    """Whether a request asks for this, by whatever programs."""
    return (
      disagreement(self.identity, request.identity, fields=messages.SAME_FORM) is None
      and (self.weights, self.span) == (request.weights, span)
      and self.runtime.max_sequences == request.max_sequences
    )


@dataclasses.dataclass
class _Sequence:
  owner: Outlet
  next: NextLink | None
  steps: int = 0


class StageServer(rpc.StageServicer):
  """Serves one model file's layers; which ones, `Load` says.

  Args:
    memory_bytes: What weights and caches may take; None takes what the machine has free.
    share: So many servers share the machine: each takes an equal part of what is free.
    stall_s: A step longer than this makes the health service answer NOT_SERVING.
  """

  def __init__(
    self,
    file: ModelFile,
    *,
    name: str,
    memory_bytes: int | None = None,
    share: int = 1,
    stall_s: float = 60.0,
  ):
    self._file, self._name, self._stall_s = file, name, stall_s
    self._memory_bytes, self._share = memory_bytes, share
    self._config = file.config
    self._loaded: _Loaded | None = None
    self._sequences: dict[str, _Sequence] = {}
    self._next_links: dict[str, NextLink] = {}
    # Set, and replaced, when other layers are loaded: what was agreed on every link is void then.
    self._replaced = asyncio.Event()
    self._loading = asyncio.Lock()
    self._connecting = asyncio.Lock()
    self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="neurojax-stage")
    self._busy_since: float | None = None
    self._sha256: asyncio.Future[str] | None = None
    self.health = health.aio.HealthServicer()

  # ---- the server itself

  async def serve(
    self, at: str, *, started: Callable[[str], None], stop: asyncio.Event, grace_s: float = 2.0
  ) -> None:
    """Serve on `at` ("host:port", port 0 takes a free one) until `stop` is set.

    Args:
      started: Called with the address once connections are taken.
    Raises: OSError: the address cannot be had.
    """
    limit = messages.message_limit(self._config, PREFILL)
    server = make_server(limit=limit)
    rpc.add_StageServicer_to_server(self, server)
    health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
    address = listen(server, at)
    await server.start()
    started(address)
    watching = asyncio.create_task(self._watch_health())
    try:
      await stop.wait()
    finally:
      watching.cancel()
      await self.health.enter_graceful_shutdown()
      await server.stop(grace_s)
      self._thread.shutdown(wait=False, cancel_futures=True)

  async def _watch_health(self) -> None:
    while True:
      busy_since = self._busy_since
      stalled = busy_since is not None and time.monotonic() - busy_since > self._stall_s
      serving = self._loaded is not None and not stalled
      state = (
        health_pb2.HealthCheckResponse.SERVING
        if serving
        else health_pb2.HealthCheckResponse.NOT_SERVING
      )
      await self.health.set(SERVICE, state)
      # The server as a whole can be talked to as long as this loop turns, unless it is stuck.
      await self.health.set(
        "",
        health_pb2.HealthCheckResponse.NOT_SERVING
        if stalled
        else health_pb2.HealthCheckResponse.SERVING,
      )
      await asyncio.sleep(0.25)

  async def _do(self, work: Callable[[], T], *, timed: bool = True) -> T:
    """Run in the one thread that touches the device; what comes later waits its turn."""

    def run() -> T:
      self._busy_since = time.monotonic() if timed else None
      try:
        return work()
      finally:
        self._busy_since = None

    return await asyncio.get_running_loop().run_in_executor(self._thread, run)

  # ---- Describe and Load

  async def Describe(
    self, request: pb.DescribeRequest, context: grpc.aio.ServicerContext
  ) -> pb.Description:
    try:
      return await self._describe()
    except ValueError as error:
      await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{self._name}: {error}")

  async def _digest(self) -> str:
    """The model file's, computed once for all who ask; a failure is not remembered."""
    if self._sha256 is None or (self._sha256.done() and self._sha256.exception()):
      self._sha256 = asyncio.ensure_future(asyncio.to_thread(self._file.sha256))
    return await asyncio.shield(self._sha256)

  async def _describe(self) -> pb.Description:
    loaded = self._loaded
    held = 0
    if loaded:
      stage = loaded.runtime.stage
      held = stage.weight_bytes + loaded.runtime.num_sequences * stage.cache_bytes
    free = free_memory_bytes() // self._share + held
    sha256 = await self._digest()
    description = pb.Description(
      name=self._name,
      identity=messages.identity(
        self._config, sha256=sha256, dtype="", context_length=0, programs=""
      ),
      memory_bytes=min(free, self._memory_bytes) if self._memory_bytes else free,
      loaded=loaded is not None,
      open_sequences=len(self._sequences),
      clock_s=time.time(),
      device=str(jax.devices()[0].device_kind),
    )
    if loaded:
      description.identity.CopyFrom(loaded.identity)
      description.first_layer, description.last_layer = (
        loaded.span.first_layer,
        loaded.span.last_layer,
      )
      description.weights = loaded.weights
      description.weight_bytes = loaded.runtime.stage.weight_bytes
      description.cache_bytes = loaded.runtime.stage.cache_bytes
      description.max_sequences = loaded.runtime.max_sequences
    return description

  async def Load(
    self, request: pb.LoadRequest, context: grpc.aio.ServicerContext
  ) -> pb.Description:
    async with self._loading:
      try:
        await self._load(request)
      except _Refused as refusal:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{self._name}: {refusal}")
      except (ValueError, NotImplementedError) as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{self._name}: {error}")
      return await self._describe()

  async def _load(self, request: pb.LoadRequest) -> None:
    wanted = request.identity
    sha256 = await self._digest()
    mine = messages.identity(
      self._config, sha256=sha256, dtype=wanted.dtype, context_length=wanted.context_length
    )
    if difference := disagreement(mine, wanted, fields=messages.SAME_MODEL):
      raise _Refused(f"{difference}: run the same version on the same model file at both ends")
    serving = messages.serving(request)
    span = Span(
      first_layer=request.first_layer, last_layer=request.last_layer, num_layers=wanted.num_layers
    )
    loaded = self._loaded
    if loaded and loaded.answers(request, span):
      return
    if self._sequences:
      raise _Refused(
        f"{len(self._sequences)} sequences are open on layers {loaded.span if loaded else '?'}: "
        "wait until they end, or use another stage server"
      )
    reason = self._why_not_fused(wanted.dtype)
    if wanted.programs == "fused" and reason:
      raise ValueError(f"the fused programs cannot run this model: {reason}")
    asked = {wanted.programs}
    # What one coordinator found out about "auto" holds for the next that asks for it.
    was_auto = loaded and "auto" in loaded.asked and loaded.is_like(request, span)
    if wanted.programs == "model" and (reason or was_auto):
      asked.add("auto")
    # Both references go, so that the memory is free before it is asked for.
    self._loaded = loaded = None
    self._replaced.set()
    self._replaced = asyncio.Event()
    for link in self._next_links.values():
      await link.close()
    self._next_links.clear()
    device: DeviceKind = "cpu" if jax.default_backend() == "cpu" else "cuda"
    needed = stage_bytes(
      self._config, span, Load(serving=serving, forms=stored_forms(self._file)), device
    )
    free = min(free_memory_bytes(), self._memory_bytes or 1 << 62)
    if needed > free:
      raise _Refused(f"layers {span} need {needed:,} bytes here and {free:,} are free")
    self._loaded = await self._do(lambda: self._build(request, span, asked), timed=False)
    kind = self._loaded.identity.programs
    log.info("%s holds layers %s, run by the %r programs", self._name, span, kind)

  def _build(self, request: pb.LoadRequest, span: Span, asked: set[str]) -> _Loaded:
    """Raises: ValueError: the file is no longer what its digest was computed of."""
    model = load_span(
      self._file, span, dtype=jnp.dtype(request.identity.dtype), weights=request.weights
    )
    # Once the weights are read: an overwritten file would be served under the digest of the old one.
    self._file.check_unchanged()
    stage = self._compile(model, request.identity)
    runtime = StageRuntime(stage, max_sequences=request.max_sequences)
    identity = pb.Identity()
    identity.CopyFrom(request.identity)
    identity.programs = stage.programs
    asked = frozenset(asked | {stage.programs})
    return _Loaded(runtime, identity, request.weights, span, asked)

  def _why_not_fused(self, dtype: str) -> str | None:
    return programs.why_not_here(dtype)

  def _compile(self, model: NeuroLLM, wanted: pb.Identity) -> CompiledStage:
    return CompiledStage(
      model,
      context_length=wanted.context_length,
      programs=typing.cast(programs.Wanted, wanted.programs),
    )

  async def Echo(self, request: pb.EchoRequest, context: grpc.aio.ServicerContext) -> pb.EchoReply:
    return await echo(request, context)

  # ---- Link

  async def Link(self, request_iterator: object, context: grpc.aio.ServicerContext) -> None:
    outlet = Outlet(context.write)
    owned: set[str] = set()
    try:
      first = await asyncio.wait_for(context.read(), HELLO_S)
      if first is grpc.aio.EOF:
        return
      replaced = self._replaced
      sender = await self._greet(first, outlet, context)
      while (frame := await _read_unless(replaced, context)) is not grpc.aio.EOF:
        if frame is None:
          await context.abort(
            grpc.StatusCode.FAILED_PRECONDITION, f"{self._name}: other layers were loaded here"
          )
        received_s = time.time()
        kind = frame.WhichOneof("body")
        if kind == "step":
          await self._step(frame.step, sender, outlet, received_s)
        elif kind == "open" and not sender.has_layers:
          await self._open(frame.open, outlet, owned)
        elif kind == "close" and not sender.has_layers:
          owned.discard(frame.close.sequence)
          await self._close(frame.close.sequence)
        else:
          await context.abort(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"{self._name}: a frame {kind or 'without body'} has no place here",
          )
    except TimeoutError:
      await context.abort(
        grpc.StatusCode.DEADLINE_EXCEEDED, f"{self._name}: no Hello within {HELLO_S:g} s"
      )
    finally:
      for sequence in owned:
        # Shielded: a link that breaks cancels this task, the caches must go all the same.
        with contextlib.suppress(asyncio.CancelledError):
          await asyncio.shield(self._close(sequence))

  async def _greet(
    self, frame: pb.Frame, outlet: Outlet, context: grpc.aio.ServicerContext
  ) -> pb.Hello:
    if frame.WhichOneof("body") != "hello":
      await context.abort(
        grpc.StatusCode.INVALID_ARGUMENT, f"{self._name}: the first frame must be a Hello"
      )
    hello, loaded = frame.hello, self._loaded
    problem = None
    version = pb.Identity(protocol=messages.PROTOCOL, package=PACKAGE)
    if difference := disagreement(version, hello.identity, fields=("protocol", "package")):
      problem = difference
    elif loaded is None:
      problem = "no layers are loaded here"
    else:
      fields = (*messages.SAME_FORM, "programs")
      problem = disagreement(loaded.identity, hello.identity, fields=fields)
      mine = (loaded.span.first_layer, loaded.span.last_layer)
      if not problem and mine != (hello.your_first_layer, hello.your_last_layer):
        problem = (
          f"layers are {mine[0]}..{mine[1]} here, the sender expects "
          f"{hello.your_first_layer}..{hello.your_last_layer}"
        )
      if not problem and hello.has_layers and hello.last_layer + 1 != mine[0]:
        problem = f"layers {mine[0]}..{mine[1]} do not follow the sender's {hello.first_layer}..{hello.last_layer}"
    if problem:
      await context.abort(
        grpc.StatusCode.FAILED_PRECONDITION,
        f"{self._name} refuses {hello.name[:80] or 'a peer'}: {problem}",
      )
    answer = pb.Hello(
      identity=loaded.identity,
      name=self._name,
      has_layers=True,
      first_layer=loaded.span.first_layer,
      last_layer=loaded.span.last_layer,
    )
    await outlet.send(pb.Frame(hello=answer))
    return hello

  async def _open(self, message: pb.Open, outlet: Outlet, owned: set[str]) -> None:
    name = message.sequence
    try:
      if not 1 <= len(name) <= 64:
        raise ValueError(f"a sequence name of {len(name)} characters: 1 to 64")
      if name in self._sequences:
        raise ValueError(f"sequence {name!r} is open already")
      loaded = self._require_loaded()
      if loaded.span.is_last == bool(message.next_address):
        raise ValueError("a next address belongs to every stage but the last")
      self._sequences[name] = record = _Sequence(outlet, None)
      owned.add(name)
      if message.next_address:
        record.next = await self._next_link(message, loaded)
      request = messages.sampling_request(message.sampling)
      await self._do(lambda: loaded.runtime.open(name, request))
      if name not in self._sequences:
        await self._do(lambda: loaded.runtime.close(name))
        return
      await outlet.send(pb.Frame(opened=pb.Opened(sequence=name)))
    except Exception as error:
      if name in owned:
        owned.discard(name)
        await self._close(name)
      await outlet.send(self._failure(name, error))

  async def _step(
    self, message: pb.Step, sender: pb.Hello, outlet: Outlet, received_s: float
  ) -> None:
    name = message.sequence
    record = self._sequences.get(name)
    if record is None:
      # Steps already on their way when a sequence is closed end here.
      await outlet.send(self._failure(name[:64], ValueError("the sequence is not open here")))
      return
    try:
      if message.index != record.steps:
        raise ValueError(f"step {message.index} came where step {record.steps} was due")
      record.steps += 1
      loaded = self._require_loaded()
      if sender.has_layers == loaded.span.is_first:
        raise ValueError(f"{sender.name[:80]} has no steps to send to layers {loaded.span}")
      given = messages.step_input(message)
      output = await self._do(lambda: loaded.runtime.step(name, given))
      finished_s = time.time()
      if record.next:
        onward = dataclasses.replace(given, hidden=output.hidden)
        await record.next.send(pb.Frame(step=messages.step(name, message.index, onward)))
      outcome = pb.Outcome(
        sequence=name,
        index=message.index,
        received_s=received_s,
        finished_s=finished_s,
        compute_s=output.compute_s,
      )
      if output.token is not None:
        outcome.sampled, outcome.token, outcome.logprob = True, output.token, output.logprob
      if output.scores is not None:
        outcome.scores.CopyFrom(tensor.encode(output.scores))
      await record.owner.send(pb.Frame(outcome=outcome))
    except Exception as error:
      await self._fail(name, error)

  async def _fail(self, name: str, error: Exception) -> None:
    """End a sequence and tell its owner why."""
    record = self._sequences.get(name)
    if record is None:
      return
    if not isinstance(error, ValueError | FloatingPointError | Lost):
      log.exception("step of sequence %s failed", name, exc_info=error)
    await self._close(name)
    with contextlib.suppress(Exception):
      await record.owner.send(self._failure(name, error))

  async def _close(self, name: str) -> None:
    self._sequences.pop(name, None)
    loaded = self._loaded
    if loaded:
      await self._do(lambda: loaded.runtime.close(name))

  def _failure(self, name: str, error: Exception) -> pb.Frame:
    kind = {ValueError: "invalid", FloatingPointError: "numeric", Lost: "lost"}.get(
      type(error), "internal"
    )
    text = str(error) if kind != "internal" else f"{type(error).__name__}: {error}"
    return pb.Frame(
      failure=pb.Failure(sequence=name, stage=self._name, kind=kind, message=text[:2000])
    )

  def _require_loaded(self) -> _Loaded:
    if self._loaded is None:
      raise ValueError("no layers are loaded here")
    return self._loaded

  # ---- the link to the next stage

  async def _next_link(self, message: pb.Open, loaded: _Loaded) -> NextLink:
    async with self._connecting:
      link = self._next_links.get(message.next_address)
      if link and not link.lost:
        return link
      hello = pb.Hello(
        identity=loaded.identity,
        name=self._name,
        has_layers=True,
        first_layer=loaded.span.first_layer,
        last_layer=loaded.span.last_layer,
        your_first_layer=message.next_first_layer,
        your_last_layer=message.next_last_layer,
      )
      limit = messages.message_limit(self._config, PREFILL)
      link = await NextLink.connect(
        message.next_address, hello, limit=limit, on_lost=self._on_next_lost
      )
      self._next_links[message.next_address] = link
      return link

  async def _on_next_lost(self, link: NextLink) -> None:
    assert link.lost is not None
    for name in [name for name, record in self._sequences.items() if record.next is link]:
      await self._fail(name, Lost(link.lost))


async def _read_unless(
  ended: asyncio.Event, context: grpc.aio.ServicerContext
) -> "pb.Frame | grpc.aio.EOF | None":
  """The next frame, EOF, or None once `ended` is set."""
  reading = asyncio.ensure_future(context.read())
  ending = asyncio.ensure_future(ended.wait())
  try:
    await asyncio.wait((reading, ending), return_when=asyncio.FIRST_COMPLETED)
    return None if ended.is_set() else await reading
  finally:
    reading.cancel()
    ending.cancel()


class _Refused(Exception):
  """A Load that conflicts with what this server is or holds."""
