"""Root-mean-square normalisation, arXiv:1910.07467."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class RMSNorm(nnx.Module):
  """Root-mean-square norm with a scale, see `rms_norm`."""

  def __init__(self, *dims: int, eps: float, dtype: DTypeLike):
    """Normalises over as many trailing axes as there are `dims`, which are their sizes."""
    self.eps = eps
    self.scale_D = nnx.Param(jnp.ones(dims, dtype))

  def __call__(self, x_BTD: Float[Array, "B T *D"]) -> Float[Array, "B T *D"]:
    return rms_norm(x_BTD, self.scale_D[...], self.eps)


def rms_norm(
  x: Float[Array, "*shape"], scale_D: Float[Array, "*D"], eps: float
) -> Float[Array, "*shape"]:
  """Computes x / sqrt(mean(x**2) + eps) * scale over the trailing axes that `scale_D` has.

  The computation is in float32 whatever the dtype of x, which is returned.
  """
  wide = x.astype(jnp.float32)
  leading = x.ndim - scale_D.ndim
  axes = tuple(range(leading, x.ndim))
  wide = wide * lax.rsqrt(_mean_square(wide, axes) + eps)
  return (wide * scale_D.astype(jnp.float32)[(None,) * leading]).astype(x.dtype)


def normalised(x: Float[Array, "..."], eps: float) -> Float[Array, "..."]:
  """Computes x / sqrt(mean(x**2) + eps) over the last axis, without a scale."""
  wide = x.astype(jnp.float32)
  return (wide * lax.rsqrt(_mean_square(wide, (x.ndim - 1,)) + eps)).astype(x.dtype)


def _mean_square(x: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "..."]:
  """Computes the mean of x**2 over the last axes, which stay with size 1.

  In steps of single tokens, [B, 1, ...], the sum is a tree of additions: its order is said, so that a row
  has the same bits beside any number of others. XLA:CPU orders a reduction by the number of rows.
  """
  square = x * x
  leading = axes[0]
  if leading < 2 or x.shape[1] != 1 or jax.default_backend() != "cpu":
    return jnp.mean(square, axis=axes, keepdims=True)
  square = square.reshape(*x.shape[:leading], -1)
  length = size = square.shape[-1]
  while size > 1:
    half = -(-size // 2)
    beyond = [(0, 0)] * leading + [(0, 2 * half - size)]
    square = square[..., :half] + jnp.pad(square[..., half:], beyond)
    size = half
  return square.reshape(*x.shape[:leading], *(1 for _ in axes)) / length
