"""Arrays into new files."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np


@contextlib.contextmanager
def stored(path: Path) -> Iterator[BinaryIO]:
  """A file to write, which the system has stored when the block ends.

  Raises: OSError: it cannot be written; a full disk is said in words.
  """
  with saying_no_room(path), path.open("wb") as file:
    yield file
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def saying_no_room(path: Path) -> Iterator[None]:
  """Says in words, with the path, that the disk is full. Raises: OSError: whatever the block raises."""
  try:
    yield
  except OSError as error:
    if error.errno != errno.ENOSPC:
      raise
    what = f"no room is left on the disk for {path}: make some, or name another folder"
    raise OSError(errno.ENOSPC, what) from error


def put(file: BinaryIO, array: np.ndarray) -> None:
  """The bytes of an array, in C order."""
  file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
