"""From a model file to the parameters of a span of its layers, and of no other."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from neurojax.config import Span
from neurojax.files.source import ModelFile
from neurojax.model import params
from neurojax.model.neurollm import NeuroLLM
from neurojax.quant.array import Int8Array
from neurojax.scaling.count import Weights

_CONTRACTED = {"o_NHD": 2, "embedding_VD": -1}
"""Axes that a product sums over: leading ones, or trailing ones if negative; 1 unless listed."""


def load_span(
  file: ModelFile,
  span: Span | None = None,
  *,
  dtype: DTypeLike = jnp.float32,
  weights: Weights = "dense",
  progress: Callable[[int], None] | None = None,
) -> NeuroLLM:
  """Read the tensors of `span` and nothing else.

  Args:
    dtype: Of activations, cache, norms, and of matrices if `weights` is "dense".
    progress: Called with the number of layers read so far.
  Raises: ValueError: a tensor has another shape than the configuration says, or holds NaN or
    infinity; and whatever the file's reader raises.
  """
  config = file.config
  span = span or Span.whole(config)
  graph, state = nnx.split(NeuroLLM.abstract(config, span=span, dtype=dtype))
  shapes = nnx.to_pure_dict(state)
  pure: dict[str, Any] = {}
  for name, path in params.outer_names(config, span):
    array = _checked(file, name, None, params.get(shapes, path).shape)
    params.put(pure, path, jax.tree.map(jnp.asarray, _narrow(array, name, dtype, weights)))
  columns: dict[str, list[Any]] = {name: [] for name in params.LAYER}
  for done, layer in enumerate(range(span.first_layer, span.last_layer + 1), start=1):
    for name, path in params.LAYER.items():
      array = _checked(file, name, layer, params.get(shapes, path).shape[1:])
      columns[name].append(_narrow(array, name, dtype, weights))
    if progress:
      progress(done)
  for name, path in params.LAYER.items():
    params.put(pure, path, _stack(columns.pop(name)))
  nnx.replace_by_pure_dict(state, pure)
  return nnx.merge(graph, state)


def parameter_bytes(model: NeuroLLM) -> int:
  """Bytes that the parameters of a (partial) model occupy, scales included."""
  return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))


def _checked(file: ModelFile, name: str, layer: int | None, shape: tuple[int, ...]) -> np.ndarray:
  array = file.read(name, layer)
  where = f"{file.path}: {name}" + ("" if layer is None else f" of layer {layer}")
  if array.shape != shape:
    raise ValueError(f"{where} has shape {array.shape}, the configuration wants {shape}")
  if not np.isfinite(array).all():
    raise ValueError(f"{where} holds NaN or infinity: the file is damaged, get it again")
  return array


def _is_matrix(name: str) -> bool:
  return len(name.rsplit("_", 1)[1]) > 1


def _narrow(array: np.ndarray, name: str, dtype: DTypeLike, weights: Weights) -> Any:
  if weights == "int8" and _is_matrix(name):
    return Int8Array.quantize(array, contracted_axes=_CONTRACTED.get(name, 1))
  return array.astype(dtype)


def _stack(layers: list[Any]) -> Any:
  return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *layers)
