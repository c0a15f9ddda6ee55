"""What the stages of a model have to hold. Imports no JAX."""

import dataclasses
from typing import Any

from neurojax.config import ModelConfig, Span
from neurojax.scaling import count
from neurojax.scaling.count import Ternary, Weights
from neurojax.scaling.working import working_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
  """What every stage has to hold: the form of weights and caches.

  Attributes:
    ternary: Which matrices are ternary, where `weights` keeps those packed.
    working: Whether each stage needs room for its programs' working memory as well (`working_bytes`).
  """

  dtype: str
  weights: Weights
  capacity: int
  max_sequences: int
  ternary: Ternary | None = None
  working: bool = False

  @property
  def form(self) -> dict[str, Any]:
    """How weights are held, as the functions of `count` want it."""
    return {"dtype": self.dtype, "weights": self.weights, "ternary": self.ternary}


def stage_bytes(config: ModelConfig, span: Span, load: Load) -> int:
  """Weights and all caches of one stage, and its programs' working memory where that is asked for."""
  weights = count.span_bytes(config, span, **load.form)
  cache = count.cache_bytes(config, len(span), capacity=load.capacity, dtype=load.dtype)
  return weights + load.max_sequences * cache + stage_working_bytes(config, load)


def stage_working_bytes(config: ModelConfig, load: Load) -> int:
  """Of any stage that is asked for it, whatever its layers."""
  return working_bytes(config, dtype=load.dtype, weights=load.weights) if load.working else 0


def layer_bytes(config: ModelConfig, load: Load) -> int:
  """One layer, its caches included."""
  cache = count.cache_bytes(config, 1, capacity=load.capacity, dtype=load.dtype)
  return count.layer_bytes(config, **load.form) + load.max_sequences * cache
