"""Seconds of a stage, of a hop and of a whole pipeline. The one predictor of all placements.

A pass reads the stage's weights once and the keys and values of every sequence in it. It takes as long
as the slower of reading and multiplying, and the device's overheads.
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
"""What goes to the first stage and comes back from the last for each token: an id, a log-probability
and their frame, rounded up."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepCost:
  """Seconds of one pass through one stage."""

  read_s: float
  compute_s: float
  overhead_s: float

  @property
  def total(self) -> float:
    return max(self.read_s, self.compute_s) + self.overhead_s

  @property
  def limit(self) -> str:
    """What takes longest: "reading", "multiplying" or "overhead"."""
    times = {"reading": self.read_s, "multiplying": self.compute_s, "overhead": self.overhead_s}
    return max(times, key=lambda name: times[name])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """What one pass reads and multiplies, by part of the model. Made by `work`. tokens: New ones in it."""

  tokens: int
  layer_bytes: int
  layer_flops: int
  embedding_bytes: int
  head_bytes: int
  head_flops: int
  samples: int

  def cost(self, device: Device, load: Load, layers: Any, first: bool, last: bool) -> Any:
    """(read, compute, overhead) seconds of `layers` layers, a number or an array of numbers.

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
    # What decoding one token was measured to take has its products in it, whatever they are made of. Of
    # more tokens, or without a measurement, the slower of reading and multiplying counts.
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
  """One pass of `batch` sequences with `tokens` new tokens each.

  Args:
    context: Positions in each cache when the pass ends, the new ones included.
  Raises: ValueError: a number below 1, or more new tokens than positions.
  """
  for name, value in (("batch", batch), ("tokens", tokens), ("context", context)):
    if value < 1:
      raise ValueError(f"{name} = {value}: it must be at least 1")
  if tokens > context:
    raise ValueError(f"tokens = {tokens}: more than context = {context}, which includes them")
  form = load.form
  cache = count.cache_bytes(config, 1, capacity=context, dtype=load.dtype)
  matrices = sum(2 * k * n for k, n in count.layer_matrices(config).values())
  # Each new token looks at those before it and at itself: on average so many, times two.
  seen_twice = 2 * context - tokens + 1
  attention = 2 * config.num_heads * config.head_dim * seen_twice
  embedding = count.embedding_bytes(config, **form)
  return Work(
    tokens=batch * tokens,
    layer_bytes=count.layer_bytes(config, **form) + batch * cache,
    layer_flops=batch * tokens * (matrices + attention),
    embedding_bytes=-(-embedding // config.vocab_size) * batch * tokens,
    # Only what is to be drawn gets logits: the last position of each sequence.
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
  """Seconds of one pass through a stage: decode with tokens = 1, else prefill.

  Args:
    batch: Sequences that go through together.
    context: Positions in each cache when the pass ends, the new ones included.
  Raises: ValueError: the device's read_bytes_per_s is unknown, or a number below 1.
  """
  done = work(config, load, batch=batch, context=context, tokens=tokens)
  read_s, compute_s, overhead_s = done.cost(device, load, len(span), span.is_first, span.is_last)
  return StepCost(read_s=read_s, compute_s=float(compute_s), overhead_s=overhead_s)


def wire_bytes(config: ModelConfig, load: Load, *, batch: int = 1, tokens: int = 1) -> int:
  """Activations that pass from one stage to the next."""
  return batch * tokens * config.model_dim * forms.DTYPE_BYTES[load.dtype]


def hop_s(fleet: Fleet, a: str | None, b: str | None, size_bytes: int) -> float:
  """One way from host to host, by label; None is outside the fleet."""
  return fleet.link(a, b).seconds(size_bytes)


class TimedStage(Protocol):
  """step_s: One pass. pipeline: Which of several pipelines side by side it belongs to. label: Where.
  share: Of the pipeline's sequences, how many pass here; all, unless others hold the same layers."""

  @property
  def label(self) -> str: ...
  @property
  def step_s(self) -> float: ...
  @property
  def pipeline(self) -> int: ...
  @property
  def share(self) -> float: ...


