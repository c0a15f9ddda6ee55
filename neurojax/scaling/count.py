"""Exact bytes of a model's parts. Imports no JAX."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from neurojax.config import ModelConfig, Span

Weights = Literal["dense", "int8", "w2a16", "w2a8"]
"""How matrices are held: "dense" in the compute dtype, "int8" as integers with scales; "w2a16" and
"w2a8" keep a file's ternary ones packed, for activations as they are or rounded to int8, and the
others dense."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

KEY_BLOCK = 128
"""Attention reads the cache in blocks of this many positions; a capacity is a multiple of it."""


@dataclasses.dataclass(frozen=True)
class Scales:
  """How the scales of a ternary matrix lie: one for each `group_size` contracted elements of an
  output, or one for the matrix (of each layer) if that is None; `scale_bytes` each."""

  group_size: int | None
  scale_bytes: int


Ternary = Mapping[str, Scales]
"""Which matrices, by canonical name, are ternary in a file; `files.load.ternary_matrices` tells."""


def capacity_for(context_length: int) -> int:
  """Cache positions allocated for a context: the next multiple of KEY_BLOCK."""
  return -(-context_length // KEY_BLOCK) * KEY_BLOCK


def layer_matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
  """(contracted, output) elements of each matrix of one layer."""
  d, f, h = config.model_dim, config.ffn_dim, config.head_dim
  return {
    "q_DNH": (d, config.num_heads * h),
    "k_DKH": (d, config.num_kv_heads * h),
    "v_DKH": (d, config.num_kv_heads * h),
    "o_NHD": (config.num_heads * h, d),
    "gate_DF": (d, f),
    "up_DF": (d, f),
    "down_FD": (f, d),
  }


def parameters(config: ModelConfig) -> int:
  """Parameters of the whole model."""
  per_layer = sum(k * n for k, n in layer_matrices(config).values()) + _layer_vectors(config)
  outer = config.vocab_size * config.model_dim * (1 if config.tied_embedding else 2)
  return config.num_layers * per_layer + outer + config.model_dim


def layer_bytes(
  config: ModelConfig, *, dtype: str, weights: Weights, ternary: Ternary | None = None
) -> int:
  """Bytes of one layer's parameters.

  Args:
    ternary: Needed, here and below, if `weights` keeps ternary matrices packed.
  Raises: ValueError: it is needed and absent.
  """
  matrices = sum(
    _matrix_bytes(k, n, dtype, weights, _scales(name, weights, ternary))
    for name, (k, n) in layer_matrices(config).items()
  )
  return matrices + _layer_vectors(config) * DTYPE_BYTES[dtype]


def embedding_bytes(
  config: ModelConfig, *, dtype: str, weights: Weights, ternary: Ternary | None = None
) -> int:
  """Bytes of the token embedding (which serves as the head too, where they are tied)."""
  scales = _scales("embedding_VD", weights, ternary)
  return _matrix_bytes(config.model_dim, config.vocab_size, dtype, weights, scales)


def head_bytes(
  config: ModelConfig, *, dtype: str, weights: Weights, ternary: Ternary | None = None
) -> int:
  """Bytes of the matrix that gives the logits: the embedding, where they are tied."""
  name = "embedding_VD" if config.tied_embedding else "head_DV"
  scales = _scales(name, weights, ternary)
  return _matrix_bytes(config.model_dim, config.vocab_size, dtype, weights, scales)


def span_bytes(
  config: ModelConfig,
  span: Span,
  *,
  dtype: str,
  weights: Weights,
  ternary: Ternary | None = None,
) -> int:
  """Bytes of the parameters of a stage: its layers, embedding if first, norm and head if last."""
  total = len(span) * layer_bytes(config, dtype=dtype, weights=weights, ternary=ternary)
  if span.is_first:
    total += embedding_bytes(config, dtype=dtype, weights=weights, ternary=ternary)
  if span.is_last:
    total += config.model_dim * DTYPE_BYTES[dtype]
    if not (span.is_first and config.tied_embedding):
      total += head_bytes(config, dtype=dtype, weights=weights, ternary=ternary)
  return total


def cache_bytes(config: ModelConfig, num_layers: int, *, capacity: int, dtype: str) -> int:
  """Bytes of one sequence's keys and values over `num_layers` layers."""
  return 2 * num_layers * config.num_kv_heads * capacity * config.head_dim * DTYPE_BYTES[dtype]


def _layer_vectors(config: ModelConfig) -> int:
  """Elements of a layer's norms."""
  return 2 * config.model_dim + (2 * config.head_dim if config.qk_norm else 0)


def _scales(name: str, weights: Weights, ternary: Ternary | None) -> Scales | None:
  """Those of a matrix that is held packed, else None."""
  if weights not in ("w2a16", "w2a8"):
    return None
  if not ternary:
    absent = "which matrices of the file are ternary is not said: see files.load.ternary_matrices"
    none = "no matrix of the file is ternary: choose 'dense' or 'int8'"
    raise ValueError(f"weights = {weights!r}: {absent if ternary is None else none}")
  return ternary.get(name)


def _matrix_bytes(
  contracted: int, output: int, dtype: str, weights: Weights, scales: Scales | None = None
) -> int:
  if scales is not None:
    # ternary.array.TernaryArray: 16 bytes of codes for each 64 elements of a row.
    codes = output * -(-contracted // 64) * 16
    group_size = scales.group_size
    groups = 1 if group_size is None else output * -(-contracted // group_size)
    return codes + groups * scales.scale_bytes
  if weights != "int8":
    return contracted * output * DTYPE_BYTES[dtype]
  # quant.array.Int8Array: outputs in lanes of 4, a float32 scale for each, one float32 for all.
  rows = -(-output // 4) * 4
  return rows * contracted + 4 * rows + 4
