"""What benchmarks of kernels share: time on the device, and the rates that bound it."""

import contextlib
import csv
import dataclasses
import datetime
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

Pick = Callable[[Sequence[float]], float]

_PASSES = 4
_ROUNDS = 16
"""Passes in one call: what starting a call costs must not count."""


@dataclasses.dataclass(frozen=True)
class Rates:
  """What the device does at best, measured.

  Attributes:
    read_bytes_per_s: Summing an array that no cache holds.
    copy_bytes_per_s: Reading and writing one, both counted.
    bf16_flops_per_s: A product of square bfloat16 matrices of normal numbers, by XLA.
  """

  read_bytes_per_s: float
  copy_bytes_per_s: float
  bf16_flops_per_s: float


def rates(size_bytes: int | None = None, width: int | None = None) -> Rates:
  """Measure the default device.

  Args:
    size_bytes: Of the array; None: 2 GiB on a GPU, an eighth of a GiB elsewhere.
    width: Of the square matrices; None: 8192 on a GPU, 512 elsewhere.
  """
  on_gpu = jax.default_backend() == "gpu"
  size_bytes = size_bytes or (1 << 31 if on_gpu else 1 << 27)
  width = width or (8192 if on_gpu else 512)
  read_bytes_per_s = read_rate(size_bytes)
  array = jnp.ones((_ROUNDS, size_bytes // 4 // _ROUNDS), jnp.int32)

  def copy(array: Array) -> Array:
    return lax.fori_loop(0, _ROUNDS, lambda i, a: a + i, array)

  def square(x: Array, y: Array) -> Array:
    return lax.fori_loop(0, _ROUNDS, lambda _, x: x @ y, x)

  copy_s = seconds(jax.jit(copy), array)
  del array
  x, y = (jax.random.normal(jax.random.key(i), (width, width), jnp.bfloat16) for i in range(2))
  # Of a size that products keep.
  y = y * jnp.bfloat16(width**-0.5)
  square_s = seconds(jax.jit(square), x, y)
  return Rates(
    read_bytes_per_s=read_bytes_per_s,
    copy_bytes_per_s=_ROUNDS * 2 * size_bytes / copy_s,
    bf16_flops_per_s=_ROUNDS * 2 * width**3 / square_s,
  )


def read_rate(size_bytes: int = 1 << 29, runs: int = 3, pick: Pick = statistics.median) -> float:
  """Bytes per second of summing an array, on the default device: what reading alone can reach."""
  array = jnp.ones((size_bytes // 4 // 1024, 1024), jnp.int32)
  if jax.default_backend() != "gpu":
    # Over the leading axis: a plain sum is bound by its additions, and so is anything more than a sum.
    s = seconds(jax.jit(lambda a: jnp.sum(a, axis=0)), array, runs=_PASSES * runs, pick=pick)
    return array.nbytes / s

  # Each pass depends on the one before, or XLA would make one of them all.
  def read(array: Array) -> Array:
    return lax.fori_loop(0, _PASSES, lambda _, total: jnp.sum(array ^ total), jnp.int32(0))

  return _PASSES * array.nbytes / seconds(jax.jit(read), array, runs=runs, pick=pick)


def device_name() -> str:
  device = jax.devices()[0]
  if device.platform != "cpu":
    return device.device_kind
  with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
    for line in lines:
      if line.startswith("model name"):
        return line.split(":", 1)[1].strip()
  return "cpu"


def seconds(
  f: Callable[..., Any], *args: Any, runs: int = 5, pick: Pick = statistics.median
) -> float:
  """The median time of a call, or what `pick` takes, the first one (which compiles) left out."""
  jax.block_until_ready(f(*args))
  times = []
  for _ in range(runs):
    began = time.perf_counter()
    jax.block_until_ready(f(*args))
    times.append(time.perf_counter() - began)
  return pick(times)


def origin() -> dict[str, str]:
  """Where and when a result was measured, for its row."""
  import jaxlib

  return {
    "device": device_name(),
    "jax": jax.__version__,
    "jaxlib": jaxlib.__version__,
    "date": datetime.date.today().isoformat(),
  }


def check_csv(path: Path, row: type) -> None:
  """Whether `append_csv` can add rows of a dataclass there; makes the folder.

  Raises: ValueError: the file has other columns, or is no text. OSError: it cannot be written.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  names = [field.name for field in dataclasses.fields(row)]
  with path.open("a+b") as file:
    file.seek(0)
    first = file.readline()
  try:
    found = next(csv.reader([first.decode()]), [])
  except (UnicodeDecodeError, csv.Error) as error:
    raise ValueError(f"{path}: not a results file ({error}): name another") from error
  if first and found != names:
    raise ValueError(f"{path} has the columns {found}, not {names}: name another file")


def append_csv(path: Path, rows: Sequence[Any]) -> None:
  """Add dataclass rows to a results file, with a header if it is new or empty.

  Raises: as `check_csv` does.
  """
  check_csv(path, type(rows[0]))
  names = [field.name for field in dataclasses.fields(rows[0])]
  text = path.read_text(encoding="utf-8")
  with path.open("a", newline="", encoding="utf-8") as out:
    writer = csv.DictWriter(out, names)
    if not text:
      writer.writeheader()
    elif not text.endswith("\n"):
      out.write("\n")
    for row in rows:
      values = dataclasses.asdict(row)
      writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()})


def table(rows: Sequence[Any], columns: dict[str, Callable[[Any], str]]) -> str:
  """Text of aligned columns: a title, and what to print of a row."""
  lines = [list(columns), *[[show(row) for show in columns.values()] for row in rows]]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join(
    "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
  )
