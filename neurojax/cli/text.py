"""Text that comes in: files and standard input, in bounded memory."""

import asyncio
import os
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

from neurojax.tokenizer.read.bounded import read_bounded

MAX_BYTES = 256 << 20
"""The longest text that is read at once, in bytes: some tens of millions of tokens."""
MAX_LINE_BYTES = 16 << 20
"""The longest line of a conversation, in bytes."""

_STDIN = "standard input"


def read_text(path: Path, flag: str) -> str:
  """Reads a UTF-8 file as it is, line endings included.

  Args:
    flag: The option that names the file, for errors.
  Raises:
    ValueError: it is not UTF-8, or longer than `MAX_BYTES` (as a device without an end is).
    OSError: it cannot be read.
  """
  try:
    file = path.open("rb")
  except OSError as error:
    raise OSError(f"{flag} {str(path)[:200]}: {error.strerror}") from error
  with file:
    return _decoded(read_bounded(file, str(path), MAX_BYTES), str(path))


def read_stdin() -> str:
  """Reads all of standard input.

  Raises: ValueError: it is closed, not UTF-8, or longer than `MAX_BYTES`.
  """
  if sys.stdin is None:
    raise ValueError("standard input is closed: give the text another way")
  return _decoded(read_bounded(sys.stdin.buffer, _STDIN, MAX_BYTES), _STDIN)


async def lines_of_stdin() -> AsyncGenerator[str, None]:
  """Yields lines of standard input as they come, without their ends.

  Waits in the event loop, not in a thread: a thread that reads cannot be interrupted, and would keep
  the process after Ctrl-C. A regular file never makes anyone wait, and is read as it is.

  Raises: ValueError: a line is not UTF-8, or longer than `MAX_LINE_BYTES`.
  """
  if sys.stdin is None:
    return
  descriptor, held, start = sys.stdin.fileno(), b"", 0
  ready = True
  while True:
    if ready:
      try:
        await _readable(descriptor)
      except PermissionError:
        ready = False
    part = os.read(descriptor, 1 << 16)
    *whole, held = (held + part).split(b"\n")
    for line in whole:
      yield _decoded(line, _STDIN, start).rstrip("\r")
      start += len(line) + 1
    if len(held) > MAX_LINE_BYTES:
      raise ValueError(
        f"standard input: a line has more than {MAX_LINE_BYTES} bytes: break it into shorter ones"
      )
    if not part:
      if held:
        yield _decoded(held, _STDIN, start).rstrip("\r")
      return


def _decoded(data: bytes, name: str, start: int = 0) -> str:
  """Decodes UTF-8 that begins at byte `start` of its source."""
  try:
    return data.decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{name}: not UTF-8 at byte {start + error.start}: convert it first"
    ) from error


async def _readable(descriptor: int) -> None:
  """Waits until a read would not block. Raises PermissionError for a regular file."""
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
