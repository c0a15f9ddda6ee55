"""Root-mean-square normalisation, arXiv:1910.07467."""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class RMSNorm(nnx.Module):
  """x / sqrt(mean(x**2) + eps) * scale, in float32 whatever the dtype of x. arXiv:1910.07467."""

  def __init__(self, *dims: int, eps: float, dtype: DTypeLike):
    """Over as many trailing axes as there are `dims`."""
    self.eps = eps
    self.scale_D = nnx.Param(jnp.ones(dims, dtype))

  def __call__(self, x_BTD: Float[Array, "B T *D"]) -> Float[Array, "B T *D"]:
    x = x_BTD.astype(jnp.float32)
    axes = tuple(range(2, x.ndim))
    x = x * lax.rsqrt(jnp.mean(x * x, axis=axes, keepdims=True) + self.eps)
    return (x * self.scale_D[...].astype(jnp.float32)[None, None]).astype(x_BTD.dtype)


def normalised(x: Float[Array, "..."], eps: float) -> Float[Array, "..."]:
  """x / sqrt(mean(x**2) + eps) over the last axis, without a scale."""
  wide = x.astype(jnp.float32)
  return (wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)).astype(x.dtype)
