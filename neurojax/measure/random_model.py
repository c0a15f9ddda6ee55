"""Makes models of random weights in any form, to measure an architecture without a file."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from neurojax.config import ModelConfig, Span
from neurojax.forms import Weights
from neurojax.model import params
from neurojax.model.neurollm import NeuroLLM
from neurojax.weights.int8 import Int8Array
from neurojax.weights.ternary import TernaryArray, row_bytes

GROUP = 128
"""Number of contracted elements of a ternary matrix that share a scale, as in Q2_0."""


def random_model(
  config: ModelConfig,
  span: Span,
  *,
  dtype: DTypeLike = jnp.float32,
  weights: Weights = "dense",
  seed: int = 0,
) -> NeuroLLM:
  """Makes what `files.load.load_span` loads from a file whose matrices are all ternary.

  All layers have the same numbers, each in memory of its own.
  """
  rng = np.random.default_rng(seed)
  graph, state = nnx.split(NeuroLLM.abstract(config, span=span, dtype=dtype))
  shapes = nnx.to_pure_dict(state)
  pure: dict[str, Any] = {}
  for name, path in params.outer_names(config, span):
    value = _random(rng, name, params.get(shapes, path).shape, dtype, weights)
    params.put(pure, path, jax.tree.map(jax.device_put, value))
  for stack in params.stacks(config, span):
    for name, path in params.stack_names(config, stack):
      shape, layers = params.get(shapes, path).shape[1:], len(stack.layers)
      if params.is_expert(name):
        experts = [_random(rng, name, shape[1:], dtype, weights) for _ in range(shape[0])]
        value = jax.tree.map(lambda *leaves: np.stack(leaves), *experts)
      else:
        value = _random(rng, name, shape, dtype, weights)
      one = jax.tree.map(lambda leaf, layers=layers: _stacked(leaf, layers), value)
      params.put(pure, path, one)
  nnx.replace_by_pure_dict(state, pure)
  return nnx.merge(graph, state)


def _stacked(leaf: Any, layers: int) -> jax.Array:
  leaf = np.asarray(leaf)
  return jax.device_put(np.ascontiguousarray(np.broadcast_to(leaf, (layers, *leaf.shape))))


def _random(
  rng: np.random.Generator,
  name: str,
  shape: tuple[int, ...],
  dtype: DTypeLike,
  weights: Weights,
) -> Any:
  if name == "router_DE":
    return rng.standard_normal(shape, np.float32).astype(dtype)
  if not params.is_matrix(name):
    return np.zeros(shape, dtype) if "_bias_" in name else np.ones(shape, dtype)
  axes = params.contracted(name)
  contracted = shape[:axes] if axes > 0 else shape[axes:]
  k = int(np.prod(contracted))
  if weights in ("w2a16", "w2a8"):
    rows = int(np.prod(shape)) // k
    # 0x99 and its rotations hold no code 3; padded elements are code 1, zeros.
    codes = rng.choice(np.array([0x00, 0x55, 0xAA, 0x24, 0x92, 0x49], np.uint8), (rows, k // 4))
    codes = np.pad(codes, ((0, 0), (0, row_bytes(k) - k // 4)), constant_values=0x55)
    scales = np.full((rows, -(-k // GROUP)), (1.5 / k) ** 0.5, np.float16)
    return TernaryArray.from_rows(codes, scales, shape, axes, group_size=GROUP, mode=weights)
  w = rng.standard_normal(shape, np.float32) * np.float32(k**-0.5)
  return Int8Array.quantize(w, contracted_axes=axes) if weights == "int8" else w.astype(dtype)
