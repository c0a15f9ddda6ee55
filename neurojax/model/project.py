"""Products of activations with weight matrices, however those are held."""

from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from neurojax.kernels.gemm import api as gemm
from neurojax.weights import matrix
from neurojax.weights.ternary import TernaryArray, TernaryLayer


def project(
  spec: str, x: Float[Array, "..."], weight: Any, *, dtype: DTypeLike | None = None
) -> Float[Array, "..."]:
  """`einsum(spec, x, weight)`, accumulated in float32, returned as `dtype` or the dtype of x.

  Args:
    weight: A jax.Array, a ternary matrix or any other `weights.matrix.Matrix`, or an nnx.Param of one.
  """
  return _contract_all(x, (spec, _value(weight)))[0].astype(dtype or x.dtype)


def project_all(x: Float[Array, "..."], *products: tuple[str, Any]) -> list[Float[Array, "..."]]:
  """`project(spec, x, weight)` for each (spec, weight): weights held alike share the preparation of x."""
  values = [(spec, _value(weight)) for spec, weight in products]
  is_alike = len({type(value) for _, value in values}) == 1
  if is_alike and not isinstance(values[0][1], jax.Array):
    return [result.astype(x.dtype) for result in _contract_all(x, *values)]
  return [project(spec, x, value) for spec, value in values]


def _contract_all(x: jax.Array, *products: tuple[str, Any]) -> list[jax.Array]:
  """Products with weights that are held alike: ternary ones by kernels, others by themselves."""
  if isinstance(products[0][1], TernaryArray | TernaryLayer):
    return gemm.contract_all(x, *products)
  return matrix.contract_all(x, *products)


def _value(weight: Any) -> Any:
  return weight.get_value() if isinstance(weight, nnx.Variable) else weight
