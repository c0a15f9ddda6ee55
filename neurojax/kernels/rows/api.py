"""Multiplies a few rows by matrices that are left in place, so that rows do not change one another's bits."""

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Float, Float32

from neurojax.kernels.rows import cpu
from neurojax.weights.contraction import Contraction, contract_rows, contraction_of
from neurojax.weights.grouped import GroupedArray
from neurojax.weights.int8 import Int8Array
from neurojax.weights.matrix import InPlace

MAX_ROWS = 64
"""More rows are a prompt's, which are multiplied as those that are not in place are."""


def why_not(weight: Any, platform: str) -> str | None:
  """Why there is no kernel on a platform for a matrix, or None.

  Args:
    weight: As it is held, stacked or not: a jax.Array, an Int8Array, a GroupedArray.
  """
  if platform != "cpu":
    return f"there is no kernel on {platform}"
  if isinstance(weight, GroupedArray):
    return cpu.why_not(weight.form)
  if isinstance(weight, Int8Array):
    return cpu.why_not(Int8Array)
  return cpu.why_not(weight.dtype)


def suits(x: Float[Array, "..."], products: Sequence[tuple[str, InPlace]], platform: str) -> bool:
  """Tells whether `contract_all` can compute these products."""
  return all(
    0 < _rows(x, spec, w) <= MAX_ROWS and why_not(w.matrix, platform) is None
    for spec, w in products
  )


def contract_all(
  x: Float[Array, "..."], *products: tuple[str, InPlace]
) -> list[Float32[Array, "..."]]:
  """Computes float32 `einsum(spec, x, w)` for each (spec, w), all held alike, of at most MAX_ROWS rows.

  A row's bits do not depend on the number of rows; `rows.reference` has the definition.

  Raises: ValueError: a spec is of another form, or does not fit the shapes.
  """
  contractions = [_contraction(spec, w) for spec, w in products]
  weights = [(w.matrix, c, w.index) for (_, w), c in zip(products, contractions, strict=True)]
  return contract_rows(
    x,
    [(spec, c) for (spec, _), c in zip(products, contractions, strict=True)],
    lambda x_MxK: cpu.matmul_all(x_MxK, weights),
  )


def _contraction(spec: str, w: InPlace) -> Contraction:
  if not isinstance(w.matrix, jax.Array):
    return w.matrix.contraction
  return contraction_of(spec, w.matrix.shape if w.index is None else w.matrix.shape[1:])


def _rows(x: Array, spec: str, w: InPlace) -> int:
  return x.size // max(1, _contraction(spec, w).k)
