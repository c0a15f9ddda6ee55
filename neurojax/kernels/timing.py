"""Times calls on the device, measures the rates that bound them, and writes rows of results."""

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

_WIDTH = 7
"""Characters of a column, at least."""


@dataclasses.dataclass(frozen=True)
class Rates:
  """The measured best that the device does.

  Attributes:
    read_bytes_per_s: Rate of summing an array that no cache holds.
    copy_bytes_per_s: Rate of reading and writing such an array, both counted.
    bf16_flops_per_s: Rate of XLA's product of square bfloat16 matrices of normal numbers.
  """

  read_bytes_per_s: float
  copy_bytes_per_s: float
  bf16_flops_per_s: float


def rates(size_bytes: int | None = None, width: int | None = None) -> Rates:
  """Measure the best that the default device does.

  Args:
    size_bytes: Bytes of the array that is read; None: 2 GiB on a GPU, an eighth of a GiB elsewhere.
    width: Side of the square matrices; None: 8192 on a GPU, 512 elsewhere.
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
  # A product with it keeps the size of its input.
  y = y * jnp.bfloat16(width**-0.5)
  square_s = seconds(jax.jit(square), x, y)
  return Rates(
    read_bytes_per_s=read_bytes_per_s,
    copy_bytes_per_s=_ROUNDS * 2 * size_bytes / copy_s,
    bf16_flops_per_s=_ROUNDS * 2 * width**3 / square_s,
  )


def read_rate(size_bytes: int = 1 << 29, runs: int = 3, pick: Pick = statistics.median) -> float:
  """Measure bytes per second of summing an array on the default device: what reading alone can reach."""
  array = jnp.ones((size_bytes // 4 // 1024, 1024), jnp.int32)
  if jax.default_backend() != "gpu":
    # The sum is over the leading axis: a plain sum is bound by its additions, as is anything more.
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
  """Time calls: the median, or what `pick` takes; the first call, which compiles, is left out."""
  jax.block_until_ready(f(*args))
  times = []
  for _ in range(runs):
    began = time.perf_counter()
    jax.block_until_ready(f(*args))
    times.append(time.perf_counter() - began)
  return pick(times)


def origin() -> dict[str, str]:
  """The device, the versions and the date that a row of results carries."""
  import jaxlib

  return {
    "device": device_name(),
    "jax": jax.__version__,
    "jaxlib": jaxlib.__version__,
    "date": datetime.date.today().isoformat(),
  }


def check_csv(path: Path, row: type) -> None:
  """Check that `append_csv` can add rows of a dataclass to a file, and make its folder.

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


def headline(row: Any) -> str:
  """The device, the versions and the date of a row, and the best that the device does."""
  return (
    f"{row.device}, jax {row.jax}, jaxlib {row.jaxlib}, {row.date}\nat best: read"
    f" {row.read_bytes_per_s / 1e9:.1f} GB/s, copy {row.copy_bytes_per_s / 1e9:.1f} GB/s, bf16"
    f" product {row.bf16_flops_per_s / 1e9:.0f} GFLOP/s"
  )


def titles(columns: dict[str, Callable[[Any], str]]) -> str:
  """The line above those of `line`, for a table that is printed while it is measured."""
  return "  ".join(title.rjust(_WIDTH) for title in columns)


def line(row: Any, columns: dict[str, Callable[[Any], str]]) -> str:
  """One row, its cells right-aligned below their titles; a title that is padded makes a wide column."""
  return "  ".join(show(row).rjust(max(_WIDTH, len(title))) for title, show in columns.items())


def table(rows: Sequence[Any], columns: dict[str, Callable[[Any], str]]) -> str:
  """Rows as text in aligned columns; a column has a title and shows a part of a row."""
  lines = [list(columns), *[[show(row) for show in columns.values()] for row in rows]]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join(
    "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
  )
