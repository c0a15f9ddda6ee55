"""Maps a file into memory and gives out ranges of its bytes."""

import contextlib
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from neurojax.files import digest

_AHEAD_BYTES = 64 << 20


class MappedFile:
  """An open file, read-only.

  Attributes:
    path: The file.
    size_bytes: When it was opened.
  Raises: ValueError: it is empty.
  """

  def __init__(self, path: str | Path) -> None:
    self.path = Path(path)
    with contextlib.ExitStack() as undo:
      self._file = undo.enter_context(self.path.open("rb"))
      self._opened_as = os.fstat(self._file.fileno())
      self.size_bytes = self._opened_as.st_size
      if self.size_bytes == 0:
        raise ValueError(f"{self.path}: this file is empty: download it again")
      self._map = mmap.mmap(self._file.fileno(), self.size_bytes, access=mmap.ACCESS_READ)
      undo.pop_all()

  def view(self, offset: int, nbytes: int) -> UInt8[np.ndarray, "bytes"]:
    """Bytes of the file, which must lie within it. Raises: ValueError: closed, or cut short."""
    # Touching a mapped page behind the end of a shortened file kills the process (SIGBUS).
    if self._file.closed:
      raise ValueError(f"{self.path}: the file is closed")
    size_bytes = os.fstat(self._file.fileno()).st_size
    if size_bytes != self.size_bytes:
      raise ValueError(
        f"{self.path}: it had {self.size_bytes} bytes when it was opened and has {size_bytes} "
        "now: do not write to a file in use; open it again"
      )
    return np.frombuffer(self._map, np.uint8, nbytes, offset)

  @contextlib.contextmanager
  def range(self, offset: int, nbytes: int) -> Iterator[UInt8[np.ndarray, "bytes"]]:
    """Like `view`, but the pages leave the process afterwards. The bytes that follow are fetched while the
    caller works on these: tensors are mostly read in the order of the file."""
    view = self.view(offset, nbytes)
    if sys.platform == "linux" and nbytes:
      start = offset // mmap.PAGESIZE * mmap.PAGESIZE
      ahead = min(offset + nbytes + _AHEAD_BYTES, self.size_bytes) - start
      self._map.madvise(mmap.MADV_WILLNEED, start, ahead)
    yield view
    if sys.platform == "linux" and nbytes:
      self._map.madvise(mmap.MADV_DONTNEED, start, offset + nbytes - start)

  def check_unchanged(self) -> None:
    """Raises: ValueError: the file was replaced, changed or removed since it was opened."""
    digest.check_unchanged(self.path, self._opened_as)

  def sha256(self) -> str:
    """The hex digest of the whole file, cached for each user."""
    return digest.sha256_of(self.path, opened_as=self._opened_as)

  def close(self) -> None:
    """Views that were given out stay valid; the map goes with the last of them."""
    self._file.close()
    with contextlib.suppress(BufferError):
      self._map.close()
