"""Holds activations that are rounded to int8 already, in the order in which a product reads them."""

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int8

from neurojax.kernels.gemm.reference import quantize_rows
from neurojax.weights.ternary import BLOCK

FIELDS = 4
"""Codes in a byte."""

TILE = 8
"""Rows that Mosaic's copies bring at once."""

Order = Literal["planes", "blocks"]
"""How elements lie: "planes" [4, M, K/4] has element 4y + j at (j, y); "blocks" [M', K] has, within each
64 elements, element 4t + j at 16j + t, and M' is a multiple of 8. Triton reads planes, Mosaic blocks."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Levels:
  """Rows of int8 levels, each with the number that one unit stands for, see `reference.quantize_rows`.

  Attributes:
    values: int8, in the order that `order` names.
    steps: float32, [M] for planes and [M'] for blocks.
    rows: M. Rows of blocks beyond it have no meaning.
  """

  # Any, because tree maps put shapes, shardings and None in an array's place.
  values: Any
  steps: Any
  rows: int = field(metadata={"static": True})
  order: Order = field(metadata={"static": True})


def count_of(rows: int, order: Order) -> int:
  """The number of rows that an order stores."""
  return rows if order == "planes" else -(-rows // TILE) * TILE


def arrange(values_MK: Int8[Array, "M K"], order: Order) -> Int8[Array, "..."]:
  """Put levels in an order. K is a multiple of 64; rows that fill up the last tile are zeros."""
  m, k = values_MK.shape
  if order == "planes":
    return jnp.moveaxis(values_MK.reshape(m, k // FIELDS, FIELDS), -1, 0)
  blocks = values_MK.reshape(m, k // BLOCK, BLOCK // FIELDS, FIELDS).swapaxes(2, 3)
  return jnp.pad(blocks.reshape(m, k), ((0, count_of(m, order) - m), (0, 0)))


def quantize(x_MK: Array, order: Order) -> Levels:
  """Round rows by `quantize_rows`, in plain JAX: the definition of what kernels put in `Levels`."""
  values_MK, steps_M = quantize_rows(x_MK)
  m = x_MK.shape[0]
  steps = jnp.pad(steps_M, (0, count_of(m, order) - m))
  return Levels(arrange(values_MK, order), steps, m, order)
