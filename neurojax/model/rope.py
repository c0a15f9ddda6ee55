"""Rotary position embeddings, arXiv:2104.09864."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from neurojax.config import RopeStyle


def rotate(
  x_BTNH: Float[Array, "B T N H"], position_BT: Int[Array, "B T"], *, base: float, style: RopeStyle
) -> Float[Array, "B T N H"]:
  """Turn pair i of each head by the angle `position * base**(-2i/H)`, in float32.

  Args:
    position_BT: Absolute positions, exact below 2**24.
    style: "interleaved" pairs elements (2i, 2i+1), "half" pairs (i, i + H/2).
  Returns: The dtype of `x_BTNH`.
  Source: arXiv:2104.09864, section 3.4.2.
  """
  head_dim = x_BTNH.shape[-1]
  frequency = jnp.asarray(
    base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim), jnp.float32
  )
  angle = position_BT[:, :, None, None].astype(jnp.float32) * frequency[None, None, None, :]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  x = x_BTNH.astype(jnp.float32)
  if style == "interleaved":
    pair = x.reshape(*x.shape[:-1], head_dim // 2, 2)
    a, b = pair[..., 0], pair[..., 1]
    turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)
  else:
    a, b = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
  return turned.astype(x_BTNH.dtype)
