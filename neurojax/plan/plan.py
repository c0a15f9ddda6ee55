"""The nouns of planning: a plan, its stages and hops, and the reasons for them."""

import dataclasses
from typing import Literal

from neurojax.config import Span
from neurojax.count.wording import short
from neurojax.plan.notebook import shown

Objective = Literal["latency", "throughput"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """A span of layers on one place.

  Attributes:
    host: Label of the host.
    address: host:port of the host's stage server, if the fleet has it.
    label: Label of the place, as `Fleet.places` has it.
    device: Name of the device.
    memory_bytes: Bytes of weights, of the caches of all sequences, and of working memory.
    free_bytes: Bytes that a stage may take there.
    step_s: Seconds of one decode step of a batch.
    prefill_s: Seconds of one prefill step of `Plan.prefill_tokens` tokens.
    pipeline: Number of the pipeline that the stage belongs to, from 0 on.
    share: Fraction of the pipeline's sequences that pass here; below 1 where other places hold the same
      layers.
  """

  host: str
  address: str | None = None
  label: str
  device: str | None = None
  first_layer: int
  last_layer: int
  memory_bytes: int
  free_bytes: int
  step_s: float
  prefill_s: float
  pipeline: int = 0
  share: float = 1.0

  @property
  def layers(self) -> int:
    return self.last_layer - self.first_layer + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hop:
  """The way from one stage to the next.

  Attributes:
    a, b: Labels of the two places; "" is the coordinator.
    latency_s: Seconds until a message arrives, however short it is.
    transfer_s: Seconds that the activations of a decoded batch occupy the link.
    prefill_s: Seconds that those of `Plan.prefill_tokens` tokens occupy it.
    pipeline: Number of the pipeline that the hop belongs to.
    share: Fraction of the pipeline's sequences that take this way.
  """

  a: str
  b: str
  latency_s: float
  transfer_s: float
  prefill_s: float
  pipeline: int = 0
  share: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reason:
  """The number of layers that a place gets, and why."""

  host: str
  layers: int
  why: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """Which place holds which span of layers, with predicted times.

  Attributes:
    objective: "latency" of one decoded token, or "throughput" of many sequences.
    method: Name of the method that found the plan.
    stages: Stages, in the order of the layers within each pipeline.
    hops: Ways between the coordinator and the stages.
    batch: Sequences that each step computes together.
    context: Positions of each sequence.
    prefill_tokens: Tokens of the prefill step that `prefill_s` of stages and hops is for.
    latency_s: Seconds of a decoded token of one batch, with nothing else in flight.
    throughput: Tokens per second with `in_flight` batches in each pipeline; with as many as help if None.
    batches: Batches in flight in each pipeline beyond which more do not help, at most `in_flight`.
    in_flight: Batches in flight in each pipeline; None: as many as help.
    sequences: Sequences in each pipeline for whose caches memory is planned; None: not given.
    bound: Value that no plan can beat, in the unit of the objective; None: not computed.
    gap: Distance from the bound, as a fraction of it; 0 proves that the plan is the best.
    reasons: For every place, its layers and the reason.
    limits: Sentences that say what limits the speed.

  Example:
    >>> import neurojax as nj
    >>> plan = nj.plan("llama-8b", "lab", weights="w2a8")
    >>> plan.stages[0].first_layer, plan.stages[-1].last_layer
    (0, 31)
  """

  objective: Objective
  method: str
  stages: tuple[Stage, ...]
  hops: tuple[Hop, ...]
  batch: int
  context: int
  prefill_tokens: int
  latency_s: float = 0.0
  throughput: float = 0.0
  batches: int = 1
  in_flight: int | None = None
  sequences: int | None = None
  bound: float | None = None
  gap: float | None = None
  reasons: tuple[Reason, ...] = ()
  limits: tuple[str, ...] = ()

  @property
  def pipelines(self) -> int:
    return 1 + max(stage.pipeline for stage in self.stages)

  @property
  def is_replicated(self) -> bool:
    """True if several places hold the same layer."""
    return self.pipelines > 1 or any(stage.share < 1 for stage in self.stages)

  def summary(self) -> str:
    """One line: what the plan promises."""
    each = f" in each of {self.pipelines} pipelines" if self.pipelines > 1 else ""
    return (
      f"{short(self.latency_s * 1e3)} ms a token, {short(self.throughput)} tokens/s with "
      f"{self.batches} in flight{each}"
    )

  def proof(self) -> str:
    """One line: how the plan was found, and how far from the best it can be."""
    if self.gap is None:
      proof = "how far from the best it is was not bounded"
    else:
      proof = f"at most {self.gap:.2%} from the best" if self.gap else "proven best"
    return f"Found by {self.method}: {proof}."

  def _repr_html_(self) -> str:
    why = {reason.host: reason.why for reason in self.reasons}
    rows = [
      (
        stage.label,
        stage.device or "",
        f"{stage.first_layer}..{stage.last_layer}",
        f"{stage.memory_bytes / 1e9:.3g} of {stage.free_bytes / 1e9:.3g} GB",
        f"{short(stage.step_s * 1e3)} ms",
        why.get(stage.label, ""),
      )
      for stage in self.stages
    ]
    unused = [(r.host, "", "none", "", "", r.why) for r in self.reasons if not r.layers]
    header = ("place", "device", "layers", "memory", "step", "why")
    return shown(f"{self.summary()}. {self.proof()}", header, rows + unused)

  def value(self) -> tuple[float, float]:
    """A key to compare plans by: smaller is better, by the objective first."""
    first, second = self.latency_s, -self.throughput
    return (first, second) if self.objective == "latency" else (second, first)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
  """A stage of a running pipeline: a host, the span that it holds, and the memory that takes.

  Attributes:
    memory_bytes: Bytes of weights, of the caches of all sequences, and of working memory.
    free_bytes: Bytes that the host has free.
  """

  host: str
  span: Span
  memory_bytes: int
  free_bytes: int


@dataclasses.dataclass(frozen=True)
class Held:
  """Layers on a place, and the batches a second that pass there.

  Attributes:
    place: Number of the place.
    first: First layer.
    layers: Number of layers.
    rate: Batches a second.
  """

  place: int
  first: int
  layers: int
  rate: float

  @property
  def end(self) -> int:
    return self.first + self.layers


def bounded(plan: Plan, bound: float | None) -> Plan:
  """The plan with its distance from a bound. Within a billionth of the bound the distance is 0."""
  gap = None
  if bound is not None:
    gap = plan.latency_s / bound if plan.objective == "latency" else bound / plan.throughput
    gap = 0.0 if gap - 1 < 1e-9 else gap - 1
  return dataclasses.replace(plan, bound=bound, gap=gap)
