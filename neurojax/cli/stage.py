"""`neurojax stage`: serves layers of a model to coordinators."""

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

_REFUSED = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage(ModelOptions):
  """Serve layers of a model over gRPC. The coordinator says which ones.

  Every host of a pipeline runs one stage server, with the same model file. Connections are neither
  encrypted nor authenticated: listen on loopback or on a network you trust. SIGTERM and Ctrl-C end it;
  calls under way get 2 s.

  Example: neurojax stage --model model.gguf --listen 127.0.0.1:7001

  Example: neurojax stage --model model.gguf --listen 10.0.0.2:7001 --name attic --memory 6GB
  """

  listen: Annotated[str, tyro.conf.arg(metavar="HOST:PORT")]
  """Address to listen on; port 0 takes a free one, which is printed."""
  name: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
  """Name of this server in errors and tables; host name and process id if absent."""
  memory: Annotated[str | None, tyro.conf.arg(metavar="SIZE")] = None
  """Most memory that weights, caches and working memory may take, for example 6GB; all that is free if
  absent."""
  share: Annotated[int, tyro.conf.arg(metavar="N")] = 1
  """Number of stage servers on this machine; each offers an equal part of what is free."""
  json: bool = False
  """Print the address as one line of JSON, and no log. A server without a device prints its error so."""
  end_with_stdin: bool = False
  """End when standard input closes: the server then never outlives the process that started it."""

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
      from neurojax.stage.backend import devices
      from neurojax.stage.compilation_cache import use_compilation_cache

      use_compilation_cache(cache_dir() / "xla")
      try:
        devices()
      except ValueError as error:
        if not self.json:
          raise
        # For the process that started this one: it raises the same error.
        print(json.dumps({"error": str(error)}), flush=True)
        return _REFUSED
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
