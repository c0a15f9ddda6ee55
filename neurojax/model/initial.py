"""Initial parameters, before a file or a training run fills them."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

STD = 0.02
"""Standard deviation of every matrix. GPT-2 (Radford et al. 2019, section 2.3)."""


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: DTypeLike) -> nnx.Param:
  """Normal random numbers of standard deviation STD."""
  return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(STD, dtype))


def zeros(shape: tuple[int, ...], dtype: DTypeLike) -> nnx.Param:
  """A parameter of zeros."""
  return nnx.Param(jnp.zeros(shape, dtype))
