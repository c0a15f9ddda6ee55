"""What a fleet's memory is for: serving a model, or training it."""

import dataclasses
from typing import Any, Self

from neurojax import count
from neurojax.config import ModelConfig, Serving, Span
from neurojax.count.serving import Load, stage_bytes
from neurojax.count.training import Optimizer, TrainBytes, train_bytes
from neurojax.count.working import DeviceKind
from neurojax.forms import Scales


@dataclasses.dataclass(frozen=True)
class ServePurpose:
  """Stages that answer: their weights, the caches of all sequences, and working memory.

  Attributes:
    serving: How the model is held and run; weights and context must be given.
    scales: Scales of every matrix, where the weights are ternary.
  """

  serving: Serving = Serving(dtype="bfloat16", weights="dense", context=2048, sequences=1)
  scales: Scales | None = None

  @classmethod
  def of(cls, *, scales: Scales | None = None, **serving: Any) -> Self:
    """The default serving with these fields changed."""
    return cls(serving=dataclasses.replace(cls.serving, **serving), scales=scales)

  @property
  def context(self) -> int:
    assert self.serving.context is not None, "sizing needs a context"
    return self.serving.context

  @property
  def sequences(self) -> int:
    return self.serving.sequences

  def change(self, **changes: Any) -> Self:
    """The same with other fields of the serving."""
    return dataclasses.replace(self, serving=dataclasses.replace(self.serving, **changes))

  def table(self) -> dict[str, Any]:
    """Plain values for JSON and TOML."""
    return {
      "weights": self.serving.weights,
      "scales": None if self.scales is None else dataclasses.asdict(self.scales),
      "dtype": self.serving.dtype,
      "context": self.context,
      "sequences": self.sequences,
    }

  def load(self, config: ModelConfig) -> Load:
    """What every stage of the architecture has to hold."""
    forms = None if self.scales is None else count.uniform_ternary(config, self.scales)
    return Load(serving=self.serving, forms=forms)

  def stage_bytes(self, config: ModelConfig, span: Span, kind: DeviceKind = "cuda") -> int:
    return stage_bytes(config, span, self.load(config), kind)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainPurpose:
  """Stages that train: see `training.train_bytes`, whose arguments these are. `context` is the length
  of a sequence, `sequences` how many are in memory at once."""

  context: int = 2048
  sequences: int = 1
  optimizer: Optimizer = "adamw"
  remat: bool = True
  compute_dtype: str = "bfloat16"
  diloco: bool = False

  def table(self) -> dict[str, Any]:
    """Plain values for JSON and TOML."""
    return dataclasses.asdict(self)

  def change(self, **changes: Any) -> Self:
    """The same with other fields."""
    return dataclasses.replace(self, **changes)

  def train_bytes(self, config: ModelConfig, span: Span, kind: DeviceKind = "cuda") -> TrainBytes:
    return train_bytes(
      config,
      span,
      batch=self.sequences,
      sequence=self.context,
      optimizer=self.optimizer,
      remat=self.remat,
      compute_dtype=self.compute_dtype,
      diloco=self.diloco,
      kind=kind,
    )

  def stage_bytes(self, config: ModelConfig, span: Span, kind: DeviceKind = "cuda") -> int:
    return self.train_bytes(config, span, kind).total


Purpose = ServePurpose | TrainPurpose
