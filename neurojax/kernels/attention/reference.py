"""Defines attention over the cache in plain JAX; every faster implementation here equals it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from neurojax.config import RopeStyle

MASKED = -1e30
"""Below any score, yet finite: a row of masked keys gives no NaN."""


def attend(
  q_BTNH: Float[Array, "B T N H"],
  k_BSKH: Float[Array, "B S K H"],
  v_BSKH: Float[Array, "B S K H"],
  length_B: Int[Array, "B"] | None = None,
) -> Float[Array, "B T N H"]:
  """Attend causally within one sequence, S = T: query t sees keys 0..t.

  Args:
    length_B: Positions of each row that count; what comes out beyond them has no meaning.
  """
  batch, length = q_BTNH.shape[:2]
  seen_TS = jnp.tril(jnp.ones((length, length), bool))
  seen_BTS = jnp.broadcast_to(seen_TS[None], (batch, length, length))
  if length_B is not None:
    seen_BTS &= (jnp.arange(length)[None] < length_B[:, None])[:, None]
  return _softmax_average(q_BTNH, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2), seen_BTS)


def attend_cache(
  q_BTNH: Float[Array, "B T N H"],
  k_LPKSH: Float[Array, "L P K S H"],
  v_LPKSH: Float[Array, "L P K S H"],
  layer: Int[Array, ""] | int,
  start_B: Int[Array, "B"],
  *,
  slot_B: Int[Array, "B"] | None = None,
) -> Float[Array, "B T N H"]:
  """Attend with T queries over one layer's cache: query t of row b sees keys 0..start_B[b]+t.

  Args:
    slot_B: The slot of each row's keys and values, 0 .. P-1; None: row b has slot b.
  """
  last_BT = start_B[:, None] + jnp.arange(q_BTNH.shape[1])[None]
  seen_BTS = jnp.arange(k_LPKSH.shape[3])[None, None] <= last_BT[:, :, None]
  k_BKSH, v_BKSH = (_rows(c, layer, slot_B, q_BTNH.shape[0]) for c in (k_LPKSH, v_LPKSH))
  return _softmax_average(q_BTNH, k_BKSH, v_BKSH, seen_BTS)


def attend_one(
  q_BNH: Float[Array, "B N H"],
  k_LPKSH: Float[Array, "L P K S H"],
  v_LPKSH: Float[Array, "L P K S H"],
  layer: Int[Array, ""] | int,
  length_B: Int[Array, "B"],
  *,
  slot_B: Int[Array, "B"] | None = None,
) -> Float[Array, "B N H"]:
  """Attend with one query per row over keys 0..length_B[b]-1; zeros where there is none."""
  out_BTNH = attend_cache(q_BNH[:, None], k_LPKSH, v_LPKSH, layer, length_B - 1, slot_B=slot_B)
  return jnp.where(length_B[:, None, None] > 0, out_BTNH[:, 0], 0)


def decode(
  qkv_BX: Float[Array, "B X"],
  k_LPKSH: Float[Array, "L P K S H"],
  v_LPKSH: Float[Array, "L P K S H"],
  layer: Int[Array, ""] | int,
  position_B: Int[Array, "B"],
  *,
  slot_B: Int[Array, "B"] | None = None,
  rotation_B2H: Float[Array, "B 2 H"] | None = None,
  rope_style: RopeStyle = "half",
  norms: tuple[Float[Array, "H"], Float[Array, "H"]] | None = None,
  norm_eps: float = 1e-6,
) -> tuple[Float[Array, "B Y"], Float[Array, "L P K S H"], Float[Array, "L P K S H"]]:
  """Attend for one new token of each sequence, from the projections on, see `api.decode`."""
  num_kv_heads, capacity, width = k_LPKSH.shape[2:]
  x_BMH = qkv_BX.reshape(qkv_BX.shape[0], -1, width).astype(jnp.float32)
  num_heads = x_BMH.shape[1] - 2 * num_kv_heads
  q_BNH, k_BKH, v_BKH = jnp.split(x_BMH, (num_heads, num_heads + num_kv_heads), axis=1)
  if norms is not None:
    q_BNH, k_BKH = _rms_norm(q_BNH, norms[0], norm_eps), _rms_norm(k_BKH, norms[1], norm_eps)
  if rotation_B2H is not None:
    q_BNH, k_BKH = (turn(x, rotation_B2H, rope_style) for x in (q_BNH, k_BKH))

  def put(cache_LPKSH: jax.Array, new_BKH: jax.Array) -> jax.Array:
    row_B = jnp.arange(new_BKH.shape[0]) if slot_B is None else slot_B
    # A position outside the cache is dropped, here and by the kernels: no other row is hurt.
    at_B = jnp.where(position_B < 0, capacity, position_B)
    return cache_LPKSH.at[layer, row_B, :, at_B].set(new_BKH.astype(cache_LPKSH.dtype), mode="drop")

  k_LPKSH, v_LPKSH = put(k_LPKSH, k_BKH), put(v_LPKSH, v_BKH)
  q_BNH = q_BNH.astype(k_LPKSH.dtype)
  out_BNH = attend_one(
    q_BNH.astype(jnp.float32), k_LPKSH, v_LPKSH, layer, position_B + 1, slot_B=slot_B
  )
  return out_BNH.reshape(qkv_BX.shape[0], -1).astype(qkv_BX.dtype), k_LPKSH, v_LPKSH


def rotation(
  position_B: Int[Array, "B"], head_dim: int, *, base: float, style: RopeStyle
) -> Float[Array, "B 2 H"]:
  """Compute cosine and signed sine for each element of a head: x * cos + x[partner] * sin turns it.

  The same for all layers: compute it once in a step.
  Source: arXiv:2104.09864, section 3.4.2; pair i turns by position * base**(-2i/H).
  """
  frequency_P = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
  sign_2 = np.array([-1.0, 1.0])
  if style == "half":
    frequency_H, sign_H = np.tile(frequency_P, 2), np.repeat(sign_2, head_dim // 2)
  else:
    frequency_H, sign_H = np.repeat(frequency_P, 2), np.tile(sign_2, head_dim // 2)
  angle_BH = position_B[:, None].astype(jnp.float32) * jnp.asarray(frequency_H, jnp.float32)[None]
  sin_BH = jnp.sin(angle_BH) * jnp.asarray(sign_H, jnp.float32)[None]
  return jnp.stack([jnp.cos(angle_BH), sin_BH], axis=1)


def partner(element_H: Int[Array, "H"], head_dim: int, style: RopeStyle) -> Int[Array, "H"]:
  """Find the other element of each element's pair. `head_dim` is a power of two."""
  return element_H ^ (head_dim // 2 if style == "half" else 1)


def turn(
  x_BNH: Float[Array, "B N H"], rotation_B2H: Float[Array, "B 2 H"], style: RopeStyle
) -> Float[Array, "B N H"]:
  """Turn heads by the angles of `rotation`, in float32."""
  x_BNH = x_BNH.astype(jnp.float32)
  head_dim = x_BNH.shape[-1]
  if style == "half":
    other_BNH = jnp.roll(x_BNH, head_dim // 2, axis=-1)
  else:
    other_BNH = jnp.flip(x_BNH.reshape(*x_BNH.shape[:-1], -1, 2), axis=-1).reshape(x_BNH.shape)
  return x_BNH * rotation_B2H[:, :1] + other_BNH * rotation_B2H[:, 1:]


def _rms_norm(x_BNH: jax.Array, scale_H: jax.Array, eps: float) -> jax.Array:
  x_BNH = x_BNH * lax.rsqrt(jnp.mean(x_BNH * x_BNH, axis=-1, keepdims=True) + eps)
  return x_BNH * scale_H.astype(jnp.float32)[None, None]


def _rows(
  cache_LPKSH: jax.Array, layer: jax.Array | int, slot_B: jax.Array | None, batch: int
) -> jax.Array:
  """Take the keys, or values, of each row: [B, K, S, H]."""
  if slot_B is None:
    return lax.dynamic_index_in_dim(cache_LPKSH, layer, keepdims=False)[:batch]
  return cache_LPKSH[layer, slot_B]


def _softmax_average(
  q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, seen_BTS: jax.Array
) -> jax.Array:
  batch, length, _, width = q_BTNH.shape
  q_BTKGH = q_BTNH.astype(jnp.float32).reshape(batch, length, k_BKSH.shape[1], -1, width)
  score_BKGTS = _dot("BTKGH,BKSH->BKGTS", q_BTKGH, k_BKSH) * width**-0.5
  score_BKGTS = jnp.where(seen_BTS[:, None, None], score_BKGTS, MASKED)
  weight_BKGTS = jax.nn.softmax(score_BKGTS, axis=-1)
  # A weight of zero does not silence a NaN or an infinity: unseen values must not enter the sum.
  v_BKSH = jnp.where(seen_BTS.any(axis=1)[:, None, :, None], v_BKSH, 0)
  out_BTKGH = _dot("BKGTS,BKSH->BTKGH", weight_BKGTS, v_BKSH)
  return out_BTKGH.reshape(q_BTNH.shape).astype(q_BTNH.dtype)


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  return jnp.einsum(spec, a, b, precision=lax.Precision.HIGHEST)
