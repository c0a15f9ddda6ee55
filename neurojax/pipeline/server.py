"""The stage server: the gRPC methods of one host's span of layers."""

import asyncio
import contextlib
import time
from collections.abc import Callable

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from neurojax.files.model_file import ModelFile
from neurojax.forms import PREFILL
from neurojax.pipeline import messages
from neurojax.pipeline import pipeline_pb2 as pb
from neurojax.pipeline import pipeline_pb2_grpc as rpc
from neurojax.pipeline.device import DeviceThread
from neurojax.pipeline.echo import echo
from neurojax.pipeline.loading import Loader, Refused
from neurojax.pipeline.onward import HELLO_S, Outlet
from neurojax.pipeline.sequences import Sequences
from neurojax.wire.channel import listen, make_server
from neurojax.wire.identity import PACKAGE, disagreement, printable

SERVICE = "neurojax.pipeline.v1.Stage"


class StageServer(rpc.StageServicer):
  """Serves layers of one model file. The coordinator's `Load` says which.

  Args:
    name: Name of the server in errors and tables.
    memory_bytes: Bytes that weights, caches and working memory may take; None takes what is free.
    share: Number of servers that share the machine: each offers an equal part of what is free.
    stall_s: Seconds after which a step makes the health service answer NOT_SERVING.
  """

  loader_type = Loader

  def __init__(
    self,
    file: ModelFile,
    *,
    name: str,
    memory_bytes: int | None = None,
    share: int = 1,
    stall_s: float = 60.0,
  ):
    self._name, self._stall_s = name, stall_s
    self._limit = messages.message_limit(file.config, PREFILL)
    self._thread = DeviceThread()
    self._loader = self.loader_type(
      file, self._thread, name=name, memory_bytes=memory_bytes, share=share
    )
    self._sequences = Sequences(self._loader, self._thread, name=name, limit=self._limit)
    self._loading = asyncio.Lock()
    self.health = health.aio.HealthServicer()

  async def serve(
    self, at: str, *, started: Callable[[str], None], stop: asyncio.Event, grace_s: float = 2.0
  ) -> None:
    """Serve until `stop` is set.

    Args:
      at: "host:port"; port 0 takes a free one.
      started: Called with the address once connections are taken.
      grace_s: Seconds that calls under way get to end after `stop`.
    Raises: OSError: the address cannot be had.
    """
    server = make_server(limit=self._limit)
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
      self._thread.end()

  async def _watch_health(self) -> None:
    status = health_pb2.HealthCheckResponse
    while True:
      busy_since_s = self._thread.busy_since_s
      stalled = busy_since_s is not None and time.monotonic() - busy_since_s > self._stall_s
      serves = self._loader.loaded is not None and not stalled
      await self.health.set(SERVICE, status.SERVING if serves else status.NOT_SERVING)
      # The server as a whole can be talked to as long as this loop turns, unless it is stuck.
      await self.health.set("", status.NOT_SERVING if stalled else status.SERVING)
      await asyncio.sleep(0.25)

  # ---- what a stage is and holds

  async def Describe(
    self, request: pb.DescribeRequest, context: grpc.aio.ServicerContext
  ) -> pb.Description:
    try:
      return await self._loader.describe(open_sequences=len(self._sequences))
    except ValueError as error:
      await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{self._name}: {error}")

  async def Load(
    self, request: pb.LoadRequest, context: grpc.aio.ServicerContext
  ) -> pb.Description:
    async with self._loading:
      try:
        await self._load(request)
      except Refused as refusal:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{self._name}: {refusal}")
      except (ValueError, NotImplementedError) as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{self._name}: {error}")
      return await self._loader.describe(open_sequences=len(self._sequences))

  async def _load(self, request: pb.LoadRequest) -> None:
    wish = await self._loader.check(request)
    if wish is None:
      return
    # From here to the drop nothing waits: no sequence can open in between.
    if len(self._sequences):
      loaded = self._loader.loaded
      raise Refused(
        f"{len(self._sequences)} sequences are open on layers {loaded.span if loaded else '?'}: "
        "wait until they end, or use another stage server"
      )
    self._loader.drop()
    await self._sequences.unlink()
    await self._loader.load(wish)

  async def Echo(self, request: pb.EchoRequest, context: grpc.aio.ServicerContext) -> pb.EchoReply:
    return await echo(request, context)

  # ---- links

  async def Link(self, request_iterator: object, context: grpc.aio.ServicerContext) -> None:
    outlet = Outlet(context.write)
    try:
      first = await asyncio.wait_for(context.read(), HELLO_S)
      if first is grpc.aio.EOF:
        return
      replaced = self._loader.replaced
      sender = await self._greet(first, outlet, context)
      while (frame := await _read_unless(replaced, context)) is not grpc.aio.EOF:
        if frame is None:
          await context.abort(
            grpc.StatusCode.FAILED_PRECONDITION, f"{self._name}: other layers were loaded here"
          )
        received_s = time.time()
        kind = frame.WhichOneof("body")
        if kind == "step":
          await self._sequences.step(frame.step, sender, outlet, received_s)
        elif kind == "open" and not sender.has_layers:
          await self._sequences.open(frame.open, outlet)
        elif kind == "close" and not sender.has_layers:
          await self._sequences.close(frame.close.sequence, outlet)
        else:
          await context.abort(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"{self._name}: a frame {kind or 'without body'} has no place here",
          )
    except TimeoutError:
      await context.abort(
        grpc.StatusCode.DEADLINE_EXCEEDED, f"{self._name}: no Hello within {HELLO_S:g} s"
      )
    except ValueError as error:
      await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{self._name}: {error}")
    finally:
      # Shielded: a link that breaks cancels this task, the caches must go all the same.
      with contextlib.suppress(asyncio.CancelledError):
        await asyncio.shield(self._sequences.leave(outlet))

  async def _greet(
    self, frame: pb.Frame, outlet: Outlet, context: grpc.aio.ServicerContext
  ) -> pb.Hello:
    """Answer a Hello with our own, or end the call with the reason why it does not fit."""
    if frame.WhichOneof("body") != "hello":
      await context.abort(
        grpc.StatusCode.INVALID_ARGUMENT, f"{self._name}: the first frame must be a Hello"
      )
    hello, loaded = frame.hello, self._loader.loaded
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
        f"{self._name} refuses {printable(hello.name, 80) or 'a peer'}: {problem}",
      )
    assert loaded is not None
    answer = loaded.hello(self._name)
    if hello.places and not hello.has_layers:
      answer.places = self._sequences.places.ask(outlet, loaded.runtime.stage.places)
    await outlet.send(pb.Frame(hello=answer))
    return hello


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
