"""Times one token through a span of layers as one kernel, beside the reference as XLA compiles it.

The reference computes the same with the same packed weights. Whole models, and XLA with bfloat16
weights beside them, are measured by `measure.speed.stage`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from neurojax.forms import capacity_for
from neurojax.kernels import timing
from neurojax.kernels.attention.api import rotation
from neurojax.kernels.decode import api
from neurojax.kernels.decode.shapes import SHAPES, Shape
from neurojax.kernels.decode.weights import LayerWeights
from neurojax.kernels.gemm.bench import GROUP, random_rows
from neurojax.weights.ternary import Mode, TernaryArray

_STEPS = 16
"""Tokens in one call, each at the same position."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One line of a results file; times are medians over the runs.

  Attributes:
    length: Keys that the token attends over.
    us: One token through all layers.
    bytes_per_s: Bytes of weights, keys and values read per second.
    read_fraction: bytes_per_s as a share of what the device reads at best: the share of the bound.
    speedup: Time of the reference, compiled by XLA in the same run, over this time.
  """

  shape: str
  layers: int
  length: int
  implementation: str
  us: float
  bytes_per_s: float
  read_fraction: float
  speedup: float
  read_bytes_per_s: float
  copy_bytes_per_s: float
  bf16_flops_per_s: float
  device: str
  jax: str
  jaxlib: str
  date: str


COLUMNS = {
  "         shape": lambda row: row.shape,
  "layers": lambda row: str(row.layers),
  "keys": lambda row: str(row.length),
  "       by": lambda row: row.implementation,
  "us": lambda row: f"{row.us:.1f}",
  "GB/s": lambda row: f"{row.bytes_per_s / 1e9:.1f}",
  "bound us": lambda row: f"{row.us * row.read_fraction:.1f}",
  "of it": lambda row: f"{row.read_fraction:.0%}",
  "speedup": lambda row: f"{row.speedup:.2f}x",
}


def run(
  shapes: dict[str, Shape] = SHAPES,
  lengths: Sequence[int] = (128, 2048),
  *,
  layers: int = 8,
  rates: timing.Rates | None = None,
  runs: int = 5,
  skipped: Callable[[str], None] = print,
) -> Iterator[Row]:
  """Measure every shape with every number of keys, the reference first.

  Args:
    layers: Layers of random weights; their codes should not fit a cache.
    rates: None: measured now.
    skipped: Called with a line about each shape that an implementation does not do.
  """
  rates = rates or timing.rates()
  for name, shape in shapes.items():
    weights = random_layers(shape, layers, "w2a8", jax.random.key(0, impl="rbg"))
    for length in lengths:
      nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
      nbytes += layers * 2 * 2 * length * shape.k * shape.h
      reference_s = None
      for implementation in ("reference", "triton"):
        if implementation == "triton" and jax.default_backend() != "gpu":
          continue
        try:
          token_s = step_s(weights, length, implementation, runs)
        except NotImplementedError as error:
          skipped(f"{name}, {implementation}: {error}")
          continue
        reference_s = reference_s or token_s
        yield Row(
          shape=name,
          layers=layers,
          length=length,
          implementation=implementation,
          us=token_s * 1e6,
          bytes_per_s=nbytes / token_s,
          read_fraction=nbytes / token_s / rates.read_bytes_per_s,
          speedup=reference_s / token_s,
          **dataclasses.asdict(rates),
          **timing.origin(),
        )


def step_s(
  weights: LayerWeights, length: int, implementation: api.Implementation, runs: int = 5
) -> float:
  """Seconds of one token through the layers after `length - 1` others."""
  s = weights.shape
  position = jnp.int32(length - 1)
  rotation_B2H = rotation(position[None], s.h, base=1e6, style="half")
  cache = (weights.num_layers, 1, s.k, capacity_for(length), s.h)

  def loop(x_D: Array, weights: LayerWeights, keys: Array, values: Array) -> Array:
    def body(_: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
      x_D, keys, values = carry
      # The result is the next input, so that no step can be left out; its size is brought back.
      x_D, _, keys, values = api.decode(
        x_D, weights, keys, values, rotation_B2H, position, implementation=implementation
      )
      return x_D * lax.rsqrt(jnp.mean(x_D * x_D) + 1e-6), keys, values

    return lax.fori_loop(0, _STEPS, body, (x_D, keys, values))[0]

  x_D = jax.random.normal(jax.random.key(0), (s.d,))
  caches = [jax.random.normal(jax.random.key(i), cache, jnp.bfloat16) for i in (1, 2)]
  return timing.seconds(jax.jit(loop), x_D, weights, *caches, runs=runs) / _STEPS


def report(rows: Sequence[Row]) -> str:
  """A table, under the device and what it does at best."""
  lines = [timing.line(row, COLUMNS) for row in rows]
  return "\n".join([timing.headline(rows[0]), timing.titles(COLUMNS), *lines])


def random_layers(
  shape: Shape, layers: int, mode: Mode, key: Array, *, qk_norm: bool = False
) -> LayerWeights:
  """Layers of `random_rows` and of norms that are ones, made on the device.

  Args:
    key: A key of the generator "rbg", or four of them, one for each matrix.
  Raises: ValueError: a contracted width that is no multiple of the group of 128.
  """
  s = shape
  keys = iter(key if key.ndim else jax.random.split(key, 4))
  ones = functools.partial(jnp.ones, dtype=jnp.float32)

  def matrix(n: int, k: int) -> TernaryArray:
    return TernaryArray(*random_rows(next(keys), layers, n, k), (k, n), 1, GROUP, mode)

  return LayerWeights(
    qkv=matrix((s.n + 2 * s.k) * s.h, s.d),
    o=matrix(s.d, s.n * s.h),
    gate_up=matrix(2 * s.f, s.d),
    down=matrix(s.d, s.f),
    attn_norm=ones((layers, s.d)),
    ffn_norm=ones((layers, s.d)),
    q_norm=ones((layers, s.h)) if qk_norm else None,
    k_norm=ones((layers, s.h)) if qk_norm else None,
    shape=s,
  )
