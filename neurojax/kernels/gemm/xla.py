"""Multiplies a few rows in a form that XLA:CPU turns into passes over the packed codes alone.

All sums are of integers, which LLVM may reorder and so vectorises. "w2a8" has integers already;
in "w2a16" a row of x becomes two, of the 15 bits below its absmax and of the 15 bits below those.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int, Int32, Shaped, UInt8

from neurojax.kernels.gemm import reference
from neurojax.kernels.gemm.layer import take_out
from neurojax.weights.ternary import Mode, TernaryArray

MAX_ROWS: dict[Mode, int] = {"w2a8": 8, "w2a16": 4}
"""Most rows of each mode: with more it is faster to unpack the weights."""

# Channels that one loop multiplies a row by.
_LANES = 4
# Elements summed in int32: 64 * 3 * level * elements stays inside it.
_ELEMENTS = {"w2a8": 2**16, "w2a16": 2**8}
_BITS = 15
_MIN_EXPONENT = -80  # 2**(_MIN_EXPONENT - 2 * _BITS) is a normal float32


def why_not(m: int, n: int, k: int, w: TernaryArray) -> str | None:
  """Why the reference is the better choice, or None."""
  del n, k
  return f"{m} rows, more than {MAX_ROWS[w.mode]}" if m > MAX_ROWS[w.mode] else None


def matmul(
  x: Float[Array, "M K"], w: TernaryArray, *, layer: Int[Array, ""] | None = None
) -> Float32[Array, "M N"]:
  """Multiply as `reference.matmul`, but round each x of "w2a16" by less than 2**-28 of its row's absmax.

  More than MAX_ROWS rows are left to the reference.
  """
  m, k = x.shape[0], 4 * w.codes.shape[-1]
  if not 0 < m <= MAX_ROWS[w.mode]:
    return reference.matmul(x, w, layer=layer)
  w = take_out(w, layer)
  x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, k - x.shape[1])))
  group = w.group_size or k
  chunk = math.gcd(k, group)
  chunk = chunk if chunk <= _ELEMENTS[w.mode] else math.gcd(chunk, _ELEMENTS[w.mode])
  scales = w.scales.astype(jnp.float32)[None]
  if w.mode == "w2a8":
    levels, steps = reference.quantize_rows(x)
    sums = _sum_groups(_chunk_sums(w.codes, levels.astype(jnp.int32), chunk), group // chunk)
    return _sum_last(sums.astype(jnp.float32) * scales) * steps[:, None]
  levels, steps = _two_levels(x)
  high, low = jnp.split(_chunk_sums(w.codes, levels, chunk).astype(jnp.float32) * steps, 2)
  return _sum_last(_sum_groups(high + low, group // chunk) * scales)


def _two_levels(x: Float32[Array, "M K"]) -> tuple[Int32[Array, "R K"], Float32[Array, "R 1 1"]]:
  """Split each row into two of integers: x is the first M levels * steps plus the last M."""
  absmax = jnp.max(jnp.abs(x), axis=1, keepdims=True)
  finite = jnp.isfinite(absmax)
  exponent = jnp.maximum(jnp.frexp(jnp.where(finite, absmax, 1))[1], _MIN_EXPONENT)
  scaled = jnp.where(finite, x, 0) * jnp.ldexp(jnp.float32(1), _BITS - exponent)
  high = jnp.round(scaled)
  low = jnp.round((scaled - high) * 2**_BITS)
  steps = [jnp.ldexp(jnp.float32(1), exponent - bits) for bits in (_BITS, 2 * _BITS)]
  steps = jnp.concatenate([jnp.where(finite, step, jnp.nan) for step in steps])
  return jnp.concatenate([high, low]).astype(jnp.int32), steps[:, :, None]


def _chunk_sums(
  codes: UInt8[Array, "N Y"], levels: Int32[Array, "R K"], chunk: int
) -> Int32[Array, "R N C"]:
  """Sum levels times (codes - 1) over each `chunk` elements."""
  n, rows = codes.shape[0], levels.shape[0]
  # Field j of a byte stays where it is, 2j bits up: its levels make up for the other 6 - 2j.
  by_field = jnp.moveaxis(levels.reshape(rows, -1, chunk // 4, 4), -1, 0)
  fields = [[row << 6 - 2 * j for row in by_field[j]] for j in range(4)]
  ones = levels.reshape(rows, 1, -1, chunk).sum(-1)
  # A barrier, lest they be computed anew for every few channels.
  fields, ones = lax.optimization_barrier((fields, ones))
  parts = []
  for start, stop, lanes in ((0, n - n % _LANES, _LANES), (n - n % _LANES, n, 1)):
    height = (stop - start) // lanes
    if height:
      lane_codes = [
        codes[start + i * height : start + (i + 1) * height].reshape(height, -1, chunk // 4)
        for i in range(lanes)
      ]
      sums = [
        _sum_minor(
          [
            sum((c.astype(jnp.int32) & (3 << 2 * j)) * fields[j][row][None] for j in range(4))
            for c in lane_codes
          ]
        )
        for row in range(rows)
      ]
      parts.append(jnp.stack([jnp.concatenate(row) for row in sums]))
  return (jnp.concatenate(parts, axis=1) >> 6) - ones


def _sum_groups(sums: Shaped[Array, "R N C"], count: int) -> Shaped[Array, "R N Q"]:
  """Sum each `count` elements of the last axis; the last group may be shorter."""
  if count == 1:
    return sums
  sums = jnp.pad(sums, ((0, 0), (0, 0), (0, -sums.shape[2] % count)))
  return _sum_last(sums.reshape(*sums.shape[:2], -1, count))


def _sum_last(x: Shaped[Array, "... C"]) -> Shaped[Array, "..."]:
  half = -(-x.shape[-1] // 2)
  if half == 1:
    return x.sum(-1)
  x = jnp.pad(x, (*[(0, 0)] * (x.ndim - 1), (0, 2 * half - x.shape[-1])))
  first, second = _sum_minor([x[..., :half], x[..., half:]])
  return first + second


def _sum_minor(xs: list[jax.Array]) -> list[jax.Array]:
  """Sum each array over its last axis, all in one loop.

  A reduction of several operands is the form that XLA:CPU neither cuts into windows of 32 (which
  writes every product to memory) nor hands to a library.
  """

  def add(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(u + v for u, v in zip(a, b, strict=True))

  zeros = (jnp.zeros((), xs[0].dtype),) * len(xs)
  return list(lax.reduce(tuple(xs), zeros, add, (xs[0].ndim - 1,)))
