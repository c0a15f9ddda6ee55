"""One matrix of a stack of them, left where it is."""

from dataclasses import dataclass
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Int

from neurojax.weights.ternary import TernaryArray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TernaryLayer:
  """The `index`-th of stacked ternary matrices: to be multiplied by without being copied out.

  What a compiler fuses may slice the stack for nothing. But a kernel is handed whole arrays, and a
  slice of them, inside a loop over layers, is a copy: kernels are handed the stack and the index.

  Attributes:
    stacked: With one further leading axis.
    index: int32 [], not negative; beyond the stack's last layer it is clamped.
  """

  # Any, because tree maps put shapes, shardings and None in an array's place.
  stacked: Any
  index: Any


def take_out(w: TernaryArray, layer: Int[Array, ""] | None) -> TernaryArray:
  """The matrix by itself: a copy, unless it is fused into what follows.

  Raises: ValueError: w is stacked and `layer` is None, or the other way around.
  """
  if w.codes.ndim != (2 if layer is None else 3):
    raise ValueError(
      f"codes of shape {w.codes.shape} with layer={layer}: give a layer of matrices that are"
      " stacked on one axis, and None for a single matrix"
    )
  if layer is None:
    return w
  return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, layer, keepdims=False), w)
