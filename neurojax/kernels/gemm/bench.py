"""Times each implementation of a product with ternary weights, beside XLA with bfloat16 weights.

One call on the device is timed: a loop whose body multiplies by each of several distinct weights,
together far more bytes than the L2 cache holds. The activations of a round depend on the results of
the round before, so that no product can be dropped, shared or moved out of the loop. Activations are
prepared (rounded, reordered) once a round, which counts little.
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
from neurojax.kernels.gemm import mosaic, reference, shapes, tuned
from neurojax.weights.ternary import CODE_BYTES, Mode, TernaryArray

GROUP = 128
"""Weights that share a float16 scale: 2.125 bits per weight."""

ROWS = {"gpu": (1, 8, 64, 2048), "cpu": (1, 8)}
"""Activation rows that are measured if nothing else is asked for: 1 is decode, many are prefill."""

_CACHED_BYTES = {"gpu": 1 << 28, "cpu": 1 << 26}
"""Least bytes of distinct weights: several times a GPU's L2 cache; on a CPU more than most last caches."""

_MOST_WEIGHTS = 64
"""Most distinct weights. Each is a product in the program, and more would compile long; so small
matrices may fit a cache."""

_SECONDS = 0.01
"""Least seconds of a call, by an estimate from the device's own rates."""

_OUTPUT_BYTES = 1 << 30
"""Most bytes of results of a round."""


