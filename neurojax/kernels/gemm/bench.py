"""How fast each implementation multiplies by ternary weights, beside XLA with bfloat16 weights.

All in one call on the device: a loop whose body multiplies by each of several distinct weights, far
more bytes together than the L2 cache holds. A round's activations depend on the results of the round
before, so that no product can be dropped, shared or moved out of the loop. Preparing activations
(rounding, order) is done once a round and counts accordingly little.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from neurojax.kernels import timing
from neurojax.kernels.gemm import mosaic, reference, tuned
from neurojax.weights.ternary import CODE_BYTES, Mode, TernaryArray

GROUP = 128
"""Weights that share a float16 scale: 2.125 bits per weight."""

SHAPES = ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (151936, 4096))
"""(n, k): the products of a layer of Qwen3-8B, with what shares an input in one, and its head."""

_CACHED_BYTES = 1 << 28
"""Of distinct weights at least: several times an L2 cache."""

_MOST_WEIGHTS = 64
"""Each is a product in the program: small matrices may fit a cache, and more would compile long."""

_SECONDS = 0.01
"""Of a call at least, by an estimate from the device's own rates."""

_OUTPUT_BYTES = 1 << 30
"""Of results of a round at most."""

Multiply = Callable[[Array, TernaryArray, Array], Array]
"""(x [M, K], stacked weights, index) to [M, N]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One line of results.csv; times are medians over the runs, activations standard normal.

  Attributes:
    bytes_per_s: Of codes and scales; for XLA, of bfloat16 weights.
    read_fraction, matmul_fraction: Of what the device does at best, see `Rates`.
    speedup: Over XLA with bfloat16 weights, in the same run.
  """

  n: int
  k: int
  rows: int
  weights: str
  implementation: str
  us: float
  bytes_per_s: float
  flops_per_s: float
  read_fraction: float
  matmul_fraction: float
  speedup: float
  read_bytes_per_s: float
  copy_bytes_per_s: float
  bf16_flops_per_s: float
  device: str
  jax: str
  jaxlib: str
  date: str


COLUMNS = {
  "n x k": lambda row: f"{row.n}x{row.k}",
  "rows": lambda row: str(row.rows),
  "weights": lambda row: row.weights,
  "by": lambda row: row.implementation,
  "us": lambda row: f"{row.us:.1f}",
  "GB/s": lambda row: f"{row.bytes_per_s / 1e9:.1f}",
  "of read": lambda row: f"{row.read_fraction:.0%}",
  "GFLOP/s": lambda row: f"{row.flops_per_s / 1e9:.0f}",
  "of bf16": lambda row: f"{row.matmul_fraction:.0%}",
  "speedup": lambda row: f"{row.speedup:.2f}x",
}


def run(
  shapes: Sequence[tuple[int, int]] = SHAPES,
  rows: Sequence[int] = (1, 8, 64, 2048),
  modes: Sequence[Mode] = ("w2a8", "w2a16"),
  *,
  rates: timing.Rates | None = None,
  runs: int = 5,
  skipped: Callable[[str], None] = print,
) -> Iterator[Row]:
  """Measure every shape with every number of rows, XLA first.

  Args:
    rates: None: measured now.
    skipped: Told of each product that an implementation does not do.
  Raises: ValueError: a number below 1.
  """
  if any(number < 1 for number in (*rows, *(side for shape in shapes for side in shape))):
    raise ValueError(f"shapes {tuple(shapes)}, rows {tuple(rows)}: positive numbers")
  rates = rates or timing.rates()
  for n, k in shapes:
    packed = _weights(n, k)
    dense = _dense(n, k)
    row = functools.partial(_row, n, k, rates)
    for m in rows:
      x = jax.random.normal(jax.random.key(m), (m, k), jnp.bfloat16)

      bf16_s = _dense_s(x, dense, rates, runs)
      yield row(m, "bf16", "xla", bf16_s, dense[0].nbytes, bf16_s)
      for mode in modes:
        weights = dataclasses.replace(packed, mode=mode)
        nbytes = weights.nbytes / weights.codes.shape[0]
        for name, multiply in implementations(m, weights).items():
          try:
            # Under `jit`, so that a loop of many products traces one.
            seconds = product_s(jax.jit(multiply), x, weights, nbytes, n, rates, runs)
          except (NotImplementedError, ValueError, jax.errors.JaxRuntimeError) as error:
            skipped(f"{n}x{k}, {m} rows, {mode}, {name}: {str(error).splitlines()[0][:200]}")
            continue
          yield row(m, mode, name, seconds, nbytes, bf16_s)


