"""`neurojax stage`: one stage server."""

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
import sys
from typing import Annotated

import tyro

from neurojax.cli.options import ModelOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage(ModelOptions):
  """Serve layers of a model over gRPC; which ones, the coordinator's plan says.

  Every host of a pipeline runs one, with the same model file. Connections are neither encrypted
  nor authenticated: listen on loopback or a network you trust.

  Example: neurojax stage --model model.gguf --listen 127.0.0.1:7001
  """

  listen: Annotated[str, tyro.conf.arg(metavar="HOST:PORT")]
  """Where to take connections; port 0 takes a free one."""
  name: str | None = None
  """What errors and tables call this server; host and process if absent."""
  memory: Annotated[str | None, tyro.conf.arg(metavar="SIZE")] = None
  """What weights and caches may take (for example 6GB); what is free if absent."""
  share: Annotated[int, tyro.conf.arg(metavar="N")] = 1
  """N servers share this machine: take an equal part of what is free."""
  json: bool = False
  """Print the address as a line of JSON."""
  end_with_stdin: bool = False
  """End when standard input closes, so that the server never outlives the process that started it."""

  def run(self) -> int:
    from neurojax.plan.fleet import check_address, parse_bytes

    check_address(self.listen)
    if self.share < 1:
      raise ValueError(f"--share {self.share}: at least 1")
    if self.end_with_stdin and sys.stdin is None:
      raise ValueError("--end-with-stdin, and standard input is closed already")
    memory_bytes = parse_bytes(self.memory) if self.memory is not None else None
    with self.open() as file:
      config = file.config
      name = self.name or f"{socket.gethostname()}-{os.getpid()}"
      # JAX takes seconds to import: only after everything that can be wrong was looked at.
      from neurojax.folders import cache_dir
      from neurojax.pipeline.server import StageServer
      from neurojax.stage.compile import use_compilation_cache

      use_compilation_cache(cache_dir() / "xla")
      if not self.json:
        logging.getLogger("neurojax").setLevel(logging.INFO)

      async def serve() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
          loop.add_signal_handler(number, stop.set)
        if self.end_with_stdin:
          loop.add_reader(sys.stdin.fileno(), lambda: _stop_at_end(loop, stop))
        server = StageServer(file, name=name, memory_bytes=memory_bytes, share=self.share)
        await server.serve(self.listen, started=self._started, stop=stop)

      assert config is not None
      asyncio.run(serve())
    return 0

  def _started(self, address: str) -> None:
    line = json.dumps({"listening": address}) if self.json else f"listening on {address}"
    print(line, flush=True)


def _stop_at_end(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
  with contextlib.suppress(BlockingIOError):
    if not os.read(sys.stdin.fileno(), 4096):
      loop.remove_reader(sys.stdin.fileno())
      stop.set()
