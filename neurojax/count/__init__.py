"""Exact bytes, parameters and FLOPs of a model: `count.layer_bytes(config, ...)`."""

from neurojax.count.model import (
  cache_bytes,
  embedding_bytes,
  flops_per_token,
  head_bytes,
  head_flops,
  layer_bytes,
  layer_matrices,
  parameters,
  span_bytes,
  span_cache_bytes,
  span_parameters,
  uniform_ternary,
)

__all__ = [
  "cache_bytes",
  "embedding_bytes",
  "flops_per_token",
  "head_bytes",
  "head_flops",
  "layer_bytes",
  "layer_matrices",
  "parameters",
  "span_bytes",
  "span_cache_bytes",
  "span_parameters",
  "uniform_ternary",
]
