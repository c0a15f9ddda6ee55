"""Measure how fast and how lean model files load, on this machine's CPU.

python -m experiments.load.run [FOLDER]     (files are made there if they are not there yet)
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

from neurojax.config import ModelConfig
from neurojax.files.dummy import write_dummy
from neurojax.files.gguf.blocks import BLOCKS
from neurojax.kernels import timing
from neurojax.weights.codecs import CODECS

HERE = Path(__file__).parent
RESULTS, TYPES = HERE / "results.csv", HERE / "types.csv"
ROW = 4096
"""Contracted elements of the rows that types.csv is about."""


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of results.csv.

  Attributes:
    read_s: Reading the file once with nothing in the system's cache and doing nothing with it.
    touch_s: A fresh process that writes a byte to every page of as much memory as the file has bytes. On a
      virtual machine whose idle memory goes back to its host this can take longer than reading.
    load_s: Opening it and loading all layers, with nothing in the system's cache. All three: the least of
      the turns, as the machine may be shared.
    cpu_s: Of which one core computed or waited for memory; what others on the machine do is left out.
    peak_mb: The most memory that the process had while loading, Python and JAX included.
    before_mb: What it had before.
    ratio: peak_mb to file_mb.
  """

  architecture: str
  type: str
  weights: str
  file_mb: float
  read_s: float
  touch_s: float
  load_s: float
  cpu_s: float
  before_mb: float
  peak_mb: float
  ratio: float
  device: str
  jax: str
  jaxlib: str
  date: str


@dataclasses.dataclass(frozen=True)
class Width:
  """One line of types.csv: bits a weight takes in a file, and with `--weights stored` in memory."""

  type: str
  file_bits: float
  memory_bits: float


def forget(path: Path) -> None:
  """Have the system drop the file's pages from its cache."""
  fd = os.open(path, os.O_RDONLY)
  os.fsync(fd)
  os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
  os.close(fd)


def read_s(path: Path) -> float:
  forget(path)
  start = time.perf_counter()
  room = bytearray(8 << 20)
  with path.open("rb", buffering=0) as file:
    while file.readinto(room):
      pass
  return time.perf_counter() - start


def touch_s(nbytes: int) -> float:
  """Take memory for the first time in a fresh process."""
  code = (
    "import sys, time; import numpy as np; start = time.perf_counter();"
    " room = np.empty(int(sys.argv[1]), np.uint8); room[::4096] = 1; print(time.perf_counter() - start)"
  )
  command = [sys.executable, "-c", code, str(nbytes)]
  return float(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def load(path: Path, weights: str) -> dict[str, float]:
  """Load once in a fresh process."""
  forget(path)
  command = [sys.executable, "-m", "experiments.load.child", str(path), weights]
  return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def widths() -> list[Width]:
  ternary = [
    Width(
      name, 8 * codec.nbytes(1, ROW) / ROW, 2 + 8 * codec.scale_dtype.itemsize / codec.group_size
    )
    for name, codec in CODECS.items()
    if codec.group_size is not None
  ]
  grouped = [
    Width(name, 8 * b.block_bytes / b.block, 8 * b.form.matrix_bytes(ROW, 1) / ROW)
    for name, b in BLOCKS.items()
  ]
  return [*ternary, *grouped, Width("F16", 16, 16), Width("BF16", 16, 16)]


def main(folder: Path) -> None:
  config = tomllib.loads((HERE / "config.toml").read_text())
  RESULTS.unlink(missing_ok=True)
  origin = timing.origin()
  for case in config["cases"]:
    path = folder / f"{case['architecture']}-{case['type']}.gguf".replace(" ", "_")
    if not path.exists():
      write_dummy(path, ModelConfig.named(case["architecture"]), case["type"])
    loads, reads, touches = [], [], []
    for _ in range(config["turns"]):
      touches.append(touch_s(path.stat().st_size))
      reads.append(read_s(path))
      loads.append(load(path, case["weights"]))
    file_mb = path.stat().st_size / 1e6
    peak_mb = max(found["peak_mb"] for found in loads)
    timing.append_csv(
      RESULTS,
      [
        Row(
          **case,
          file_mb=round(file_mb, 1),
          read_s=round(min(reads), 2),
          touch_s=round(min(touches), 2),
          load_s=round(min(found["load_s"] for found in loads), 2),
          cpu_s=round(min(found["cpu_s"] for found in loads), 2),
          before_mb=round(max(found["before_mb"] for found in loads), 1),
          peak_mb=round(peak_mb, 1),
          ratio=round(peak_mb / file_mb, 3),
          **origin,
        )
      ],
    )
  TYPES.unlink(missing_ok=True)
  timing.append_csv(TYPES, widths())
  print(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
  if sys.argv[1:]:
    main(Path(sys.argv[1]))
  else:
    with tempfile.TemporaryDirectory() as scratch:
      main(Path(scratch))
