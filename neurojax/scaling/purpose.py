"""Purposes of a fleet's memory: serving a model, or training it."""

import dataclasses
from typing import Any, Literal, Self

from neurojax import count
from neurojax.config import ModelConfig, Serving, Span
from neurojax.config.serving import check_choice
from neurojax.count.serving import Load, stage_bytes
from neurojax.count.training import Optimizer, TrainBytes, train_bytes
from neurojax.count.working import DeviceKind
from neurojax.forms import TERNARY_FORMATS, Scales


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
    """The load of every stage of the architecture."""
    forms = None if self.scales is None else count.uniform_ternary(config, self.scales)
    return Load(serving=self.serving, forms=forms)

  def stage_bytes(self, config: ModelConfig, span: Span, kind: DeviceKind = "cuda") -> int:
    return stage_bytes(config, span, self.load(config), kind)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainPurpose:
  """Stages that train. Fields are arguments of `count.training.train_bytes`.

  Attributes:
    context: Tokens of a sequence.
    sequences: Sequences in memory at once.
  """

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


def purpose_of(
  purpose: Literal["serve", "train"],
  *,
  form: str = "ternary-g128",
  context: int = 2048,
  sequences: int = 1,
  optimizer: Optimizer = "adamw",
  remat: bool = True,
  diloco: bool = False,
) -> Purpose:
  """A purpose from simple values.

  Args:
    form: Form of the weights when serving: "float32", "bf16", "int8", or a name in
      `forms.TERNARY_FORMATS`. Training computes in float32 if that is the form, else in bfloat16.
    context: Positions of a sequence.
    sequences: Sequences in memory at once.
    optimizer, remat, diloco: For training: as in `count.training.train_bytes`.
  Raises: ValueError: an unknown form.
  """
  check_choice("purpose", purpose, ("serve", "train"))
  serving: dict[str, Any]
  if form in ("bf16", "float32"):
    serving = {"dtype": {"bf16": "bfloat16"}.get(form, "float32")}
  elif form == "int8":
    serving = {"weights": "int8"}
  elif form in TERNARY_FORMATS:
    serving = {"weights": "w2a8", "scales": TERNARY_FORMATS[form]}
  else:
    raise ValueError(f"{form}: choose one of bf16, float32, int8, {', '.join(TERNARY_FORMATS)}")
  if purpose == "train":
    return TrainPurpose(
      context=context,
      sequences=sequences,
      optimizer=optimizer,
      remat=remat,
      compute_dtype="float32" if form == "float32" else "bfloat16",
      diloco=diloco,
    )
  return ServePurpose.of(context=context, sequences=sequences, **serving)