Multiply = Callable[[Array, TernaryArray, Array], Array]
"""(x [M, K], stacked weights, index) to [M, N]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One line of results.csv; times are medians over the runs, activations standard normal.

  Attributes:
    bytes_per_s: Bytes of codes and scales read per second; for XLA, of bfloat16 weights.
    read_fraction, matmul_fraction: bytes_per_s and flops_per_s as shares of what the device does at
      best, see `Rates`. The larger is the share of the bound.
    speedup: Time of XLA with bfloat16 weights, in the same run, over this time.
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

  @property
  def bound_fraction(self) -> float:
    """The least time that memory and matrix units allow, over the time taken."""
    return max(self.read_fraction, self.matmul_fraction)


COLUMNS = {
  "      n x k": lambda row: f"{row.n}x{row.k}",
  "rows": lambda row: str(row.rows),
  "weights": lambda row: row.weights,
  "              by": lambda row: row.implementation,
  "us": lambda row: f"{row.us:.1f}",
  "GB/s": lambda row: f"{row.bytes_per_s / 1e9:.1f}",
  "of read": lambda row: f"{row.read_fraction:.0%}",
  "GFLOP/s": lambda row: f"{row.flops_per_s / 1e9:.0f}",
  "of bf16": lambda row: f"{row.matmul_fraction:.0%}",
  "bound us": lambda row: f"{row.us * row.bound_fraction:.1f}",
  "of it": lambda row: f"{row.bound_fraction:.0%}",
  "speedup": lambda row: f"{row.speedup:.2f}x",
}


def defaults() -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
  """The shapes (n, k) and rows that suit the default device: those of an 8B model, or small ones."""
  on_gpu = jax.default_backend() == "gpu"
  matrices = shapes.QWEN3_8B if on_gpu else shapes.SMALL
  return tuple((m.n, m.k) for m in matrices), ROWS["gpu" if on_gpu else "cpu"]


def run(
  products: Sequence[tuple[int, int]],
  rows: Sequence[int],
  modes: Sequence[Mode] = ("w2a8", "w2a16"),
  *,
  rates: timing.Rates | None = None,
  runs: int = 5,
  most_s: float | None = None,
  skipped: Callable[[str], None] = print,
) -> Iterator[Row]:
  """Measure every product with every number of rows, XLA first.

  Args:
    products: (n, k) of each weight: output channels and contracted elements.
    rates: None: measured now.
    most_s: Refuse work that takes longer than so many seconds even at the bound; None: any is done.
    skipped: Called with a line about each product that an implementation does not do.
  Raises: ValueError: a number below 1, or more work than `most_s` allows.
  """
  if any(number < 1 for number in (*rows, *(side for product in products for side in product))):
    raise ValueError(f"shapes {tuple(products)}, rows {tuple(rows)}: positive numbers")
  rates = rates or timing.rates()
  if most_s is not None:
    _check_work(products, rows, modes, rates, runs, most_s)
  for n, k in products:
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


def _check_work(
  products: Sequence[tuple[int, int]],
  rows: Sequence[int],
  modes: Sequence[Mode],
  rates: timing.Rates,
  runs: int,
  most_s: float,
) -> None:
  """Refuse what would take more than `most_s` even if every call ran at the bound."""
  work_s = 0.0
  for n, k in products:
    for m in rows:
      for count, nbytes in ((1, 2 * n * k), (2 * len(modes), n * k // 4)):
        least_s = _bound_s(m, n, k, nbytes, rates)
        stack = max(1, min(_distinct(nbytes), _OUTPUT_BYTES // (4 * m * n)))
        work_s += count * (runs + 1) * _rounds(stack * least_s) * stack * least_s
  if work_s > most_s:
    raise ValueError(
      f"this would take {work_s / 60:.0f} minutes on {timing.device_name()} at the very least: name"
      " fewer or smaller --shapes (2048x2048), fewer --rows, or --repetitions 1"
    )


def report(rows: Sequence[Row]) -> str:
  """A table, under the device and what it does at best. GB/s are of weights as they are stored."""
  lines = [timing.line(row, COLUMNS) for row in rows]
  return "\n".join([timing.headline(rows[0]), timing.titles(COLUMNS), *lines])


_TUNED = {"mosaic": "mosaic", "triton": "triton", "dequantise + xla": "triton", "cpu": "cpu"}
"""The name that `api` has for each implementation here; its "triton" writes weights out by itself."""


def fastest(rows: Sequence[Row]) -> list[tuned.Entry]:
  """The implementation that `api` should choose, for each product that was measured."""
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
  """The implementations that the default device has for m rows, by name."""
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

    if cpu.why_not(m, w.contraction.n, w.contraction.k, w) is None:
      found["cpu"] = lambda x, w, i: cpu.matmul(x, w, layer=i)
  return found


def dense_s(m: int, n: int, k: int, rates: timing.Rates, runs: int = 5) -> float:
  """Seconds of XLA's product of m rows with bfloat16 weights of n channels that no cache holds."""
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
    weights: Distinct weights, stacked or in a list.
    nbytes, n: Bytes and output channels of one weight.
  """
  m, k = x.shape
  stack = len(weights) if isinstance(weights, list) else weights.codes.shape[0]
  stack = max(1, min(stack, _OUTPUT_BYTES // (4 * m * n)))
  rounds = _rounds(stack * _bound_s(m, n, k, nbytes, rates))

  def loop(x: Array, weights: Any) -> Array:
    def body(_: Array, x: Array) -> Array:
      ys = [multiply(x, weights, i) for i in range(stack)]
      # Far below a bfloat16's last bit, but XLA cannot know.
      return x + (sum(y[0, 0] for y in ys) * 1e-30).astype(x.dtype)

    return lax.fori_loop(0, rounds, body, x)

  return timing.seconds(jax.jit(loop), x, weights, runs=runs) / (rounds * stack)


def _distinct(nbytes: int) -> int:
  """The number of distinct weights of `nbytes` that no cache holds together."""
  return min(_MOST_WEIGHTS, -(-_CACHED_BYTES.get(jax.default_backend(), 1 << 26) // nbytes))


def _bound_s(m: int, n: int, k: int, nbytes: float, rates: timing.Rates) -> float:
  """Seconds of one product at what the device does at best."""
  return max(nbytes / rates.read_bytes_per_s, 2 * m * n * k / rates.bf16_flops_per_s)


def _rounds(round_s: float) -> int:
  """Rounds of a timed call."""
  return max(2, math.ceil(_SECONDS / round_s))


def _mosaic(x: Array, w: TernaryArray, index: Any) -> Array:
  return mosaic.matmul(x, w, jnp.int32(index))


def _xla(x: Array, w: Array) -> Array:
  return jnp.einsum("mk,nk->mn", x, w, preferred_element_type=jnp.float32)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def random_rows(key: Array, count: int, n: int, k: int) -> tuple[Array, Array]:
  """Codes and scales of `count` stacked matrices: -s, 0 and s with (nearly) equal chances.

  Scales are such that a product keeps the size of its input, and differ by up to a factor of three.

  Args:
    key: A key of the generator "rbg", the hardware's, which makes billions of codes in a moment.
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
  count = _distinct(n * k // 4)
  rows = random_rows(jax.random.key(0, impl="rbg"), count, n, k)
  return TernaryArray(*rows, (k, n), 1, GROUP)


def _dense(n: int, k: int) -> list[Array]:
  """Distinct weights as separate arrays: of a stack, XLA would copy a slice for its library's product."""
  count = max(2, _distinct(2 * n * k))
  one = jax.jit(lambda key: jax.random.normal(key, (n, k), jnp.bfloat16))
  return [one(key) for key in jax.random.split(jax.random.key(0, impl="rbg"), count)]
