"""Bytes that the stages of a model have to hold."""

import dataclasses
from typing import Any, Self

from neurojax import count
from neurojax.config import ModelConfig, Serving, Span
from neurojax.count.working import DeviceKind, Working, working
from neurojax.forms import PREFILL, Forms, Weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
  """What every stage of a model has to hold.

  Attributes:
    serving: How the model is held and run, every choice made (`Serving.resolve`).
    forms: Forms of the file's matrices by canonical name, where `serving.weights` keeps those.
    working: Whether stages need room for the working memory of their programs too. Only comparisons
      leave it out.
  """

  serving: Serving
  forms: Forms | None = None
  working: bool = True

  @property
  def dtype(self) -> str:
    return self.serving.dtype

  @property
  def weights(self) -> Weights:
    assert self.serving.weights != "auto", "resolve the serving first"
    return self.serving.weights

  @property
  def capacity(self) -> int:
    return self.serving.capacity

  @property
  def sequences(self) -> int:
    return self.serving.sequences

  @property
  def cache_dtype(self) -> str:
    """Dtype of keys and values."""
    return self.serving.cache_dtype

  def cache_bytes(self, config: ModelConfig, layers: int) -> int:
    """Bytes of the caches of all sequences in so many layers, and of what is kept of earlier prompts."""
    sequence = count.cache_bytes(config, layers, capacity=self.capacity, dtype=self.cache_dtype)
    block = count.cache_bytes(config, layers, capacity=PREFILL, dtype=self.cache_dtype)
    return self.sequences * sequence + self.serving.places * block

  @property
  def form(self) -> dict[str, Any]:
    """How weights are held, as arguments of the functions of `count`."""
    return {"dtype": self.dtype, "weights": self.weights, "forms": self.forms}

  def serve(self, **changes: Any) -> Self:
    """The same with another number of sequences, or another context."""
    return dataclasses.replace(self, serving=dataclasses.replace(self.serving, **changes))


def stage_bytes(config: ModelConfig, span: Span, load: Load, kind: DeviceKind = "cuda") -> int:
  """Bytes of one stage: weights, the caches of all sequences, and the working memory of its programs.

  Args:
    kind: Kind of the device. Working memory depends on it where programs compute in bfloat16.
  """
  weights = count.span_bytes(config, span, **load.form)
  work = stage_working(config, load, kind).stage(len(span), is_last=span.is_last)
  return weights + load.cache_bytes(config, len(span)) + work


def stage_working(config: ModelConfig, load: Load, kind: DeviceKind = "cuda") -> Working:
  """Working memory of a stage's programs; nothing where the load leaves it out."""
  if not load.working:
    return Working()
  return working(config, dtype=load.dtype, weights=load.weights, capacity=load.capacity, kind=kind)


def layer_bytes(config: ModelConfig, load: Load, kind: DeviceKind = "cuda") -> int:
  """Bytes that each further layer adds to a stage, with its caches."""
  held = count.layer_bytes(config, **load.form) + load.cache_bytes(config, 1)
  return held + stage_working(config, load, kind).layer
