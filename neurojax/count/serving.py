"""What the stages of a model have to hold. Imports no JAX."""

import dataclasses
from typing import Any

from neurojax import count
from neurojax.config import ModelConfig, Span
from neurojax.count.working import Kind, Working, working
from neurojax.forms import Forms, Weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
  """What every stage has to hold: the form of weights and caches.

  Attributes:
    ternary: Which matrices are ternary, where `weights` keeps those packed.
    working: Whether each stage needs room for its programs' working memory as well (`count.working`).
  """

  dtype: str
  weights: Weights
  capacity: int
  max_sequences: int
  ternary: Forms | None = None
  working: bool = False

  @property
  def form(self) -> dict[str, Any]:
    """How weights are held, as the functions of `count` want it."""
    return {"dtype": self.dtype, "weights": self.weights, "ternary": self.ternary}


def stage_bytes(config: ModelConfig, span: Span, load: Load, kind: Kind = "cuda") -> int:
  """Weights and all caches of one stage, and its programs' working memory where that is asked for.

  Args:
    kind: Of the device; what programs work in depends on it where they compute in bfloat16.
  """
  weights = count.span_bytes(config, span, **load.form)
  cache = count.cache_bytes(config, len(span), capacity=load.capacity, dtype=load.dtype)
  work = stage_working(config, load, kind).stage(len(span), is_last=span.is_last)
  return weights + load.max_sequences * cache + work


def stage_working(config: ModelConfig, load: Load, kind: Kind = "cuda") -> Working:
  """Nothing where it is not asked for."""
  if not load.working:
    return Working()
  return working(config, dtype=load.dtype, weights=load.weights, capacity=load.capacity, kind=kind)


def layer_bytes(config: ModelConfig, load: Load, kind: Kind = "cuda") -> int:
  """What one layer more takes, its caches included."""
  cache = count.cache_bytes(config, 1, capacity=load.capacity, dtype=load.dtype)
  held = count.layer_bytes(config, **load.form) + load.max_sequences * cache
  return held + stage_working(config, load, kind).layer
