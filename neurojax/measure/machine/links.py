"""Measures the link between two hosts: round trips and bandwidth of Echo calls."""

import asyncio
import contextlib
import dataclasses
import itertools
import statistics
import sys
import time

from neurojax.pipeline import pipeline_pb2 as pb
from neurojax.pipeline import pipeline_pb2_grpc as rpc
from neurojax.pipeline.echo import LIMIT, PAYLOAD
from neurojax.pipeline.errors import StageLost
from neurojax.plan.fleet import check_address
from neurojax.wire.channel import CallError, brief, open_channel
from neurojax.wire.identity import printable

_IN_FLIGHT = 16
_WARM, _IDLE_S = 20, 0.005


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
  """Attributes:
  latency_s: Half the median round trip of an empty message through gRPC, both ends idle before, as
    they are while a stage computes.
  bytes_per_s: One way, while as much comes back, with several messages of `PAYLOAD` on their way.
  """

  latency_s: float
  bytes_per_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
  """A stage server and the link to it.

  Attributes:
    name: Name that the server gives itself.
    address: Its host:port.
    device: Name of its device.
    memory_bytes: Bytes that weights and caches may take there.
    link: The measured link.
  """

  name: str
  address: str
  device: str
  memory_bytes: int
  link: Measured


async def meet(address: str, *, limit_s: float = 10.0, seconds: float = 1.0) -> Peer:
  """Measure the link to a running stage server.

  Args:
    limit_s: Longest wait for an answer.
    seconds: Time for round trips, and as long again for bandwidth.
  Raises: StageLost: no stage server answers there, or one that is too old. ValueError: the address
    is none.
  """
  check_address(address)
  async with open_channel(address, limit=LIMIT) as channel:
    stub = rpc.StageStub(channel)
    try:
      measured = await _measure(stub, limit_s, seconds)
      # The first description of a large model file takes as long as its digest.
      description = await stub.Describe(pb.DescribeRequest(), timeout=60 * limit_s)
    except CallError as error:
      raise _explained(address, error) from error
  return Peer(
    name=printable(description.name, 80),
    address=address,
    device=printable(description.device, 80),
    memory_bytes=description.memory_bytes,
    link=measured,
  )


async def loopback(*, seconds: float = 1.0) -> Measured:
  """Measure the link between two processes on this host.

  Raises: StageLost: the other process does not answer.
  """
  other = await asyncio.create_subprocess_exec(
    sys.executable,
    "-m",
    "neurojax.pipeline.echo",
    stdin=asyncio.subprocess.PIPE,
    stdout=asyncio.subprocess.PIPE,
  )
  assert other.stdin is not None and other.stdout is not None
  try:
    address = (await asyncio.wait_for(other.stdout.readline(), 60)).decode().strip()
    async with open_channel(address, limit=LIMIT) as channel:
      return await _measure(rpc.StageStub(channel), 10.0, seconds)
  except CallError as error:
    raise _explained("on loopback", error) from error
  finally:
    other.stdin.close()
    with contextlib.suppress(TimeoutError):
      await asyncio.wait_for(other.wait(), 5)
    if other.returncode is None:
      other.kill()
      await other.wait()


async def _measure(stub: rpc.StageStub, limit_s: float, seconds: float) -> Measured:
  async def trip(size: int) -> float:
    began_s = time.perf_counter()
    reply = await stub.Echo(pb.EchoRequest(payload=bytes(size)), timeout=limit_s)
    if len(reply.payload) != size:
      raise ValueError(f"an echo of {size} bytes came back as {len(reply.payload)}")
    return time.perf_counter() - began_s

  for _ in range(_WARM):
    await trip(0)
  end_s = time.perf_counter() + seconds
  trips = [await trip(0)]
  while time.perf_counter() < end_s:
    await asyncio.sleep(_IDLE_S)
    trips.append(await trip(0))

  began_s = time.perf_counter()
  sent = itertools.count(1)
  last = 0

  async def stream() -> None:
    nonlocal last
    while time.perf_counter() - began_s < seconds:
      last = max(last, next(sent))
      await trip(PAYLOAD)

  await asyncio.gather(*(stream() for _ in range(_IN_FLIGHT)))
  bytes_per_s = last * PAYLOAD / (time.perf_counter() - began_s)
  return Measured(latency_s=statistics.median(trips) / 2, bytes_per_s=bytes_per_s)


def _explained(address: str, error: CallError) -> StageLost:
  if error.code().name == "UNIMPLEMENTED":
    return StageLost(address, "it does not answer Echo: run this version of `neurojax stage` there")
  return StageLost(
    address, f"cannot be reached ({brief(error)}): is `neurojax stage` running there?"
  )
