"""Random weights as a training run leaves them: ternary matrices, an embedding, norms.

All in NumPy: JAX would compile something for every shape.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from neurojax.config import ModelConfig
from neurojax.files.write.folder import KINDS, to_folder
from neurojax.files.write.gguf import to_gguf
from neurojax.files.write.parameter_source import ParameterSource
from neurojax.model import params
from neurojax.tokenizer.tokenizer_spec import TokenizerSpec
from neurojax.weights.quantize import absmean
from neurojax.weights.ternary import TernaryArray
from tests.files import tiny

OUTER = ("embedding_VD", "head_DV")
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def make(
  config: ModelConfig,
  group_size: int | None = 64,
  *,
  seed: int = 0,
  outer: str = "bfloat16",
  ternary: bool = True,
) -> ParameterSource:
  """outer: the dtype of embedding and head, or "ternary". ternary: whether layers' matrices are."""
  arrays = {}
  values = tiny.parameters(config, seed)
  for name in dict.fromkeys(key.split("/")[0] for key in values):
    layers = [key for key in values if key.split("/")[0] == name]
    stack = [values[key] for key in layers]
    if "_norm_" in name:
      stack = [1 + value / 10 for value in stack]
    elif (outer == "ternary") if name in OUTER else ternary:
      stack = [
        absmean(value / 8, params.contracted(name), group_size=group_size) for value in stack
      ]
    elif name in OUTER:
      stack = [value.astype(DTYPES[outer]) for value in stack]
    else:
      stack = [value / 8 for value in stack]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *stack)
    arrays[name] = stacked if "/" in layers[0] else jax.tree.map(lambda leaf: leaf[0], stacked)
  return ParameterSource(config, arrays)


def write_gguf(
  path: Path,
  weights: ParameterSource,
  spec: TokenizerSpec | None = None,
  card: Mapping[str, str] | None = None,
  *,
  kind: str | None = None,
  dense: str | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> str:
  """Export as `neurojax export` does.

  Args:
    kind: The type of ternary matrices. dense: The type of the other matrices.
  Returns: The type of the ternary matrices, or of most matrices where there are none.
  """
  ternary = weights.ternary()
  made = to_gguf(
    dataclasses.replace(weights, tokenizer=spec),
    path,
    kind=kind if "down_FD" in ternary else kind or dense,
    outer=kind if "embedding_VD" in ternary else dense,
    is_exact=True,
    overwrite=True,
    general={f"general.{key}": value for key, value in (card or {}).items()},
    progress=progress,
  )
  return made.kind


def write_folder(
  folder: Path, weights: ParameterSource, spec: TokenizerSpec | None, *, dtype: str | None = None
) -> str:
  """Export as `neurojax export` does. Returns: The dtype."""
  kind = next((kind for kind, name in KINDS.items() if name == dtype), None)
  is_empty = folder.is_dir() and not any(folder.iterdir())
  source = dataclasses.replace(weights, tokenizer=spec)
  return KINDS[to_folder(source, folder, kind=kind, is_exact=True, overwrite=is_empty).kind]


def numbers(weights: ParameterSource, name: str, layer: int | None) -> np.ndarray:
  """Float32 values of one tensor: the definition of `TernaryArray`, element by element of a byte."""
  array = weights.arrays[name]
  if not isinstance(array, TernaryArray):
    return np.asarray(array if layer is None else array[layer]).astype(np.float32)
  codes, scales = (
    np.asarray(leaf if layer is None else leaf[layer]) for leaf in (array.codes, array.scales)
  )
  c = array.contraction
  signs_NxK = np.empty((c.n, 4 * codes.shape[1]), np.float32)
  for j in range(4):
    signs_NxK[:, j::4] = (codes >> 2 * j & 3).astype(np.float32) - 1
  group = np.arange(c.k) // (array.group_size or c.k)
  w_NxK = signs_NxK[:, : c.k] * scales.astype(np.float32)[:, group]
  return (w_NxK if array.contracted_axes < 0 else w_NxK.T).reshape(array.weight_shape)


def turned(heads: np.ndarray, style: str) -> np.ndarray:
  """The last axis as it is in the other rotary order than `style`."""
  half = heads.shape[-1] // 2
  together = np.empty_like(heads)
  for i in range(half):
    # The two elements of pair i, where they stand and where they go.
    apart, beside = (i, i + half), (2 * i, 2 * i + 1)
    old, new = (apart, beside) if style == "half" else (beside, apart)
    together[..., new] = heads[..., old]
  return together
