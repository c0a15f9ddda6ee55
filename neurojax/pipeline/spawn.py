"""Starts stage servers as child processes on loopback. They end when this process ends, however it ends."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from neurojax.engine.api import EngineError
from neurojax.plan.fleet import Fleet, Host

_START_S = 60.0
_END_S = 5.0


class LocalStages:
  """Stage servers on this machine: `async with LocalStages(model, 2) as stages: ... stages.fleet`.

  Args:
    model: The model file.
    number: Number of servers, at least 1.
    arguments: Further arguments of `neurojax stage` for every server.
    devices: JAX devices such as "cpu" or "cuda:1": one for each server, or one for all.
  """

  def __init__(
    self,
    model: Path,
    number: int,
    *,
    arguments: Sequence[str] = (),
    devices: Sequence[str] = (),
  ):
    if number < 1:
      raise ValueError(f"{number} stages: at least 1")
    self._model, self._number, self._arguments = model, number, tuple(arguments)
    self._devices = tuple(devices) * (number if len(devices) == 1 else 1)
    self.processes: list[asyncio.subprocess.Process] = []
    self.fleet: Fleet | None = None
    self._drains: list[asyncio.Task[None]] = []

  async def __aenter__(self) -> Self:
    try:
      for index in range(self._number):
        self.processes.append(await self._start(index))
      addresses = await asyncio.gather(*(self._address(process) for process in self.processes))
    except BaseException:
      await self._end()
      raise
    self.fleet = Fleet(
      hosts=tuple(Host(name=f"stage-{i}", address=address) for i, address in enumerate(addresses))
    )
    return self

  async def __aexit__(self, *_: object) -> None:
    await self._end()

  async def _start(self, index: int) -> asyncio.subprocess.Process:
    chosen = self._devices[index] if self._devices else None
    # The child leaves its stdin open and ends when it closes, which the kernel does if we are killed.
    # Several servers may share one GPU: none may take most of its memory beforehand.
    # A process group of its own keeps the terminal's Ctrl-C from it: we end it in order.
    return await asyncio.create_subprocess_exec(
      sys.executable,
      "-m",
      "neurojax",
      "stage",
      "--model",
      os.fspath(self._model),
      "--listen",
      "127.0.0.1:0",
      "--name",
      f"stage-{index}",
      "--json",
      "--end-with-stdin",
      "--share",
      str(self._number),
      *self._arguments,
      env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ, **device_environment(chosen)},
      stdin=asyncio.subprocess.PIPE,
      stdout=asyncio.subprocess.PIPE,
      start_new_session=True,
    )

  async def _address(self, process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    try:
      line = await asyncio.wait_for(process.stdout.readline(), _START_S)
    except TimeoutError as error:
      raise EngineError(
        f"a stage server (process {process.pid}) did not start within {_START_S:g} s"
      ) from error
    if not line:
      raise EngineError(f"a stage server ended at its start with exit code {await process.wait()}")
    self._drains.append(asyncio.create_task(_drain(process.stdout)))
    said = json.loads(line)
    if "error" in said:
      raise ValueError(said["error"])
    return said["listening"]

  async def _end(self) -> None:
    for process in self.processes:
      if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
          process.send_signal(signal.SIGTERM)
    for process in self.processes:
      try:
        await asyncio.wait_for(process.wait(), _END_S)
      except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
          process.kill()
        await process.wait()
    for drain in self._drains:
      drain.cancel()


def device_environment(device: str | None) -> dict[str, str]:
  """Environment variables that show a process one device only.

  Args:
    device: A platform ("cpu", "cuda") or one device of it ("cuda:1"); None changes nothing.
  """
  if device is None:
    return {}
  platform, _, number = device.partition(":")
  found = {"JAX_PLATFORMS": "cuda,cpu" if platform == "cuda" else platform}
  if number and platform == "cuda":
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    found["CUDA_VISIBLE_DEVICES"] = seen[int(number)] if seen != [""] else number
  return found


async def _drain(stream: asyncio.StreamReader) -> None:
  while await stream.read(1 << 16):
    pass
