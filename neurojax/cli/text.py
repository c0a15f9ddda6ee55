"""Text that comes in: files and standard input."""

import asyncio
import os
import sys
from collections.abc import AsyncGenerator
from pathlib import Path


def read_text(path: Path) -> str:
  """A UTF-8 file as it is, line endings included. Raises: ValueError: it is not UTF-8."""
  try:
    return path.read_bytes().decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: not UTF-8 at byte {error.start}: convert it first") from error


def read_stdin() -> str:
  """All of standard input. Raises: ValueError: it is closed, or not UTF-8."""
  if sys.stdin is None:
    raise ValueError("standard input is closed: give the text another way")
  try:
    return sys.stdin.buffer.read().decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(
      f"standard input: not UTF-8 at byte {error.start}: convert it first"
    ) from error


async def lines_of_stdin() -> AsyncGenerator[str, None]:
  """Lines of standard input as they come, without their ends.

  Waits in the event loop, not in a thread: a thread that reads cannot be interrupted, and would keep
  the process after Ctrl-C. A regular file never makes anyone wait, and is read as it is.
  """
  if sys.stdin is None:
    return
  descriptor, held = sys.stdin.fileno(), b""
  while True:
    try:
      await _readable(descriptor)
    except PermissionError:
      for line in read_stdin().splitlines():
        yield line
      return
    part = os.read(descriptor, 1 << 16)
    *whole, held = (held + part).split(b"\n")
    for line in whole:
      yield line.decode("utf-8", errors="replace").rstrip("\r")
    if not part:
      if held:
        yield held.decode("utf-8", errors="replace")
      return


async def _readable(descriptor: int) -> None:
  """Wait until a read would not block. Raises PermissionError for a regular file."""
  loop = asyncio.get_running_loop()
  ready = loop.create_future()

  def once() -> None:
    # Off at once: left on, it would fire again for what is about to be read.
    loop.remove_reader(descriptor)
    if not ready.done():
      ready.set_result(None)

  loop.add_reader(descriptor, once)
  try:
    await ready
  finally:
    loop.remove_reader(descriptor)
