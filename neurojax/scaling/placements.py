"""A placement with its predicted times, and the simple ones that ours is compared with. Imports no JAX."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from neurojax.scaling import predict
from neurojax.scaling import proportional as by_memory
from neurojax.scaling.problem import FIRST, LAST, MIDDLE, Problem

Objective = Literal["latency", "throughput"]
PREFILL_TOKENS = 256
"""Tokens of a prompt that go through together, `engine.drive.PREFILL_CHUNK`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """Layers on one device of a host.

  Attributes:
    address: Where the host's stage server is, if the fleet says so.
    label: Host and device, as `Fleet.places` calls them.
    memory_bytes: Weights and the caches of all sequences.
    step_s: One decode pass of a batch.
    prefill_s: One pass of PREFILL_TOKENS tokens, or of the whole context where that is shorter.
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
    prefill_s: How long those of PREFILL_TOKENS tokens keep it.
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

  def value(self) -> tuple[float, float]:
    """Smaller is better, by the objective and then by the other."""
    first, second = self.latency_s, -self.throughput
    return (first, second) if self.objective == "latency" else (second, first)


class _Maker:
  """Stages and hops of a problem's plans."""

  def __init__(self, problem: Problem):
    load, config = problem.load, problem.config
    self.problem = problem
    self.tokens = min(PREFILL_TOKENS, problem.context)
    self.decode = predict.work(config, load, batch=problem.batch, context=problem.context)
    self.prefill = predict.work(config, load, context=problem.context, tokens=self.tokens)
    self.step_bytes = predict.wire_bytes(config, load, batch=problem.batch)
    self.prefill_bytes = predict.wire_bytes(config, load, tokens=self.tokens)

  def stage(
    self, number: int, first: int, layers: int, *, pipeline: int = 0, share: float = 1.0
  ) -> Stage:
    place = self.problem.places[number]
    layer, extra_R = self.problem.role_bytes(number)
    ends = (first == 0) * FIRST + (first + layers == self.problem.num_layers) * LAST

    def seconds(work: predict.Work) -> float:
      is_first, is_last = bool(ends & FIRST), bool(ends & LAST)
      cost = work.cost(place.device, self.problem.load, layers, is_first, is_last)
      return float(max(cost[:2]) + cost[2])

    return Stage(
      host=place.host.label,
      address=place.host.address,
      label=place.label,
      device=place.device.name or place.device.kind,
      first_layer=first,
      last_layer=first + layers - 1,
      memory_bytes=int(layer * layers + extra_R[ends]),
      free_bytes=place.free_bytes,
      step_s=seconds(self.decode),
      prefill_s=seconds(self.prefill),
      pipeline=pipeline,
      share=share,
    )

  def hop(self, a: int | None, b: int | None, *, pipeline: int = 0, share: float = 1.0) -> Hop:
    """From place to place; None is the coordinator."""
    places, fleet = self.problem.places, self.problem.fleet
    ends = [None if number is None else places[number] for number in (a, b)]
    hosts = [fleet.coordinator if end is None else end.host.label for end in ends]
    link = fleet.link(hosts[0], hosts[1])
    step_bytes, prefill_bytes = self.step_bytes, self.prefill_bytes
    if a is None or b is None:
      # Ids go in, and one drawn token of each sequence comes back.
      step_bytes = predict.TOKEN_BYTES * self.problem.batch
      prefill_bytes = predict.TOKEN_BYTES * (self.tokens if a is None else 1)
    return Hop(
      a="" if ends[0] is None else ends[0].label,
      b="" if ends[1] is None else ends[1].label,
      latency_s=link.latency_s,
      transfer_s=step_bytes / link.bytes_per_s,
      prefill_s=prefill_bytes / link.bytes_per_s,
      pipeline=pipeline,
      share=share,
    )

  def plan(
    self,
    stages: Sequence[Stage],
    hops: Sequence[Hop],
    *,
    objective: Objective,
    method: str,
    bound: float | None,
  ) -> Plan:
    plan = Plan(
      objective=objective,
      method=method,
      stages=tuple(stages),
      hops=tuple(hops),
      batch=self.problem.batch,
      context=self.problem.context,
      prefill_tokens=self.tokens,
      sequences=self.problem.load.max_sequences,
      in_flight=self.problem.in_flight,
    )
    return bounded(
      dataclasses.replace(
        plan,
        latency_s=predict.pipeline_latency_s(plan),
        throughput=predict.pipeline_throughput(plan, micro_batches=plan.in_flight),
        batches=min(filter(None, (predict.saturating_batches(plan), plan.in_flight))),
      ),
      bound,
    )


