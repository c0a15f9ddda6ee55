"""Real stage servers for tests, and ways to speak to them that no well-meaning client would use."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc

from neurojax.config import Sampling, Serving
from neurojax.engine.api import Engine, Request, Token
from neurojax.files.open import open_model
from neurojax.forms import Forms
from neurojax.pipeline import pipeline_pb2 as pb
from neurojax.pipeline import pipeline_pb2_grpc as rpc
from neurojax.pipeline.coordinator import PipelineEngine, PipelineOptions
from neurojax.plan.fleet import Fleet, Host


class Server:
  """One `neurojax stage` process."""

  def __init__(self, model: Path, name: str, *arguments: str, listen: str = "127.0.0.1:0"):
    self.name = name
    self.process = subprocess.Popen(
      [
        sys.executable,
        "-m",
        "neurojax",
        "stage",
        "--model",
        model,
        "--listen",
        listen,
        "--name",
        name,
        "--json",
        "--end-with-stdin",
        *arguments,
      ],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
    )

  def address(self) -> str:
    assert self.process.stdout is not None
    line = self.process.stdout.readline()
    assert line, f"{self.name} ended at its start with {self.process.wait()}"
    return json.loads(line)["listening"]

  def signal(self, number: signal.Signals) -> None:
    os.kill(self.process.pid, number)

  def end(self) -> None:
    with contextlib.suppress(ProcessLookupError):
      self.signal(signal.SIGCONT)
    self.process.kill()
    self.process.wait()

  def resident_bytes(self) -> int:
    for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
      if line.startswith("VmRSS"):
        return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


class Cluster:
  """Some servers of one model, and engines over them."""

  def __init__(self, model: Path, number: int):
    self.model = model
    self.servers = [Server(model, f"stage-{index}") for index in range(number)]
    self.addresses = [server.address() for server in self.servers]

  def fleet(self, *indices: int) -> Fleet:
    chosen = indices or range(len(self.servers))
    return Fleet(hosts=tuple(Host(name=f"stage-{i}", address=self.addresses[i]) for i in chosen))

  async def connect(
    self,
    *indices: int,
    model: Path | None = None,
    forms: Forms | None = None,
    step_s: float = 60.0,
    **serving: object,
  ) -> PipelineEngine:
    chosen = Serving(**{"context": 256, "weights": "dense", **serving})
    with open_model(model or self.model) as file:
      setup = PipelineOptions(serving=chosen, forms=forms, step_s=step_s)
      return await PipelineEngine.connect(file.config, file.sha256(), self.fleet(*indices), setup)

  def replace(self, index: int) -> None:
    """A new server at the address of one that is gone."""
    self.servers[index].end()
    deadline_s = time.monotonic() + 30
    while True:
      server = Server(self.model, f"stage-{index}", listen=self.addresses[index])
      try:
        assert server.address() == self.addresses[index]
        break
      except AssertionError:
        assert time.monotonic() < deadline_s, "the address does not come free"
    self.servers[index] = server

  def end(self) -> None:
    for server in self.servers:
      server.end()


@contextlib.contextmanager
def cluster(model: Path, number: int) -> Iterator[Cluster]:
  servers = Cluster(model, number)
  try:
    yield servers
  finally:
    servers.end()


async def collect(engine: Engine, request: Request) -> list[Token]:
  return [token async for token in engine.generate(request)]


PROMPT = [1, 260, 262, 261, 259, 263, 260, 268, 265, 264, 259, 261, 260]


def request(**changes: object) -> Request:
  base: dict = {"prompt": PROMPT, "max_tokens": 24, "sampling": Sampling()}
  return Request(**{**base, **changes})


def run(work: object, *, limit_s: float = 120.0) -> object:
  """Run a coroutine; a test that hangs fails."""

  async def limited() -> object:
    return await asyncio.wait_for(work, limit_s)

  return asyncio.run(limited())


async def serves(three: Cluster, *indices: int) -> None:
  """A fresh coordinator gets a whole answer, and nothing of it stays behind."""
  engine = await three.connect(*indices)
  assert len(await collect(engine, request(max_tokens=4))) == 4
  for index in indices or range(3):
    assert await open_sequences(three.addresses[index]) == 0
  await engine.close()


async def open_sequences(address: str) -> int:
  async with grpc.aio.insecure_channel(address) as channel:
    for _ in range(50):
      description = await rpc.StageStub(channel).Describe(pb.DescribeRequest(), timeout=5)
      if description.open_sequences == 0:
        break
      await asyncio.sleep(0.1)
  return description.open_sequences