def _row(
  n: int,
  k: int,
  rates: timing.Rates,
  m: int,
  weights: str,
  implementation: str,
  product_s: float,
  nbytes: float,
  bf16_s: float,
) -> Row:
  bytes_per_s, flops_per_s = nbytes / product_s, 2 * m * n * k / product_s
  return Row(
    n=n,
    k=k,
    rows=m,
    weights=weights,
    implementation=implementation,
    us=product_s * 1e6,
    bytes_per_s=bytes_per_s,
    flops_per_s=flops_per_s,
    read_fraction=bytes_per_s / rates.read_bytes_per_s,
    matmul_fraction=flops_per_s / rates.bf16_flops_per_s,
    speedup=bf16_s / product_s,
    **dataclasses.asdict(rates),
    **timing.origin(),
  )


def describe(rows: Sequence[Row]) -> str:
  """A table, under what it was measured on."""
  row = rows[0]
  return (
    f"{row.device}, jax {row.jax}, jaxlib {row.jaxlib}, {row.date}; GB/s are of weights as stored"
    f"\nat best: read {row.read_bytes_per_s / 1e9:.1f} GB/s, copy"
    f" {row.copy_bytes_per_s / 1e9:.1f} GB/s, bf16 product {row.bf16_flops_per_s / 1e9:.0f}"
    f" GFLOP/s\n{timing.table(rows, COLUMNS)}"
  )


_TUNED = {"mosaic": "mosaic", "triton": "triton", "dequantise + xla": "triton", "cpu": "cpu"}
"""What `api` calls an implementation; it writes a weight out for many rows by itself."""


def fastest(rows: Sequence[Row]) -> list[tuned.Entry]:
  """For each product that was measured, the implementation that `api` should choose."""
  best: dict[tuple[str, int, int, int], Row] = {}
  for row in rows:
    key = (row.weights, row.rows, row.n, row.k)
    if row.implementation in _TUNED and (key not in best or row.us < best[key].us):
      best[key] = row
  return [
    tuned.Entry(mode, m, n, k, _TUNED[row.implementation], {})
    for (mode, m, n, k), row in sorted(best.items())
  ]


def implementations(m: int, w: TernaryArray) -> dict[str, Multiply]:
  """What the default device can multiply m rows with, by name."""
  platform = jax.devices()[0].platform
  if platform == "gpu":
    from neurojax.kernels.gemm import triton

    found: dict[str, Multiply] = {"mosaic": _mosaic}
    if m <= 64:
      found["triton"] = lambda x, w, i: triton.matmul(x, w, layer=i)
    if m >= 256:
      found["dequantise + xla"] = lambda x, w, i: triton.prefill(x, w, layer=i)
    return found
  found = {"reference": lambda x, w, i: reference.matmul(x, w, layer=i)}
  if platform == "cpu":
    from neurojax.kernels.gemm import cpu

    if cpu.supports(m, w.contraction.n, w.contraction.k, w) is None:
      found["cpu"] = lambda x, w, i: cpu.matmul(x, w, layer=i)
  return found


def dense_s(m: int, n: int, k: int, rates: timing.Rates, runs: int = 5) -> float:
  """Seconds of XLA's product of m rows with bfloat16 weights of n channels, none in a cache."""
  x = jax.random.normal(jax.random.key(m), (m, k), jnp.bfloat16)
  return _dense_s(x, _dense(n, k), rates, runs)