def bounded(plan: Plan, bound: float | None) -> Plan:
  """The plan with its distance from a bound; one that it reaches to a billionth is reached."""
  gap = None
  if bound is not None:
    gap = plan.latency_s / bound if plan.objective == "latency" else bound / plan.throughput
    gap = 0.0 if gap - 1 < 1e-9 else gap - 1
  return dataclasses.replace(plan, bound=bound, gap=gap)


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
  maker = _Maker(problem)
  stages, hops = [], []
  for pipeline, chain in enumerate(chains):
    first = 0
    before: int | None = None
    for number, layers in chain:
      stages.append(maker.stage(number, first, layers, pipeline=pipeline))
      hops.append(maker.hop(before, number, pipeline=pipeline))
      first += layers
      before = number
    assert before is not None and first == problem.num_layers
    hops.append(maker.hop(before, None, pipeline=pipeline))
  return maker.plan(stages, hops, objective=objective, method=method, bound=bound)


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


def assemble_ways(
  problem: Problem,
  held: Sequence[Held],
  ways: Mapping[tuple[int, int], float],
  *,
  method: str,
  bound: float | None = None,
) -> Plan:
  """The plan in which several places may hold the same layers, each sequence taking one way through.

  Args:
    ways: Batches a second from one of `held` to another, by index. What is connected by them is one
      pipeline.
  """
  maker = _Maker(problem)
  parts = _components(len(held), ways)
  total = [sum(held[i].rate for i in part if held[i].first == 0) for part in parts]
  stages, hops = [], []
  for pipeline, part in enumerate(parts):
    for i in sorted(part, key=lambda i: (held[i].first, held[i].end, held[i].place)):
      one = held[i]
      share = min(1.0, one.rate / total[pipeline])
      stages.append(maker.stage(one.place, one.first, one.layers, pipeline=pipeline, share=share))
      if one.first == 0:
        hops.append(maker.hop(None, one.place, pipeline=pipeline, share=share))
      if one.end == problem.num_layers:
        hops.append(maker.hop(one.place, None, pipeline=pipeline, share=share))
    inside = set(part)
    for (i, j), rate in ways.items():
      if i in inside:
        share = min(1.0, rate / total[pipeline])
        hops.append(maker.hop(held[i].place, held[j].place, pipeline=pipeline, share=share))
  return maker.plan(stages, hops, objective="throughput", method=method, bound=bound)


def _components(number: int, ways: Iterable[tuple[int, int]]) -> list[list[int]]:
  """What hangs together, in the order of the first of each."""
  root = list(range(number))

  def find(i: int) -> int:
    while root[i] != i:
      root[i] = i = root[root[i]]
    return i

  for i, j in ways:
    low, high = sorted((find(i), find(j)))
    root[high] = low
  found: dict[int, list[int]] = {}
  for i in range(number):
    found.setdefault(find(i), []).append(i)
  return list(found.values())


def proportional(problem: Problem, objective: Objective = "latency") -> Plan:
  """Layers in proportion to free memory, in the fleet's order: what the pipeline does by itself.

  The seed's intent; its own code gives every layer to the first node. Raises: ValueError: too small.
  """
  hosts = [(place.label, place.free_bytes) for place in problem.places]
  kinds = [place.device.kind for place in problem.places]
  placed = by_memory.proportional(problem.config, hosts, problem.load, kinds)
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
  left, chain = problem.num_layers, []
  for number, place in enumerate(problem.places):
    layer, extra_R = problem.role_bytes(number)
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

  Not contiguous: two like places take turns, and every change is a hop and a stage of its own. What is
  compared is its rule alone, by our count: true bytes (its own estimate is of FP16, times 1.3), the head
  with the last layer (its coordinator keeps both ends), and a hop only where the place changes (its
  code makes a round trip for every remote layer). Each of these makes it look better than it was.

  Raises: ValueError: a layer finds no place, and by how much.
  """
  left = [place.free_bytes for place in problem.places]
  total = problem.num_layers
  chain: list[tuple[int, int]] = []
  for index in range(total):
    chosen = max(range(len(left)), key=lambda p: (left[p], -p))
    is_new = left[chosen] == problem.places[chosen].free_bytes
    layer, extra_R = problem.role_bytes(chosen)
    need = layer + int(extra_R[(index == 0) * FIRST + (index == total - 1) * LAST])
    need -= 0 if is_new else int(extra_R[MIDDLE])
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
  return _checked(problem, chain, objective, "greedy by free memory, layer by layer")


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
