"""Turns master weights into what a model file holds: the very numbers that training multiplied by."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils

from neurojax.model import params
from neurojax.train import parameters
from neurojax.train.config import TrainConfig
from neurojax.train.parameters import Params
from neurojax.weights.contraction import Contraction
from neurojax.weights.quantize import pack_rows
from neurojax.weights.ternary import TernaryArray, row_bytes


def deploy(weights: Params, config: TrainConfig) -> dict[str, Any]:
  """Makes the arrays of a model file by canonical name, on the host.

  Returns: a layer's matrices as TernaryArrays stacked on L, scales float16, where the recipe says
    ternary, else in the compute dtype; embedding and head in the dtype of `quantization.outer`; norms
    float32. Under several processes every one gets all of it.
  Raises: ValueError: a weight is not finite, or a scale is beyond float16.
  """
  recipe = config.quantization
  found: dict[str, Any] = {}
  for name, w in weights.items():
    if not _whole(jnp.isfinite(w).all()):
      raise ValueError(f"{name} holds NaN or infinity: take an earlier checkpoint")
    if not params.is_matrix(name):
      found[name] = _whole(w)
    elif not parameters.is_projection(name):
      found[name] = _whole(w).astype(_DTYPES[recipe.outer])
    elif recipe.weights == "none":
      found[name] = _whole(w).astype(_DTYPES[config.compute_dtype])
    else:
      found[name] = _packed(name, w, config)
  return found


_DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def _packed(name: str, w: jax.Array, config: TrainConfig) -> TernaryArray:
  recipe = config.quantization
  values_L, scales_L = jax.jit(parameters.ternary, static_argnums=(0, 2, 3))(
    name, w, recipe, jnp.dtype(jnp.bfloat16)
  )
  trits_L = _whole(jnp.sign(values_L).astype(jnp.int8))
  with np.errstate(over="ignore"):
    scales_L = _whole(scales_L).astype(np.float16)
  if not np.isfinite(scales_L).all():
    raise ValueError(f"{name}: a scale is beyond float16, whose largest number is 65504")
  c = Contraction(trits_L.shape[1:], params.contracted(name))
  codes_L = np.empty((len(trits_L), c.n, row_bytes(c.k)), np.uint8)
  for codes, trits in zip(codes_L, trits_L, strict=True):
    codes[...] = pack_rows(np.ascontiguousarray(trits.reshape(c.k, c.n).T))
  return TernaryArray(
    codes=codes_L,
    scales=scales_L,
    weight_shape=c.weight_shape,
    contracted_axes=c.contracted_axes,
    group_size=recipe.group_size,
    mode="w2a8" if recipe.activations == "int8" else "w2a16",
  )


def _whole(array: jax.Array) -> np.ndarray:
  """Gathers all parts of an array on the host."""
  if isinstance(array, jax.Array) and not array.is_fully_addressable:
    array = multihost_utils.process_allgather(array, tiled=True)
  return np.asarray(array)
