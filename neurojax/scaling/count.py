"""Exact bytes of a model's parts. Imports no JAX."""

from typing import Literal

from neurojax.config import ModelConfig, Span

Weights = Literal["dense", "int8"]
"""How matrices are held: "dense" in the compute dtype, "int8" as integers with scales."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

KEY_BLOCK = 128
"""Attention reads the cache in blocks of this many positions; a capacity is a multiple of it."""


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
  per_layer = sum(k * n for k, n in layer_matrices(config).values()) + 2 * config.model_dim
  outer = config.vocab_size * config.model_dim * (1 if config.tied_embedding else 2)
  return config.num_layers * per_layer + outer + config.model_dim


def layer_bytes(config: ModelConfig, *, dtype: str, weights: Weights) -> int:
  """Bytes of one layer's parameters."""
  matrices = sum(_matrix_bytes(k, n, dtype, weights) for k, n in layer_matrices(config).values())
  return matrices + 2 * config.model_dim * DTYPE_BYTES[dtype]


def embedding_bytes(config: ModelConfig, *, dtype: str, weights: Weights) -> int:
  """Bytes of the token embedding (which serves as the head too, where they are tied)."""
  return _matrix_bytes(config.model_dim, config.vocab_size, dtype, weights)


def span_bytes(config: ModelConfig, span: Span, *, dtype: str, weights: Weights) -> int:
  """Bytes of the parameters of a stage: its layers, embedding if first, norm and head if last."""
  total = len(span) * layer_bytes(config, dtype=dtype, weights=weights)
  table = embedding_bytes(config, dtype=dtype, weights=weights)
  if span.is_first or (span.is_last and config.tied_embedding):
    total += table
  if span.is_last:
    total += config.model_dim * DTYPE_BYTES[dtype]
    if not config.tied_embedding:
      total += table
  return total


def cache_bytes(config: ModelConfig, num_layers: int, *, capacity: int, dtype: str) -> int:
  """Bytes of one sequence's keys and values over `num_layers` layers."""
  return 2 * num_layers * config.num_kv_heads * capacity * config.head_dim * DTYPE_BYTES[dtype]


def _matrix_bytes(contracted: int, output: int, dtype: str, weights: Weights) -> int:
  if weights == "dense":
    return contracted * output * DTYPE_BYTES[dtype]
  # quant.array.Int8Array: outputs in lanes of 4, a float32 scale for each, one float32 for all.
  rows = -(-output // 4) * 4
  return rows * contracted + 4 * rows + 4
