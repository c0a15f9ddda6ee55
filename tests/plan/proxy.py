"""A TCP proxy that passes on every byte later: a link's latency, on one machine."""

import asyncio
import contextlib
from collections.abc import AsyncIterator


async def _pass_on(
  reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float
) -> None:
  """In order, each piece `delay_s` after it came, however many are under way."""
  loop = asyncio.get_running_loop()
  pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

  async def write() -> None:
    while True:
      due_s, piece = await pieces.get()
      await asyncio.sleep(max(0.0, due_s - loop.time()))
      if not piece:
        writer.close()
        return
      writer.write(piece)
      await writer.drain()

  writing = asyncio.create_task(write())
  try:
    with contextlib.suppress(ConnectionError):
      while piece := await reader.read(1 << 16):
        pieces.put_nowait((loop.time() + delay_s, piece))
    pieces.put_nowait((loop.time() + delay_s, b""))
    with contextlib.suppress(ConnectionError):
      await writing
  finally:
    writing.cancel()


@contextlib.asynccontextmanager
async def delayed(address: str, delay_s: float) -> AsyncIterator[str]:
  """An address that leads to another, `delay_s` away in both directions."""
  host, port = address.rsplit(":", 1)
  tasks: set[asyncio.Task[None]] = set()

  async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    there_reader, there_writer = await asyncio.open_connection(host, int(port))
    for one in (_pass_on(reader, there_writer, delay_s), _pass_on(there_reader, writer, delay_s)):
      task = asyncio.create_task(one)
      tasks.add(task)
      task.add_done_callback(tasks.discard)

  server = await asyncio.start_server(connected, "127.0.0.1", 0)
  try:
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
  finally:
    server.close()
    for task in list(tasks):
      task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
