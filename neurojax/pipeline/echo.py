"""Answers Echo calls, by which other hosts measure the link to this one.

python -m neurojax.pipeline.echo        (answers on loopback until its standard input closes)
"""

import asyncio
import sys

import grpc

from neurojax.pipeline import pipeline_pb2 as pb
from neurojax.pipeline import pipeline_pb2_grpc as rpc
from neurojax.wire.channel import listen, make_server

PAYLOAD = 1 << 16
"""Most bytes in one echo. Any stage server takes messages of this size."""

LIMIT = PAYLOAD + (1 << 10)


async def echo(request: pb.EchoRequest, context: grpc.aio.ServicerContext) -> pb.EchoReply:
  """Answer an Echo call with its own payload."""
  if len(request.payload) > PAYLOAD:
    await context.abort(
      grpc.StatusCode.INVALID_ARGUMENT,
      f"an echo of {len(request.payload)} bytes: {PAYLOAD} at most",
    )
  return pb.EchoReply(payload=request.payload)


class _Echo(rpc.StageServicer):
  async def Echo(self, request: pb.EchoRequest, context: grpc.aio.ServicerContext) -> pb.EchoReply:
    return await echo(request, context)


async def _serve() -> None:
  server = make_server(limit=LIMIT)
  rpc.add_StageServicer_to_server(_Echo(), server)
  address = listen(server, "127.0.0.1:0")
  await server.start()
  print(address, flush=True)
  await asyncio.to_thread(sys.stdin.buffer.read)
  await server.stop(None)


if __name__ == "__main__":
  asyncio.run(_serve())
