"""Server processes on loopback."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any


class Process:
  """A running server.

  Attributes:
    url: "http://127.0.0.1:port".
  """

  def __init__(self, process: subprocess.Popen[str], url: str):
    self.process, self.url = process, url


@contextlib.contextmanager
def started(command: list[str], **options: Any) -> Iterator[Process]:
  """A server that prints {"listening": address}; it is ended with SIGTERM."""
  process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)
  try:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"the server ended with {process.wait(10)}"
    yield Process(process, json.loads(line)["listening"].removesuffix("/v1"))
  finally:
    process.terminate()
    try:
      process.wait(20)
    finally:
      process.kill()
      process.wait()


def fake(**options: Any) -> contextlib.AbstractContextManager[Process]:
  """A server over a fake engine."""
  options.setdefault("engine", {})
  return started([sys.executable, "-m", "tests.serve.fake_server", json.dumps(options)])
