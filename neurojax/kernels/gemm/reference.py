"""Defines the product with ternary weights in plain JAX; every kernel keeps to it."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int, Int8

from neurojax.kernels.gemm.layer import take_out
from neurojax.weights.ternary import LEVEL_MAX, SMALLEST_ABSMAX, TernaryArray

_CHUNK = 512
"""Elements that are unpacked at once where one scale serves them all."""


def quantize_rows(x: Float[Array, "M K"]) -> tuple[Int8[Array, "M K"], Float32[Array, "M"]]:
  """Round each row to int8 by its own absmax. Every operation is one IEEE float32 operation:

    absmax = max |x|;  levels = round_half_even(x * (127 / absmax));  step = absmax * (1 / 127)

  so that x is close to levels * step, and every implementation can have these very bits. (A
  compiler turns a division by 127 into this product; written down, it is the same everywhere.)

  Args:
    x: float32 or narrower.
  Returns: Levels in [-127, 127], and the steps. A row below SMALLEST_ABSMAX has levels 0 and step
    0. A row that holds a NaN or an infinity has levels 0 and step NaN.
  """
  x = x.astype(jnp.float32)
  absmax = jnp.max(jnp.abs(x), axis=1)
  finite = jnp.isfinite(absmax)
  used = finite & (absmax >= SMALLEST_ABSMAX)
  inverse = jnp.where(used, LEVEL_MAX / jnp.where(used, absmax, 1), 0)
  levels = jnp.where(finite[:, None], jnp.round(x * inverse[:, None]), 0).astype(jnp.int8)
  steps = jnp.where(used, absmax * jnp.float32(1 / LEVEL_MAX), 0)
  return levels, jnp.where(finite, steps, jnp.nan)


def matmul(
  x: Float[Array, "M K"], w: TernaryArray, *, layer: Int[Array, ""] | None = None
) -> Float32[Array, "M N"]:
  """Multiply x by the transposed rows of w: float32 `x @ w_NxK.T`.

  With t the codes - 1, s the scales and q a group of elements that share a scale:

    w2a16:  y[m, n] = sum_q s[n, q] * sum_{k in q} x[m, k] * t[n, k]
    w2a8:   y[m, n] = step[m] * sum_q s[n, q] * float32(sum_{k in q} levels[m, k] * t[n, k])

  "w2a16": x in its own dtype, products exact, all sums in float32 in an order of the
  implementation's choice. "w2a8": levels and steps of `quantize_rows`; the inner sum is an exact
  integer (K up to 5 million), rounded once to float32; the products with the scales and the outer
  sum are float32, in an order of the implementation's choice. Either way a row's result does not
  depend on what other rows hold, and a row that holds a NaN or an infinity has no finite result.

  Unpacks one scale group, or [N, 512] where one scale serves all, after another.

  Args:
    x: float32 or bfloat16.
    w: A single matrix, or a stack of them of which `layer` names one.
  """
  w = take_out(w, layer)
  if w.mode == "w2a8":
    levels, steps = quantize_rows(x)
    return _sum_groups(levels.astype(jnp.float32), w) * steps[:, None]
  return _sum_groups(x.astype(jnp.float32), w)


def _sum_groups(x: Float32[Array, "M K"], w: TernaryArray) -> Float32[Array, "M N"]:
  (m, k), n = x.shape, w.codes.shape[0]
  chunk = min(w.group_size or _CHUNK, 4 * w.codes.shape[1])
  count = -(-4 * w.codes.shape[1] // chunk)
  x = jnp.pad(x, ((0, 0), (0, count * chunk - k))).reshape(m, count, chunk)
  # Padded codes meet zeros.
  codes = jnp.pad(w.codes, ((0, 0), (0, count * chunk // 4 - w.codes.shape[1])))
  codes = codes.reshape(n, count, chunk // 4)
  grouped = w.group_size is not None
  scales = w.scales.astype(jnp.float32) if grouped else jnp.ones((1, count), jnp.float32)
  # A float32 sum of a chunk's levels is exact; over all chunks only an integer one need be.
  integers = w.mode == "w2a8" and not grouped

  def add(total: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
    x_MxC, codes_NxB, scales_N = part
    fields = codes_NxB[..., None] >> jnp.arange(0, 8, 2, dtype=jnp.uint8)[None, None] & 3
    t_NxC = (fields.astype(jnp.int8) - 1).astype(jnp.float32).reshape(n, chunk)
    contracted = (((1,), (1,)), ((), ()))
    sums = lax.dot_general(x_MxC, t_NxC, contracted, precision=lax.Precision.HIGHEST)
    if integers:
      return total + sums.astype(jnp.int32), None
    return total + sums * scales_N[None], None

  parts = (jnp.swapaxes(x, 0, 1), jnp.swapaxes(codes, 0, 1), scales.T)
  total = jnp.zeros((m, n), jnp.int32 if integers else jnp.float32)
  total = lax.scan(add, total, parts)[0].astype(jnp.float32)
  return total if grouped else total * w.scales.astype(jnp.float32)