def _dense_s(x: Array, dense: list[Array], rates: timing.Rates, runs: int) -> float:
  n, nbytes = dense[0].shape[0], dense[0].nbytes
  return product_s(lambda x, w, i: _xla(x, w[i]), x, dense, nbytes, n, rates, runs)


def product_s(
  multiply: Callable[[Array, Any, Array], Array],
  x: Array,
  weights: Any,
  nbytes: float,
  n: int,
  rates: timing.Rates,
  runs: int,
) -> float:
  """Seconds of one product.

  Args:
    weights: A stack, or a list, of distinct ones.
    nbytes, n: Of one weight: bytes and output channels.
  """
  m, k = x.shape
  stack = len(weights) if isinstance(weights, list) else weights.codes.shape[0]
  stack = max(1, min(stack, _OUTPUT_BYTES // (4 * m * n)))
  bound_s = max(nbytes / rates.read_bytes_per_s, 2 * m * n * k / rates.bf16_flops_per_s)
  rounds = max(2, math.ceil(_SECONDS / (stack * bound_s)))

  def loop(x: Array, weights: Any) -> Array:
    def body(_: Array, x: Array) -> Array:
      ys = [multiply(x, weights, i) for i in range(stack)]
      # Far below a bfloat16's last bit, but XLA cannot know.
      return x + (sum(y[0, 0] for y in ys) * 1e-30).astype(x.dtype)

    return lax.fori_loop(0, rounds, body, x)

  return timing.seconds(jax.jit(loop), x, weights, runs=runs) / (rounds * stack)


def _mosaic(x: Array, w: TernaryArray, index: Any) -> Array:
  return mosaic.matmul(x, w, jnp.int32(index))


def _xla(x: Array, w: Array) -> Array:
  return jnp.einsum("mk,nk->mn", x, w, preferred_element_type=jnp.float32)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def random_rows(key: Array, count: int, n: int, k: int) -> tuple[Array, Array]:
  """Codes and scales of `count` stacked matrices: -s, 0 and s with (nearly) equal chances.

  Scales are such that a product keeps the size of its input, and differ by up to a factor of three.

  Args:
    key: Of the generator "rbg", the hardware's: billions of codes in a moment.
  Raises: ValueError: k is no multiple of the group of 128.
  """
  if k % GROUP:
    raise ValueError(f"{k} contracted elements: random weights come in groups of {GROUP}")

  def one(key: Array) -> tuple[Array, Array]:
    bits, uniform = jax.random.split(key)
    codes = jnp.asarray(CODE_BYTES)[jax.random.bits(bits, (n, k // 4), jnp.uint8) % 81]
    scales = jax.random.uniform(uniform, (n, k // GROUP), minval=0.5, maxval=1.5)
    # Two thirds of the weights are not zero: the sum of their squares over a row is about 1.
    return codes, (scales * (1.5 / k) ** 0.5).astype(jnp.float16)

  return lax.map(one, jax.random.split(key, count))


def _weights(n: int, k: int) -> TernaryArray:
  """Distinct weights, stacked."""
  count = min(_MOST_WEIGHTS, -(-_CACHED_BYTES // (n * k // 4)))
  rows = random_rows(jax.random.key(0, impl="rbg"), count, n, k)
  return TernaryArray(*rows, (k, n), 1, GROUP)


def _dense(n: int, k: int) -> list[Array]:
  """As separate arrays: XLA would copy a slice of a stack for its library's product."""
  count = max(2, min(_MOST_WEIGHTS, -(-_CACHED_BYTES // (2 * n * k))))
  one = jax.jit(lambda key: jax.random.normal(key, (n, k), jnp.bfloat16))
  return [one(key) for key in jax.random.split(jax.random.key(0, impl="rbg"), count)]
