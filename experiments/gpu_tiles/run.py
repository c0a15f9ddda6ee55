"""Time the ways to cut each product of a step, and write the fastest into the device's table.

python -m experiments.gpu_tiles.run   (an H100 or H200)
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from neurojax.kernels.gemm import bench, levels, mosaic, shapes, tuned
from neurojax.kernels.gemm.levels import Levels
from neurojax.kernels.gemm.mosaic import Tiling
from neurojax.stage import rounded
from neurojax.weights.ternary import TernaryArray

ROWS = (8, 64)
ADDED = ("o", "down")
"""Products whose parts the next kernel adds, in steps of at most MOST_STEP_ROWS rows."""

MOST_STEP_ROWS = 64
SHARED_BYTES = 220_000
CHAIN = 8
"""Products in a round of the timed loop, each of which waits for the one before."""

Candidate = tuple[str, dict[str, Any]]


def parts_of(matrix: shapes.Matrix, m: int) -> int:
  is_cut = matrix.name in ADDED and m <= MOST_STEP_ROWS
  return rounded.parts_for(matrix.n, matrix.k) if is_cut else 1


def candidates(matrix: shapes.Matrix, m: int, parts: int) -> Iterator[Candidate]:
  """Cuts that the kernels take, the default first."""
  n, k = matrix.n, matrix.k
  shape = jax.eval_shape(lambda: weights_of(matrix, 1))
  default = dataclasses.replace(mosaic.tiling_for(m, n, k, shape), split=parts)
  seen = [default]
  tile = min(128, -(-m // 8) * 8)
  for groups, step, stages, copier in itertools.product(
    (1, 2, 3, 4), (256, 512), (4, 6), (True, False)
  ):
    cut = Tiling(64 * groups, tile, step, groups, stages, parts, copier)
    memory = stages * (cut.n * step // 4 + tile * step)
    registers = (tile // 2 + tile // 2 * (2 if tile < 64 else 1) + 72) * 128 * (groups + copier)
    fits = memory <= SHARED_BYTES and registers <= 65536
    fits &= stages == 4 or (copier and step == 256)
    if fits and n % cut.n == 0 and k % (step * parts) == 0 and (step == 256 or m <= 64):
      seen.append(cut)
  yield from (("mosaic", dataclasses.asdict(cut)) for cut in dict.fromkeys(seen))
  if m > MOST_STEP_ROWS or n > 100_000:
    return
  for tiles_n, tiles_m, y, warps in itertools.product(
    (16, 32, 64), (8, 16, 32, 64), (128,), (2, 4)
  ):
    if tiles_m > max(8, m) or tiles_n * tiles_m * 4 > 128 * 32 * warps or tiles_m < m // 2:
      continue
    yield (
      "triton",
      {"n": tiles_n, "m": tiles_m, "y": y, "split": parts, "warps": warps, "stages": 4},
    )


def weights_of(matrix: shapes.Matrix, count: int) -> TernaryArray:
  n, k = matrix.n, matrix.k
  codes, scales = (
    jnp.zeros((count, n, k // 4), jnp.uint8),
    jnp.zeros((count, n, k // 128), jnp.float16),
  )
  return TernaryArray(codes, scales, (k, n), 1, 128, "w2a8")


def chain(candidate: Candidate, rounds: int, count: int) -> Any:
  """A loop of products, each of which waits for the one before: (levels, weights) to the last result."""
  by, fields = candidate

  def product(x: Levels, w: TernaryArray, layer: Any) -> jax.Array:
    if by == "mosaic":
      return mosaic.matmul(x, w, layer, cut=fields, parts=True)
    from neurojax.kernels.gemm import triton

    return triton.matmul(x, w, layer=layer, tiles=fields, parts=True)

  # Traced once, where each product of a round would be traced anew.
  product = jax.jit(product)

  def run(x: Levels, w: TernaryArray) -> jax.Array:
    def body(i: Any, y: jax.Array) -> jax.Array:
      for j in range(CHAIN):
        # Too small for a bit of the steps, but XLA cannot know.
        steps = x.steps + y[0, 0, 0] * 1e-30
        y = product(dataclasses.replace(x, steps=steps), w, lax.rem(i * CHAIN + j, count))
      return y

    start = jax.eval_shape(lambda: product(x, w, jnp.int32(0)))
    return lax.fori_loop(0, rounds, body, jnp.zeros(start.shape, start.dtype))

  return jax.jit(run)


def measure(
  matrix: shapes.Matrix, m: int, parts: int, w: TernaryArray, until: float
) -> list[tuple[float, Candidate]]:
  """Time candidates until a moment: microseconds of a product, the fastest first."""
  count = w.codes.shape[0]
  rounds = max(2, 2000 // CHAIN // (20 if matrix.name == "head" else 1))
  x = jax.random.normal(jax.random.key(3), (m, matrix.k))
  given = {order: levels.quantize(x, order) for order in ("blocks", "planes")}
  order = {"mosaic": "blocks", "triton": "planes"}

  def build(candidate: Candidate) -> Any:
    if time.monotonic() > until:
      return "no time left"
    try:
      return chain(candidate, rounds, count).lower(given[order[candidate[0]]], w).compile()
    except Exception as error:  # A cut that does not fit is not a candidate.
      return str(error).splitlines()[0][:120]

  found, first = [], None
  every = list(candidates(matrix, m, parts))
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    built = pool.map(build, every)
    for candidate, run in zip(every, built, strict=True):
      by, fields = candidate
      if isinstance(run, str):
        print(f"  {by} {fields}: {run}")
        continue
      if found and time.monotonic() > until:
        continue
      times = []
      try:
        for _ in range(4):
          began = time.perf_counter()
          y = jax.block_until_ready(run(given[order[by]], w))
          times.append(time.perf_counter() - began)
      except jax.errors.JaxRuntimeError as error:
        print(f"  {by} {fields}: {str(error).splitlines()[0][:120]}")
        continue
      y = np.asarray(y)
      first = y if first is None else first
      if not np.array_equal(y, first):
        print(f"  {by} {fields}: other bits than the first, dropped")
        continue
      found.append((statistics.median(times[1:]) / (rounds * CHAIN) * 1e6, candidate))
  return sorted(found, key=lambda pair: pair[0])


def show(candidate: Candidate) -> str:
  by, fields = candidate
  return by + " " + " ".join(f"{name}={value}" for name, value in fields.items())


def entry_of(matrix: shapes.Matrix, m: int, candidate: Candidate) -> tuned.Entry:
  by, fields = candidate
  # Parts follow widths, whatever a table says.
  fields = {name: value for name, value in fields.items() if name != "split"}
  argument = "cut" if by == "mosaic" else "tiles"
  return tuned.Entry("w2a8", m, matrix.n, matrix.k, by, {argument: fields})


def main(arguments: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
  parser.add_argument("--names", nargs="+", default=[m.name for m in shapes.QWEN3_8B])
  parser.add_argument("--parts", type=int, nargs="+", help="of every product; nothing is written")
  parser.add_argument("--seconds", type=float, default=170, help="most time for all")
  parser.add_argument("--out", type=Path, help="the table; default: the device's own")
  options = parser.parse_args(arguments)
  if jax.default_backend() != "gpu":
    print("needs a GPU of compute capability 9.0 and the extra cuda13", file=sys.stderr)
    return 1
  kind = jax.devices()[0].device_kind
  jobs = [
    (matrix, m, parts)
    for matrix in shapes.QWEN3_8B
    if matrix.name in options.names
    for m in options.rows
    for parts in options.parts or [parts_of(matrix, m)]
    if matrix.k % (256 * parts) == 0
  ]
  began, entries, w, of = time.monotonic(), [], None, None
  for done, (matrix, m, parts) in enumerate(jobs):
    if matrix is not of:
      w, of = bench._weights(matrix.n, matrix.k), matrix
    until = began + options.seconds * (done + 1) / len(jobs)
    found = measure(matrix, m, parts, w, until)
    print(f"{matrix.name} {matrix.n}x{matrix.k}, {m} rows, {parts} parts: {len(found)} cuts timed")
    best = {by: next((f for f in found if f[1][0] == by), None) for by in ("mosaic", "triton")}
    for us, candidate in [*found[:3], *(b for b in best.values() if b and b not in found[:3])]:
      print(f"  {us:7.2f} us  {show(candidate)}", flush=True)
    if found:
      entries.append(entry_of(matrix, m, found[0][1]))
  if options.parts or not entries:
    return 0
  keys = {(e.mode, e.m, e.n, e.k) for e in entries}
  kept = [e for e in tuned.load(kind) if (e.mode, e.m, e.n, e.k) not in keys]
  table = sorted([*kept, *entries], key=lambda e: (e.mode, e.m, e.n, e.k))
  path = options.out or tuned.path_for(kind)
  tuned.write(
    path, kind, "python -m experiments.gpu_gemm.run, then experiments.gpu_tiles.run", table
  )
  print(f"written: {path}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
