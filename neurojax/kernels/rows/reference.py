"""Defines the products of a few rows in plain JAX; the kernel keeps to it.

Plain numbers and grouped integers: y[m, n] = sum_k x[m, k] * w[n, k] in float32, where w is what the
matrix dequantises to, with each operation of its definition rounded once. The order of the sums is the
implementation's choice, but it is one order for every number of rows.

Int8: with levels the least of all weights of a call,

    step = absmax * (1 / levels);  q = round_half_even(x * (1 / step))
    y[m, n] = float32(sum_k q[m, k] * codes[n, k]) * (step[m] * scales[n])

and the sum is an exact integer. A row that holds a NaN or an infinity becomes NaN; where step is 0, q is.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from neurojax.weights.contraction import Contraction
from neurojax.weights.int8 import Int8Array


def matmul_all(
  x: Float[Array, "M K"], weights: list[tuple[Any, Contraction]]
) -> list[Float32[Array, "M N"]]:
  """Multiplies x by each weight, all of them held alike; a contraction says which axes are summed."""
  x = x.astype(jnp.float32)
  if isinstance(weights[0][0], Int8Array):
    return _int8(x, [w for w, _ in weights])
  return [_floats(x, w, c) for w, c in weights]


def _floats(x: Array, w: Any, c: Contraction) -> Array:
  w = w if isinstance(w, jax.Array) else w.dequantize()
  flat = w.astype(jnp.float32).reshape((c.k, c.n) if c.contracted_axes > 0 else (c.n, c.k))
  axis = 0 if c.contracted_axes > 0 else 1
  return lax.dot_general(x, flat, (((1,), (axis,)), ((), ())), precision=lax.Precision.HIGHEST)


def _int8(x: Array, weights: list[Int8Array]) -> list[Array]:
  levels = jnp.min(jnp.stack([w.levels for w in weights]))
  absmax = jnp.max(jnp.abs(x), axis=1, keepdims=True)
  step = absmax * jnp.broadcast_to(1 / levels, absmax.shape)
  finite = jnp.isfinite(absmax)
  used = finite & (step > 0)
  inverse = jnp.where(used, 1 / jnp.where(used, step, 1), 0)
  q = jnp.where(finite, jnp.round(jnp.where(finite, x, 0) * inverse), 0).astype(jnp.int32)
  step = jnp.where(finite, step, jnp.nan)
  out = []
  for w in weights:
    codes = w.codes.reshape(-1, w.codes.shape[-1]).astype(jnp.int32)
    sums = jnp.einsum("mk,nk->mn", q, codes, preferred_element_type=jnp.int32)
    y = sums.astype(jnp.float32) * (step * w.scales.reshape(1, -1))
    out.append(y[:, : w.contraction.n])
  return out
