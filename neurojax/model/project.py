"""Products of activations with weight matrices, however those are held."""

from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from neurojax.kernels.gemm import api as gemm
from neurojax.kernels.native import library
from neurojax.kernels.rows import api as rows
from neurojax.weights import matrix
from neurojax.weights.grouped import GroupedArray
from neurojax.weights.int8 import Int8Array
from neurojax.weights.matrix import InPlace
from neurojax.weights.ternary import TernaryArray, TernaryLayer


def project(
  spec: str, x: Float[Array, "..."], weight: Any, *, dtype: DTypeLike | None = None
) -> Float[Array, "..."]:
  """`einsum(spec, x, weight)`, accumulated in float32, returned as `dtype` or the dtype of x.

  Args:
    weight: A jax.Array, a ternary matrix or any other `weights.matrix.Matrix`, one of those in place, or an
      nnx.Param of one.
  """
  return _contract_all(x, (spec, _value(weight)))[0].astype(dtype or x.dtype)


def project_all(x: Float[Array, "..."], *products: tuple[str, Any]) -> list[Float[Array, "..."]]:
  """`project(spec, x, weight)` for each (spec, weight): weights held alike share the preparation of x."""
  values = [(spec, _value(weight)) for spec, weight in products]
  is_alike = len({_kind(value) for _, value in values}) == 1
  if is_alike and not isinstance(values[0][1], jax.Array):
    return [result.astype(x.dtype) for result in _contract_all(x, *values)]
  return [project(spec, x, value) for spec, value in values]


def rows_agree(weight: Any, platform: str) -> bool:
  """Tells whether the bits of a row of `project` do not depend on how many rows there are, up to 64.

  This holds for matrices that are read in place, as those of a model with a cache are, on a CPU with a
  compiler. Other programs sum in an order that depends on the number of rows.

  Args:
    weight: A matrix as a model holds it, stacked or not, in place or not.
    platform: "cpu", "gpu" or another of JAX's.
  """
  weight = _value(weight)
  if isinstance(weight, InPlace):
    weight = weight.matrix
  if isinstance(weight, TernaryArray | TernaryLayer):
    return platform == "cpu" and library.unavailable() is None
  if isinstance(weight, jax.Array | Int8Array | GroupedArray):
    return rows.why_not(weight, platform) is None
  return False


def _kind(value: Any) -> Any:
  return (InPlace, type(value.matrix)) if isinstance(value, InPlace) else type(value)


def _contract_all(x: jax.Array, *products: tuple[str, Any]) -> list[jax.Array]:
  """Products with weights that are held alike: by kernels where there are some, others by themselves."""
  first = products[0][1]
  if isinstance(first, TernaryArray | TernaryLayer):
    return gemm.contract_all(x, *products)
  if isinstance(first, InPlace):
    if rows.suits(x, products, gemm.default_platform()):
      return rows.contract_all(x, *products)
    return _contract_all(x, *((spec, w.taken()) for spec, w in products))
  return matrix.contract_all(x, *products)


def _value(weight: Any) -> Any:
  return weight.get_value() if isinstance(weight, nnx.Variable) else weight
