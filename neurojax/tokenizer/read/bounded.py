"""Reads files whole, up to a limit: a device such as /dev/zero has no end."""

from typing import BinaryIO

_BLOCK = 1 << 20


def read_bounded(file: BinaryIO, name: str, limit: int, what: str = "a text") -> bytes:
  """Reads a file or pipe to its end.

  Args:
    name: The file's name in the error.
    limit: The most bytes to read.
    what: The thing that is never longer, in the error.
  Raises: ValueError: the file has more than `limit` bytes.
  """
  data = bytearray()
  # A pipe gives less than it is asked for.
  while part := file.read(min(_BLOCK, limit + 1 - len(data))):
    data += part
    if len(data) > limit:
      raise ValueError(f"{name}: more than {limit} bytes, the most that {what} may have")
  return bytes(data)
