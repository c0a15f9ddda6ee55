"""A plan: which host holds which layers, with its predicted times."""

import dataclasses
from typing import Literal

from neurojax.config import Span
from neurojax.count.wording import short
from neurojax.plan.notebook import shown

Objective = Literal["latency", "throughput"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """Layers on one device of a host.

  Attributes:
    address: Where the host's stage server is, if the fleet says so.
    label: Host and device, as `Fleet.places` calls them.
    memory_bytes: Weights and the caches of all sequences.
    step_s: One decode pass of a batch.
    prefill_s: One pass of `forms.PREFILL` tokens, or of the whole context where that is shorter.
    pipeline: Which of several pipelines side by side it belongs to.
    share: Of the pipeline's sequences, how many pass here; below 1 where others hold the same layers.
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
  """From stage to stage; from or to the coordinator if `a` or `b` is "".

  Attributes:
    latency_s: Until a message arrives, however short.
    transfer_s: How long the activations of a decoded batch keep the link.
    prefill_s: How long those of `forms.PREFILL` tokens keep it.
    share: Of the pipeline's sequences, how many take this way.
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
  """What a place gets, and why."""

  host: str
  layers: int
  why: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """Every layer once, in order, with its times.

  Attributes:
    method: How it was found.
    latency_s: One decoded token of one batch, nothing else under way.
    throughput: Tokens per second with `in_flight` batches in each pipeline, with enough if that is None.
    bound: What no plan can do better, in the objective's unit; None where none was sought.
    gap: How far from the bound, as a fraction of it; 0 if the plan is proven best.
    batches: In flight in each pipeline from which on more do not help, `in_flight` of them at most.
    sequences: In flight in each pipeline, for whose caches memory is planned; None if nobody said.
    prefill_tokens: What `prefill_s` of stages and hops is for.
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
    """Whether some layer lies more than once."""
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
    """Smaller is better, by the objective and then by the other."""
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
  """Layers on a place, and how many batches a second pass there."""

  place: int
  first: int
  layers: int
  rate: float

  @property
  def end(self) -> int:
    return self.first + self.layers


def bounded(plan: Plan, bound: float | None) -> Plan:
  """The plan with its distance from a bound; one that it reaches to a billionth is reached."""
  gap = None
  if bound is not None:
    gap = plan.latency_s / bound if plan.objective == "latency" else bound / plan.throughput
    gap = 0.0 if gap - 1 < 1e-9 else gap - 1
  return dataclasses.replace(plan, bound=bound, gap=gap)
