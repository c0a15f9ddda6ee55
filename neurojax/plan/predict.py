"""Predicts the seconds of a stage, of a hop and of a whole pipeline, for all plans alike.

A step reads the stage's weights once, and the keys and values of every sequence in it. It takes the longer of
reading and multiplying, plus the device's overheads.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Protocol

from neurojax import count, forms
from neurojax.config import ModelConfig, Span
from neurojax.count.serving import Load
from neurojax.plan.fleet import Device, Fleet

TOKEN_BYTES = 16
"""Bytes sent to the first stage, and back from the last, for each token: an id, a log-probability and their
frame, rounded up."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepCost:
  """Seconds of one step of one stage, by cause."""

  read_s: float
  compute_s: float
  overhead_s: float

  @property
  def total(self) -> float:
    return max(self.read_s, self.compute_s) + self.overhead_s

  @property
  def limit(self) -> str:
    """The cause that takes longest: "reading", "multiplying" or "overhead"."""
    times = {"reading": self.read_s, "multiplying": self.compute_s, "overhead": self.overhead_s}
    return max(times, key=lambda name: times[name])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """Bytes read and FLOPs computed by one step, by part of the model. Made by `work`.

  Attributes:
    tokens: New tokens in the step.
    samples: Entries of the logits that tokens are sampled from.
  """

  tokens: int
  layer_bytes: int
  layer_flops: int
  embedding_bytes: int
  head_bytes: int
  head_flops: int
  samples: int

  def cost(self, device: Device, load: Load, layers: Any, first: bool, last: bool) -> Any:
    """Seconds of reading, of computing and of overhead on a device.

    Args:
      layers: Number of layers; may be an array.
      first: The stage holds the embedding.
      last: The stage holds the final norm and the head.

    Raises: ValueError: the device's read_bytes_per_s is unknown.
    """
    read_bytes = layers * self.layer_bytes + first * self.embedding_bytes + last * self.head_bytes
    flops = layers * self.layer_flops + last * self.head_flops
    rate = device.decode_rate(load.weights)
    if rate is None:
      raise ValueError(
        f"read_bytes_per_s of {device.name or device.kind} is not known: measure it with `neurojax "
        "probe` on its host, or write it into the fleet file"
      )
    # A measured rate of decoding one token contains its products already. With more tokens, or without a
    # measurement, the slower of reading and multiplying counts.
    is_measured = self.tokens == 1 and device.is_measured(load.weights)
    flops_per_s = None if is_measured else device.flops_per_s
    compute_s = 0.0 * layers if flops_per_s is None else flops / flops_per_s
    overhead_s = layers * device.layer_overhead_s + device.step_overhead_s
    overhead_s = overhead_s + (not last) * device.handover_s
    return (
      read_bytes / rate,
      compute_s,
      overhead_s + last * self.samples * device.sample_s_per_entry,
    )


