"""One matrix of a stack of them, left where it is."""

import jax
from jax import lax
from jaxtyping import Array, Int

from neurojax.weights.ternary import TernaryArray


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
