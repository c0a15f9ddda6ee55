"""A placement with its predicted times, and the simple ones that ours is compared with. Imports no JAX."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Literal

from neurojax.scaling import predict
from neurojax.scaling import proportional as by_memory
from neurojax.scaling.fleet import Place
from neurojax.scaling.problem import FIRST, LAST, Problem, role_bytes

Objective = Literal["latency", "throughput"]
PREFILL_TOKENS = 256
"""Tokens of a prompt that go through together, `engine.drive.PREFILL_CHUNK`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """Layers on one device of a host.

  Attributes:
    label: Host and device, as `Fleet.places` calls them.
    memory_bytes: Weights and the caches of all sequences.
    step_s: One decode pass of a batch.
    prefill_s: One pass of PREFILL_TOKENS tokens, or of the whole context where that is shorter.
    pipeline: Which of several pipelines side by side it belongs to.
  """

  host: str
  label: str
  device: str | None = None
  first_layer: int
  last_layer: int
  memory_bytes: int
  free_bytes: int
  step_s: float
  prefill_s: float
  pipeline: int = 0

  @property
  def layers(self) -> int:
    return self.last_layer - self.first_layer + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hop:
  """From stage to stage; from or to the coordinator if `a` or `b` is "".

  Attributes:
    latency_s: Until a message arrives, however short.
    transfer_s: How long the activations of a decoded batch keep the link.
    prefill_s: How long those of PREFILL_TOKENS tokens keep it.
  """

  a: str
  b: str
  latency_s: float
  transfer_s: float
  prefill_s: float
  pipeline: int = 0


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
    throughput: Tokens per second with enough batches in flight.
    bound: What no plan can do better, in the objective's unit; None where none was sought.
    gap: How far from the bound, as a fraction of it; 0 if the plan is proven best.
    batches: In flight from which on more do not help.
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
  bound: float | None = None
  gap: float | None = None
  reasons: tuple[Reason, ...] = ()
  limits: tuple[str, ...] = ()

  @property
  def pipelines(self) -> int:
    return 1 + max(stage.pipeline for stage in self.stages)

  def value(self) -> tuple[float, float]:
    """Smaller is better, by the objective and then by the other."""
    first, second = self.latency_s, -self.throughput
    return (first, second) if self.objective == "latency" else (second, first)


def assemble(
  problem: Problem,
  chains: list[list[tuple[int, int]]],
  *,
  objective: Objective,
  method: str,
  bound: float | None = None,
) -> Plan:
  """The plan of one or several pipelines, each a sequence of (place, layers).

  A bound that the plan reaches to a billionth is reached.
  """
  load, config, fleet = problem.load, problem.config, problem.fleet
  tokens = min(PREFILL_TOKENS, problem.context)
  decode = predict.work(config, load, batch=problem.batch, context=problem.context)
  prefill = predict.work(config, load, context=problem.context, tokens=tokens)
  step_bytes = predict.wire_bytes(config, load, batch=problem.batch)
  prefill_bytes = predict.wire_bytes(config, load, tokens=tokens)
  layer, extra_R = role_bytes(config, load)
  stages, hops = [], []
  for pipeline, chain in enumerate(chains):
    first = 0
    before: Place | None = None
    for index, (number, layers) in enumerate(chain):
      place = problem.places[number]
      ends = (index == 0) * FIRST + (index == len(chain) - 1) * LAST

      def seconds(
        work: predict.Work, place: Place = place, n: int = layers, ends: int = ends
      ) -> float:
        cost = work.cost(place.device, load, n, bool(ends & FIRST), bool(ends & LAST))
        return float(max(cost[:2]) + cost[2])

      stages.append(
        Stage(
          host=place.host.label,
          label=place.label,
          device=place.device.name or place.device.kind,
          first_layer=first,
          last_layer=first + layers - 1,
          memory_bytes=int(layer * layers + extra_R[ends]),
          free_bytes=place.free_bytes,
          step_s=seconds(decode),
          prefill_s=seconds(prefill),
          pipeline=pipeline,
        )
      )
      if before is None:
        hops.append(_end_hop(problem, place, tokens, pipeline, back=False))
      else:
        link = fleet.link(before.host.label, place.host.label)
        hops.append(
          Hop(
            a=before.label,
            b=place.label,
            latency_s=link.latency_s,
            transfer_s=step_bytes / link.bytes_per_s,
            prefill_s=prefill_bytes / link.bytes_per_s,
            pipeline=pipeline,
          )
        )
      first += layers
      before = place
    assert before is not None and first == config.num_layers
    hops.append(_end_hop(problem, before, tokens, pipeline, back=True))
  plan = Plan(
    objective=objective,
    method=method,
    stages=tuple(stages),
    hops=tuple(hops),
    batch=problem.batch,
    context=problem.context,
    prefill_tokens=tokens,
  )
  latency_s, rate = predict.pipeline_latency_s(plan), predict.pipeline_throughput(plan)
  gap = None
  if bound is not None:
    gap = latency_s / bound - 1 if objective == "latency" else bound / rate - 1
    gap = 0.0 if gap < 1e-9 else gap
  return dataclasses.replace(
    plan,
    latency_s=latency_s,
    throughput=rate,
    batches=predict.saturating_batches(plan),
    bound=bound,
    gap=gap,
  )


