"""Writes arrays into new files."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np


@contextlib.contextmanager
def stored(path: Path) -> Iterator[BinaryIO]:
  """Opens a file to write; the system has stored it when the block ends.

  Raises: OSError: the file cannot be written; a full disk is said in words.
  """
  with saying_no_room(path), path.open("wb") as file:
    yield file
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def saying_no_room(path: Path) -> Iterator[None]:
  """Words a full disk with the path and a remedy. Raises: OSError: what the block raises."""
  try:
    yield
  except OSError as error:
    if error.errno != errno.ENOSPC:
      raise
    what = f"no room is left on the disk for {path}: make some, or name another folder"
    raise OSError(errno.ENOSPC, what) from error


def put(file: BinaryIO, array: np.ndarray) -> None:
  """Writes the bytes of an array, in C order."""
  file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
