"""The link from a stage to the next one."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Self

import grpc

from neurojax.pipeline import pipeline_pb2 as pb
from neurojax.pipeline import pipeline_pb2_grpc as rpc
from neurojax.wire.channel import brief, open_channel
from neurojax.wire.identity import printable

HELLO_S = 10.0
"""Seconds that either end of a new link waits for the other's Hello."""

_WRITE_S = 600.0
"""Bound on the seconds of one write. A stage that computes takes no frames meanwhile; the coordinator,
which knows how long a step may take, gives up first."""


class Lost(Exception):
  """The next stage cannot be reached; the message says which and why."""


class Outlet:
  """Writes to a link, one frame at a time, each within a deadline.

  Each write is a task of its own. gRPC ends the whole call when a task is cancelled inside a write,
  and the sender's task is cancelled whenever someone gives up one of the sequences on the link.

  Args:
    write: Writes one frame to the call.
    limit_s: Seconds that a write may take.
  """

  def __init__(self, write: Callable[[pb.Frame], Awaitable[None]], *, limit_s: float = _WRITE_S):
    self._write, self._limit_s, self._lock = write, limit_s, asyncio.Lock()

  async def send(self, frame: pb.Frame) -> None:
    """Write a frame. Raises: TimeoutError, and what the call's write raises."""
    writing = asyncio.ensure_future(self._one(frame))
    # If the sender goes, nobody is left to hear of a failure; the reader of the link will.
    writing.add_done_callback(lambda task: task.cancelled() or task.exception())
    await asyncio.shield(writing)

  async def _one(self, frame: pb.Frame) -> None:
    async with self._lock:
      await asyncio.wait_for(self._write(frame), self._limit_s)


class NextLink:
  """Carries steps to the next stage until the link is lost; made by `connect`.

  Attributes:
    address: Address of the next stage.
    lost: Why nothing can be sent any more; None while it can.
  """

  def __init__(self, address: str, channel: grpc.aio.Channel, call: grpc.aio.StreamStreamCall):
    self.address, self.lost = address, None
    self._channel, self._call, self._outlet = channel, call, Outlet(call.write)
    self._reader: asyncio.Task[None] | None = None

  @classmethod
  async def connect(
    cls, address: str, hello: pb.Hello, *, limit: int, on_lost: Callable[[Self], Awaitable[None]]
  ) -> Self:
    """Greet the stage at `address`.

    Args:
      hello: The greeting.
      limit: Bytes of the largest frame.
      on_lost: Awaited once, when the link has ended.
    Raises: Lost: the stage cannot be reached, does not answer in time, or refuses.
    """
    channel = open_channel(address, limit=limit)
    try:
      call = rpc.StageStub(channel).Link()
      await asyncio.wait_for(call.write(pb.Frame(hello=hello)), HELLO_S)
      answer = await asyncio.wait_for(call.read(), HELLO_S)
      if answer is grpc.aio.EOF:
        raise Lost(f"the stage at {address} refuses the link: {printable(await call.details())}")
    except (grpc.RpcError, asyncio.InvalidStateError, TimeoutError) as error:
      await channel.close()
      raise Lost(f"no link to the stage at {address}: {brief(error)}") from error
    except BaseException:
      await channel.close()
      raise
    link = cls(address, channel, call)
    link._reader = asyncio.create_task(link._read(on_lost))
    return link

  async def send(self, frame: pb.Frame) -> None:
    """Send a frame. Raises: Lost: the link is lost, perhaps just now."""
    if self.lost:
      raise Lost(self.lost)
    try:
      await self._outlet.send(frame)
    except (grpc.RpcError, asyncio.InvalidStateError, TimeoutError) as error:
      reason = brief(error)
      raise Lost(f"the stage at {self.address} takes no more frames ({reason})") from error

  async def close(self) -> None:
    self.lost = self.lost or f"the link to the stage at {self.address} was closed here"
    if self._reader:
      self._reader.cancel()
    await self._channel.close()

  async def _read(self, on_lost: Callable[[Self], Awaitable[None]]) -> None:
    """Wait for the end of the stream.

    The next stage also sends refusals of single steps; their owner hears of those from it directly.
    """
    reason = "it ended the link"
    try:
      while await self._call.read() is not grpc.aio.EOF:
        pass
    except grpc.RpcError as error:
      reason = brief(error)
    except asyncio.CancelledError:
      if self.lost:
        return
      reason = "the call was cancelled"
    self.lost = f"the stage at {self.address} is gone: {reason}"
    await on_lost(self)
    await self._channel.close()
