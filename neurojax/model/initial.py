"""What parameters are before a file or a training run fills them."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

_STD = 0.02


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: DTypeLike) -> nnx.Param:
  return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(_STD, dtype))


def zeros(shape: tuple[int, ...], dtype: DTypeLike) -> nnx.Param:
  return nnx.Param(jnp.zeros(shape, dtype))
