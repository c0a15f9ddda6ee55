"""Multiplying activations by a weight matrix, whatever the matrix is stored as."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from neurojax.kernels.gemm import api as gemm
from neurojax.kernels.gemm.layer import TernaryLayer
from neurojax.weights.ternary import TernaryArray


class Matrix(Protocol):
  """A weight kept narrower than the activations: it knows how to multiply and to look up rows."""

  def contract(self, spec: str, x: jax.Array) -> jax.Array: ...

  @staticmethod
  def contract_all(x: jax.Array, *products: tuple[str, "Matrix"]) -> list[jax.Array]: ...

  def take(self, ids: jax.Array) -> jax.Array: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackedLayer:
  """The `index`-th of stacked parameters, left where it is: for those of which only a part is read.

  Attributes:
    stacked: A tree of arrays with one further leading axis.
    index: int32 [].
  """

  # Any, because tree maps put shapes, shardings and None in an array's place.
  stacked: Any
  index: Any


def project(spec: str, x: jax.Array, weight: Any, *, dtype: DTypeLike | None = None) -> jax.Array:
  """`einsum(spec, x, weight)`, accumulated in float32, returned as `dtype` or the dtype of x.

  The weight is a jax.Array, a ternary matrix or any other `Matrix`, or an nnx.Param of one.
  """
  value = _value(weight)
  dtype = dtype or x.dtype
  if isinstance(value, TernaryArray | TernaryLayer):
    return gemm.contract(spec, x, value).astype(dtype)
  if not isinstance(value, jax.Array):
    return value.contract(spec, x.astype(jnp.float32)).astype(dtype)
  return jnp.einsum(
    spec, x, value, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
  ).astype(dtype)


def project_all(x: jax.Array, *products: tuple[str, Any]) -> list[jax.Array]:
  """`project(spec, x, weight)` for each (spec, weight): x is prepared once for weights of a kind."""
  values = [(spec, _value(weight)) for spec, weight in products]
  kinds = {type(value) for _, value in values}
  if kinds <= {TernaryArray, TernaryLayer}:
    results = gemm.contract_all(x, *values)
  elif len(kinds) == 1 and not isinstance(values[0][1], jax.Array):
    results = kinds.pop().contract_all(x.astype(jnp.float32), *values)
  else:
    return [project(spec, x, weight) for spec, weight in products]
  return [result.astype(x.dtype) for result in results]


def _value(weight: Any) -> Any:
  return weight.get_value() if isinstance(weight, nnx.Variable) else weight
