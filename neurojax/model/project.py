"""Multiplying activations by a weight matrix, whatever the matrix is stored as."""

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike


class Matrix(Protocol):
  """A weight kept narrower than the activations: it knows how to multiply and to look up rows."""

  def contract(self, spec: str, x: jax.Array) -> jax.Array: ...

  def take(self, ids: jax.Array) -> jax.Array: ...


def project(
  spec: str, x: jax.Array, weight: nnx.Param, *, dtype: DTypeLike | None = None
) -> jax.Array:
  """`einsum(spec, x, weight)`, accumulated in float32, returned as `dtype` or the dtype of x.

  The weight is a jax.Array or any `Matrix`.
  """
  value = weight.get_value()
  dtype = dtype or x.dtype
  if not isinstance(value, jax.Array):
    return value.contract(spec, x.astype(jnp.float32)).astype(dtype)
  return jnp.einsum(
    spec, x, value, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
  ).astype(dtype)
