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

  @staticmethod
  def contract_all(x: jax.Array, *products: tuple[str, "Matrix"]) -> list[jax.Array]: ...

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


def project_all(x: jax.Array, *products: tuple[str, nnx.Param]) -> list[jax.Array]:
  """`project(spec, x, weight)` for each (spec, weight): a `Matrix` prepares x once for all."""
  values = [(spec, weight.get_value()) for spec, weight in products]
  if isinstance(values[0][1], jax.Array):
    return [project(spec, x, weight) for spec, weight in products]
  results = type(values[0][1]).contract_all(x.astype(jnp.float32), *values)
  return [result.astype(x.dtype) for result in results]
