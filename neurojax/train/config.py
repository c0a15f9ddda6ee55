"""The configuration of a training run: recipe, data, model and layout, in one TOML file."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

from neurojax.config import ModelConfig, from_toml
from neurojax.layout import Layout
from neurojax.train.guard import GuardConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization:
  """The rounding of weights and activations in products with a layer's seven matrices.

  Attributes:
    weights: "ternary": rounded to -s, 0 and s by absmean, with straight-through gradients
      (arXiv:2402.17764); "none": in the compute dtype.
    group_size: Number of elements that share s along the contracted axis, in a file's order: 64 or 128
      for Q2_0, 256 for TQ2_0 and TQ1_0. None: one s for the matrix of a layer, as published.
    activations: "int8": rounded per token by absmax, straight-through (the same paper); "none".
    outer: The dtype that the embedding and an untied head are rounded to, in training and in the export.
  """

  weights: Literal["none", "ternary"] = "none"
  group_size: int | None = None
  activations: Literal["none", "int8"] = "none"
  outer: Literal["bfloat16", "float32"] = "bfloat16"

  def __post_init__(self) -> None:
    if self.group_size is not None:
      if self.weights == "none":
        raise ValueError(f"group_size = {self.group_size} means nothing for weights = 'none'")
      if self.group_size < 1 or self.group_size % 64:
        raise ValueError(f"group_size = {self.group_size}: a multiple of 64, or absent")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """The optimizer and its schedule. See `train.optimizer` for the formulas.

  Attributes:
    name: "adamw"; or "muon" for the layers' matrices, with AdamW for the rest.
    peak_lr: Learning rate after warm-up.
    second_lr: Peak of the second stage, from `second_stage` of the steps on; None: one stage.
    final_fraction: Fraction of the peak at which the decay ends.
    decay: Form of the decay from the end of warm-up to the last step.
    warmup_steps: Number of steps over which the learning rate rises linearly.
    weight_decay: Decoupled weight decay of the matrices; norms have none.
    second_weight_decay: Weight decay in the second stage; None: the same.
    second_stage: Begin of the second stage, as a fraction of all steps.
    beta1, beta2, eps: Constants of Adam.
    clip_norm: Greatest global norm of gradients, to which greater ones are scaled down; None: no limit.
    muon_beta: Momentum of Muon.
  """

  name: Literal["adamw", "muon"] = "adamw"
  peak_lr: float
  second_lr: float | None = None
  final_fraction: float = 0.0
  decay: Literal["linear", "cosine", "constant"] = "linear"
  warmup_steps: int = 0
  weight_decay: float = 0.1
  second_weight_decay: float | None = None
  second_stage: float = 0.5
  beta1: float = 0.9
  beta2: float = 0.95
  eps: float = 1e-8
  clip_norm: float | None = 1.0
  muon_beta: float = 0.95

  def __post_init__(self) -> None:
    def check(name: str, ok: bool, rule: str) -> None:
      if not ok:
        raise ValueError(f"{name} = {getattr(self, name)!r}: it must be {rule}")

    for name in ("peak_lr", "second_lr", "eps", "clip_norm"):
      value = getattr(self, name)
      check(name, value is None or 0 < value < math.inf, "positive and finite")
    for name in ("beta1", "beta2", "muon_beta"):
      check(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
    for name in ("weight_decay", "second_weight_decay"):
      value = getattr(self, name)
      check(name, value is None or 0 <= value < math.inf, "0 or positive, and finite")
    check("second_stage", 0 < self.second_stage < 1, "between 0 and 1")
    check("final_fraction", 0 <= self.final_fraction <= 1, "between 0 and 1")
    check("warmup_steps", self.warmup_steps >= 0, "0 or positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """The training data and the size of batches.

  Attributes:
    folder: Folder that `neurojax data prepare` wrote.
    batch_size: Number of sequences of one forward pass over all devices, not counting accumulation.
    seq_len: Number of predicted tokens of a sequence; its window holds one more.
    seed: Seed of the shuffling.
    workers: Number of threads that read ahead.
  """

  folder: str
  batch_size: int
  seq_len: int
  seed: int = 0
  workers: int = 0

  def __post_init__(self) -> None:
    for name in ("batch_size", "seq_len"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} = {getattr(self, name)}: it must be positive")
    if self.workers < 0:
      raise ValueError(f"workers = {self.workers}: it must be 0 or positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackerConfig:
  """Trackers that get metrics beside metrics.jsonl."""

  tensorboard: bool = False
  wandb: bool = False
  wandb_project: str = "neurojax"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """One training run.

  Attributes:
    model, optimizer, data, quantization, layout, tracker, guard: See their classes.
    steps: Number of the optimizer's steps, and the length of its schedule.
    accumulation: Number of forward and backward passes of each step, whose batch has
      accumulation * data.batch_size sequences.
    z_loss: Weight of log(Z)**2 in the objective (arXiv:2204.02311, section 5); 0 is off.
    compute_dtype: Dtype of products and activations. Master weights, optimizer, norms, softmax, the
      loss and sums of gradients are always float32.
    remat: The part of each layer that the backward pass computes anew: "none": nothing; "dots": all but
      products and attention; "full": everything.
    unroll: Number of layers that the compiler sees one after the other in each round of the loop over
      them. With all of them a GPU's step is about a tenth shorter, as nothing is copied into and out of
      stacks, and compiling takes a minute (experiments/train_mfu).
    attention: "einsum" runs anywhere; "cudnn" on a CUDA GPU in bfloat16. "auto" is "cudnn" on a CUDA
      GPU if compute_dtype is bfloat16, else "einsum".
    seed: Seed of the initial weights.
    eval_every, checkpoint_every, log_every: Intervals in steps.
    eval_batches: Number of batches of each evaluation, of data.batch_size sequences; 0: no evaluation,
      which data without a held-out split need.
    keep: Number of checkpoints that are kept.
    init_from: A model file whose weights are the initial ones, in place of random ones.

  Example:
    >>> import neurojax as nj
    >>> from neurojax.train.settings import read_config
    >>> isinstance(read_config("tiny"), nj.TrainConfig)
    True
  """

  model: ModelConfig
  optimizer: OptimizerConfig
  data: DataConfig
  steps: int
  quantization: Quantization = Quantization()
  layout: Layout = Layout()
  tracker: TrackerConfig = TrackerConfig()
  guard: GuardConfig = GuardConfig()
  accumulation: int = 1
  z_loss: float = 0.0
  compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
  remat: Literal["none", "dots", "full"] = "dots"
  unroll: int = 1
  attention: Literal["auto", "einsum", "cudnn"] = "auto"
  seed: int = 0
  eval_every: int = 500
  eval_batches: int = 8
  checkpoint_every: int = 500
  keep: int = 2
  log_every: int = 10
  init_from: str | None = None

  def __post_init__(self) -> None:
    for name in (
      "steps", "accumulation", "unroll", "eval_every", "checkpoint_every", "keep", "log_every"
    ):  # fmt: skip
      if getattr(self, name) < 1:
        raise ValueError(f"{name} = {getattr(self, name)}: it must be positive")
    if self.eval_batches < 0:
      raise ValueError(f"eval_batches = {self.eval_batches}: it must be 0 or positive")
    if not 0 <= self.z_loss < math.inf:
      raise ValueError(f"z_loss = {self.z_loss}: it must be 0 or positive, and finite")
    if self.optimizer.warmup_steps >= self.steps:
      raise ValueError(
        f"optimizer.warmup_steps = {self.optimizer.warmup_steps} of {self.steps} steps: fewer"
      )
    if self.data.seq_len > self.model.context_length:
      raise ValueError(
        f"data.seq_len = {self.data.seq_len} exceeds model.context_length ="
        f" {self.model.context_length}: raise that, it is what the model is told to be good for"
      )
    if self.attention == "cudnn" and self.compute_dtype != "bfloat16":
      raise ValueError(
        f"attention = 'cudnn' computes in bfloat16, not in {self.compute_dtype}: choose 'einsum'"
      )
    for name, value in self.model.beyond_plain().items():
      what = f"model.{name}" if isinstance(value, tuple) else f"model.{name} = {value!r}"
      raise ValueError(
        f"{what}: what is trained is the plain decoder, with qk_norm and sub_norm: leave it out"
      )
    self.layout.check(self.model.sizes(), batch_size=self.data.batch_size)

  @property
  def tokens_per_step(self) -> int:
    """Number of predicted tokens in one step of the optimizer."""
    return self.accumulation * self.data.batch_size * self.data.seq_len

  @classmethod
  def load(cls, path: str | Path) -> "TrainConfig":
    """Reads a TOML file. Raises ValueError for an unknown key, a missing one or a wrong value."""
    return from_toml(cls, Path(path).read_text(encoding="utf-8"), where=str(path))