class TimedHop(Protocol):
  """From `a` to `b`: latency_s passes for one message; transfer_s keeps the link from the next one.
  share: Of the pipeline's sequences, how many take it."""

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
  """A plan, as far as its times go. batch: Sequences in each pass."""

  @property
  def stages(self) -> Sequence[TimedStage]: ...
  @property
  def hops(self) -> Sequence[TimedHop]: ...
  @property
  def batch(self) -> int: ...


def pipelines(plan: Timed) -> list[tuple[list[TimedStage], list[TimedHop]]]:
  """Stages and hops of each of the pipelines side by side: what shares no stage with the others."""
  number = 1 + max(stage.pipeline for stage in plan.stages)
  parts: list[tuple[list[TimedStage], list[TimedHop]]] = [([], []) for _ in range(number)]
  for stage in plan.stages:
    parts[stage.pipeline][0].append(stage)
  for hop in plan.hops:
    parts[hop.pipeline][1].append(hop)
  return parts


def pipeline_latency_s(plan: Timed) -> float:
  """One decoded token, nothing else under way: all stages and all hops, the slowest way through."""
  return max(_latency_s(stages, hops) for stages, hops in pipelines(plan))


def pipeline_throughput(plan: Timed, *, micro_batches: int | None = None) -> float:
  """Tokens per second with so many batches in flight in each pipeline; as many as help if None.

  A stage computes one batch at a time, a link carries one at a time (its latency holds nobody up): the
  one that is busiest, of the sequences that pass it, sets the pace; or the round trip does, on average
  over the ways through, while too few batches are in flight.
  """
  return sum(
    plan.batch / interval_s(stages, hops, micro_batches) for stages, hops in pipelines(plan)
  )


def interval_s(
  stages: Sequence[TimedStage], hops: Sequence[TimedHop], micro_batches: int | None = None
) -> float:
  """From one batch to the next of one pipeline, with so many in flight, or as many as help."""
  busy_s = bottleneck_s(stages, hops)
  if micro_batches is None:
    return busy_s
  return max(busy_s, _mean_latency_s(stages, hops) / micro_batches)


def bottleneck_s(stages: Sequence[TimedStage], hops: Sequence[TimedHop]) -> float:
  """How long a batch keeps the busiest device or link, which a placement may come back to."""
  busy_s: dict[object, float] = {}
  for stage in stages:
    busy_s[stage.label] = busy_s.get(stage.label, 0.0) + stage.share * stage.step_s
  for hop in hops:
    busy_s[hop.a, hop.b] = busy_s.get((hop.a, hop.b), 0.0) + hop.share * hop.transfer_s
  return max(busy_s.values())


def saturating_batches(plan: Timed) -> int:
  """Batches in flight from which on more do not help, in the pipeline that needs most."""
  return max(
    math.ceil(_mean_latency_s(stages, hops) / bottleneck_s(stages, hops) - 1e-9)
    for stages, hops in pipelines(plan)
  )


def _mean_latency_s(stages: Sequence[TimedStage], hops: Sequence[TimedHop]) -> float:
  compute_s = math.fsum(stage.share * stage.step_s for stage in stages)
  return compute_s + math.fsum(hop.share * (hop.latency_s + hop.transfer_s) for hop in hops)


def _latency_s(stages: Sequence[TimedStage], hops: Sequence[TimedHop]) -> float:
  if all(stage.share == 1 for stage in stages):
    # One way, though it may come back to a place.
    return _mean_latency_s(stages, hops)
  step_s = {stage.label: stage.step_s for stage in stages}
  onward: dict[str, list[TimedHop]] = {}
  for hop in hops:
    onward.setdefault(hop.a, []).append(hop)

  @functools.cache
  def rest_s(label: str) -> float:
    """From the arrival at a stage to the return of the token."""
    return step_s[label] + max(
      hop.latency_s + hop.transfer_s + (rest_s(hop.b) if hop.b else 0.0) for hop in onward[label]
    )

  return max(hop.latency_s + hop.transfer_s + rest_s(hop.b) for hop in onward[""])