def work(config: ModelConfig, load: Load, *, batch: int = 1, context: int, tokens: int = 1) -> Work:
  """The work of one step of `batch` sequences with `tokens` new tokens each.

  Args:
    context: Positions in each cache after the step, the new ones included.
  Raises: ValueError: a number below 1, or more new tokens than positions.
  """
  for name, value in (("batch", batch), ("tokens", tokens), ("context", context)):
    if value < 1:
      raise ValueError(f"{name} = {value}: it must be at least 1")
  if tokens > context:
    raise ValueError(f"tokens = {tokens}: more than context = {context}, which includes them")
  form = load.form
  cache = count.cache_bytes(config, 1, capacity=context, dtype=load.cache_dtype)
  matrices = sum(2 * k * n for k, n in count.layer_matrices(config).values())
  # Twice the mean number of positions that a new token attends to, itself included.
  seen_twice = 2 * context - tokens + 1
  attention = 2 * config.num_heads * config.head_dim * seen_twice
  embedding = count.embedding_bytes(config, **form)
  return Work(
    tokens=batch * tokens,
    layer_bytes=count.layer_bytes(config, **form) + batch * cache,
    layer_flops=batch * tokens * (matrices + attention),
    embedding_bytes=-(-embedding // config.vocab_size) * batch * tokens,
    # Only the last position of each sequence gets logits.
    head_bytes=count.head_bytes(config, **form),
    head_flops=2 * config.model_dim * config.vocab_size * batch,
    samples=batch * config.vocab_size,
  )


def stage_step_s(
  config: ModelConfig,
  span: Span,
  load: Load,
  device: Device,
  *,
  batch: int = 1,
  context: int,
  tokens: int = 1,
) -> StepCost:
  """Predict the seconds of one step of a stage: decode with tokens = 1, else prefill.

  Args:
    batch: Sequences that the step computes together.
    context: Positions in each cache after the step, the new ones included.
  Raises: ValueError: the device's read_bytes_per_s is unknown, or a number below 1.
  """
  done = work(config, load, batch=batch, context=context, tokens=tokens)
  read_s, compute_s, overhead_s = done.cost(device, load, len(span), span.is_first, span.is_last)
  return StepCost(read_s=read_s, compute_s=float(compute_s), overhead_s=overhead_s)


def wire_bytes(config: ModelConfig, load: Load, *, batch: int = 1, tokens: int = 1) -> int:
  """Bytes of the activations that one stage sends to the next in a step."""
  return batch * tokens * config.model_dim * forms.DTYPE_BYTES[load.dtype]


def hop_s(fleet: Fleet, a: str | None, b: str | None, size_bytes: int) -> float:
  """Seconds of a message one way from host to host, by label; None is outside the fleet."""
  return fleet.link(a, b).seconds(size_bytes)


class TimedStage(Protocol):
  """The fields of `plan.Stage` that times are predicted from."""

  @property
  def label(self) -> str: ...
  @property
  def step_s(self) -> float: ...
  @property
  def pipeline(self) -> int: ...
  @property
  def share(self) -> float: ...


class TimedHop(Protocol):
  """The fields of `plan.Hop` that times are predicted from."""

  @property
  def a(self) -> str: ...
  @property
  def b(self) -> str: ...
  @property
  def latency_s(self) -> float: ...
  @property
  def transfer_s(self) -> float: ...
  @property
  def pipeline(self) -> int: ...
  @property
  def share(self) -> float: ...


class Timed(Protocol):
  """The fields of `plan.Plan` that times are predicted from."""

  @property
  def stages(self) -> Sequence[TimedStage]: ...
  @property
  def hops(self) -> Sequence[TimedHop]: ...
  @property
  def batch(self) -> int: ...


def pipelines(plan: Timed) -> list[tuple[list[TimedStage], list[TimedHop]]]:
  """The stages and the hops of each pipeline."""
  number = 1 + max(stage.pipeline for stage in plan.stages)
  parts: list[tuple[list[TimedStage], list[TimedHop]]] = [([], []) for _ in range(number)]
  for stage in plan.stages:
    parts[stage.pipeline][0].append(stage)
  for hop in plan.hops:
    parts[hop.pipeline][1].append(hop)
  return parts


def pipeline_latency_s(plan: Timed) -> float:
  """Seconds of one decoded token with nothing else in flight, over the slowest way through."""
  return max(_latency_s(stages, hops) for stages, hops in pipelines(plan))


def pipeline_throughput(plan: Timed, *, micro_batches: int | None = None) -> float:
  """Tokens per second with `micro_batches` batches in flight in each pipeline; as many as help if None.

  A stage computes one batch at a time, and a link carries one at a time (its latency delays no other). The
  busiest of them sets the pace. With too few batches in flight the round trip does, on average over the ways
  through.
  """
  return sum(
    plan.batch / interval_s(stages, hops, micro_batches) for stages, hops in pipelines(plan)
  )


def interval_s(
  stages: Sequence[TimedStage], hops: Sequence[TimedHop], micro_batches: int | None = None
) -> float:
  """Seconds from one batch to the next of one pipeline with `micro_batches` in flight; as many as help if
  None."""
  busy_s = bottleneck_s(stages, hops)
  if micro_batches is None:
    return busy_s
  return max(busy_s, _mean_latency_s(stages, hops) / micro_batches)


def bottleneck_s(stages: Sequence[TimedStage], hops: Sequence[TimedHop]) -> float:
  """Seconds that a batch occupies the busiest device or link; a placement may use one several times."""
  busy_s: dict[object, float] = {}
  for stage in stages:
    busy_s[stage.label] = busy_s.get(stage.label, 0.0) + stage.share * stage.step_s
  for hop in hops:
    busy_s[hop.a, hop.b] = busy_s.get((hop.a, hop.b), 0.0) + hop.share * hop.transfer_s
  return max(busy_s.values())


def saturating_batches(plan: Timed) -> int:
  """Batches in flight beyond which more do not help, in the pipeline that needs most."""
  return max(
    math.ceil(_mean_latency_s(stages, hops) / bottleneck_s(stages, hops) - 1e-9)
    for stages, hops in pipelines(plan)
  )


def _mean_latency_s(stages: Sequence[TimedStage], hops: Sequence[TimedHop]) -> float:
  compute_s = math.fsum(stage.share * stage.step_s for stage in stages)
  return compute_s + math.fsum(hop.share * (hop.latency_s + hop.transfer_s) for hop in hops)


def _latency_s(stages: Sequence[TimedStage], hops: Sequence[TimedHop]) -> float:
  if all(stage.share == 1 for stage in stages):
    # There is one way through, though it may use a place several times.
    return _mean_latency_s(stages, hops)
  step_s = {stage.label: stage.step_s for stage in stages}
  onward: dict[str, list[TimedHop]] = {}
  for hop in hops:
    onward.setdefault(hop.a, []).append(hop)

  @functools.cache
  def rest_s(label: str) -> float:
    """Seconds from the arrival at a stage to the return of the token."""
    return step_s[label] + max(
      hop.latency_s + hop.transfer_s + (rest_s(hop.b) if hop.b else 0.0) for hop in onward[label]
    )

  return max(hop.latency_s + hop.transfer_s + rest_s(hop.b) for hop in onward[""])
