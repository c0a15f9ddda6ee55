"""Arrays into files, and a disk that is full."""

import errno
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from neurojax.files.put import put, stored

FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("size", [10, 1 << 20])
def test_a_full_disk_is_said_in_words(size: int):
  with (
    pytest.raises(OSError, match="no room is left on the disk for /dev/full: make some") as raised,
    stored(FULL) as file,
  ):
    put(file, np.zeros(size, np.float32))
  assert raised.value.errno == errno.ENOSPC


def test_what_goes_wrong_otherwise_stays_what_it_is(tmp_path: Path):
  with pytest.raises(FileNotFoundError), stored(tmp_path / "none" / "file"):
    pass
  with pytest.raises(ValueError, match="mine"), stored(tmp_path / "file"):
    raise ValueError("mine")


def test_arrays_lie_in_c_order_whatever_their_dtype_and_shape(tmp_path: Path):
  grid = np.arange(6, dtype=np.int32).reshape(2, 3)
  with stored(tmp_path / "file") as file:
    put(file, grid.T)
    put(file, np.array(2.0, ml_dtypes.bfloat16))
    put(file, np.empty((0, 4), np.float64))
  wanted = struct.pack("<6i", 0, 3, 1, 4, 2, 5) + np.array([2.0], ml_dtypes.bfloat16).tobytes()
  assert (tmp_path / "file").read_bytes() == wanted
