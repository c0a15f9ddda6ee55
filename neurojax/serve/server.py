"""Runs the application on a socket until it is told to end, and lets what is under way finish."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from typing import Any

import uvicorn

from neurojax.serve.app import Door

_LOG = logging.getLogger(__name__)
_BACKLOG = 1024


class _Server(uvicorn.Server):
  """Leaves signals to the caller, and says when it listens."""

  def __init__(self, config: uvicorn.Config):
    super().__init__(config)
    self.listens = asyncio.Event()

  async def startup(self, sockets: list[socket.socket] | None = None) -> None:
    await super().startup(sockets)
    self.listens.set()

  @contextlib.contextmanager
  def capture_signals(self) -> Generator[None, None, None]:
    yield


def listen(address: str, port: int) -> socket.socket:
  """A socket that listens. Raises: OSError: the address is taken, or is none of this machine."""
  family = socket.AF_INET6 if ":" in address else socket.AF_INET
  found = socket.socket(family, socket.SOCK_STREAM)
  try:
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.bind((address, port))
    found.listen(_BACKLOG)
  except OSError as error:
    found.close()
    raise OSError(f"{address}:{port}: {error.strerror or error}") from error
  return found


async def run(
  app: Door,
  listening: socket.socket,
  *,
  drain_s: float = 30.0,
  started: Callable[[], None] = lambda: None,
) -> None:
  """Serve until SIGTERM or SIGINT; requests under way then get `drain_s` seconds, new ones a 503.

  A second signal ends it at once.
  """
  config = uvicorn.Config(
    app,
    log_config=None,
    access_log=False,
    lifespan="off",
    server_header=False,
    timeout_keep_alive=30,
    timeout_graceful_shutdown=2,
    h11_max_incomplete_event_size=1 << 16,
  )
  server, told = _Server(config), asyncio.Event()
  loop = asyncio.get_running_loop()

  def stop() -> None:
    if told.is_set():
      server.should_exit = server.force_exit = True
    told.set()

  for number in (signal.SIGTERM, signal.SIGINT):
    loop.add_signal_handler(number, stop)
  serving = asyncio.create_task(server.serve(sockets=[listening]))
  try:
    await _first(server.listens.wait(), serving)
    if server.listens.is_set():
      started()
    ending = asyncio.create_task(told.wait())
    await asyncio.wait({ending, serving}, return_when=asyncio.FIRST_COMPLETED)
    ending.cancel()
    app.is_draining = True
    if app.under_way:
      _LOG.info("ending: %d requests get %g s", app.under_way, drain_s)
    with contextlib.suppress(TimeoutError):
      async with asyncio.timeout(drain_s):
        await _first(app.idle(), serving)
    server.should_exit = True
    await serving
  finally:
    for number in (signal.SIGTERM, signal.SIGINT):
      loop.remove_signal_handler(number)


async def _first(what: Coroutine[Any, Any, object], serving: asyncio.Task[None]) -> None:
  waiting = asyncio.create_task(what)
  try:
    await asyncio.wait({waiting, serving}, return_when=asyncio.FIRST_COMPLETED)
  finally:
    waiting.cancel()


def read_keys(path: Path) -> list[str]:
  """API keys of a file, one in a line; lines that begin with # say something about them.

  Raises: ValueError: it has none. OSError: it cannot be read.
  """
  lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
  keys = [line for line in lines if line and not line.startswith("#")]
  if not keys:
    raise ValueError(f"{path}: there is no key in it: give one in a line")
  return keys