def _end_hop(problem: Problem, place: Place, tokens: int, pipeline: int, *, back: bool) -> Hop:
  link = problem.fleet.link(problem.fleet.coordinator, place.host.label)
  # Ids go in, and one drawn token of each sequence comes back.
  size = predict.TOKEN_BYTES * (1 if back else tokens)
  return Hop(
    a=place.label if back else "",
    b="" if back else place.label,
    latency_s=link.latency_s,
    transfer_s=predict.TOKEN_BYTES * problem.batch / link.bytes_per_s,
    prefill_s=size / link.bytes_per_s,
    pipeline=pipeline,
  )


def proportional(problem: Problem, objective: Objective = "latency") -> Plan:
  """Layers in proportion to free memory, in the fleet's order: what the pipeline does by itself.

  The seed's intent; its own code gives every layer to the first node. Raises: ValueError: too small.
  """
  hosts = [(place.label, place.free_bytes) for place in problem.places]
  placed = by_memory.proportional(problem.config, hosts, problem.load)
  index = {place.label: number for number, place in enumerate(problem.places)}
  chain = [(index[p.host], len(p.span)) for p in placed]
  return assemble(problem, [chain], objective=objective, method="proportional to memory")


def equal(problem: Problem, objective: Objective = "latency") -> Plan:
  """The same number of layers everywhere, in the fleet's order; the first take the remainder.

  Raises: ValueError: a place cannot hold its share, and by how much.
  """
  share, more = divmod(problem.num_layers, len(problem.places))
  chain = [(p, share + (p < more)) for p in range(len(problem.places)) if share + (p < more)]
  return _checked(problem, chain, objective, "equal split")


def fill(problem: Problem, objective: Objective = "latency") -> Plan:
  """Each place in the fleet's order takes all that it can hold.

  Raises: ValueError: layers are left at the end.
  """
  layer, extra_R = role_bytes(problem.config, problem.load)
  left, chain = problem.num_layers, []
  for number, place in enumerate(problem.places):
    start = 0 if chain else FIRST
    most = max(0, int((place.free_bytes - extra_R[start]) // layer))
    most_as_last = max(0, int((place.free_bytes - extra_R[start | LAST]) // layer))
    n = left if most_as_last >= left else min(most, left - 1)
    if n > 0:
      chain.append((number, n))
      left -= n
    if not left:
      return _checked(problem, chain, objective, "fill in order")
  raise ValueError(
    f"fill in order leaves {left} of {problem.num_layers} layers over: {left * layer:,} bytes more, and "
    "the head's, on a last host would do"
  )


def greedy(problem: Problem, objective: Objective = "latency") -> Plan:
  """Every layer to the place with most memory left: NeuroGrid's scheduler.

  Not contiguous: two like places take turns, and every change is a hop and a stage of its own. Here
  the layers' and ends' true bytes are counted, and the head lies with the last layer.

  Raises: ValueError: a layer finds no place, and by how much.
  """
  layer, extra_R = role_bytes(problem.config, problem.load)
  left = [place.free_bytes for place in problem.places]
  total = problem.num_layers
  chain: list[tuple[int, int]] = []
  for index in range(total):
    need = layer + int(extra_R[(index == 0) * FIRST + (index == total - 1) * LAST])
    chosen = max(range(len(left)), key=lambda p: (left[p], -p))
    if left[chosen] < need:
      raise ValueError(
        f"greedy: layer {index} of {total} finds no place: it takes {need:,} bytes, and the most that is "
        f"left, on {problem.places[chosen].label}, is {left[chosen]:,}"
      )
    left[chosen] -= need
    if chain and chain[-1][0] == chosen:
      chain[-1] = chosen, chain[-1][1] + 1
    else:
      chain.append((chosen, 1))
  return _checked(problem, chain, objective, "greedy by free memory")


BASELINES: dict[str, Callable[[Problem, Objective], Plan]] = {
  "proportional": proportional,
  "greedy": greedy,
  "equal": equal,
  "fill": fill,
}


def _checked(
  problem: Problem, chain: list[tuple[int, int]], objective: Objective, method: str
) -> Plan:
  plan = assemble(problem, [chain], objective=objective, method=method)
  taken: Counter[str] = Counter()
  for stage in plan.stages:
    taken[stage.label] += stage.memory_bytes
  for place in problem.places:
    if taken[place.label] > place.free_bytes:
      raise ValueError(
        f"{method}: {place.label} would take {taken[place.label]:,} bytes and has {place.free_bytes:,}, "
        f"{taken[place.label] - place.free_bytes:,} too few"
      )
  return plan
