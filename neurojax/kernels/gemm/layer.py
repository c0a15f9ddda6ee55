"""Names one matrix of a stack, which stays where it is."""

import jax
from jax import lax
from jaxtyping import Array, Int

from neurojax.weights.ternary import TernaryArray


def take_out(w: TernaryArray, layer: Int[Array, ""] | None) -> TernaryArray:
  """Take one matrix out of a stack: a copy, unless XLA fuses it into what follows.

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
