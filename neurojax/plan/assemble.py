"""Builds a plan from chosen places and layers: its stages, hops and predicted times."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from neurojax.forms import PREFILL
from neurojax.plan import predict
from neurojax.plan.plan import Held, Hop, Objective, Plan, Stage, bounded
from neurojax.plan.problem import FIRST, LAST, Problem


class _Maker:
  """Builds the stages and hops of a problem's plans."""

  def __init__(self, problem: Problem):
    load, config = problem.load, problem.config
    self.problem = problem
    self.tokens = min(PREFILL, problem.context)
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
    """The hop from place to place, by number; None is the coordinator."""
    places, fleet = self.problem.places, self.problem.fleet
    ends = [None if number is None else places[number] for number in (a, b)]
    hosts = [fleet.coordinator if end is None else end.host.label for end in ends]
    link = fleet.link(hosts[0], hosts[1])
    step_bytes, prefill_bytes = self.step_bytes, self.prefill_bytes
    if a is None or b is None:
      # Token ids go in, and one sampled token of each sequence comes back.
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
      sequences=self.problem.load.sequences,
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


def assemble(
  problem: Problem,
  chains: list[list[tuple[int, int]]],
  *,
  objective: Objective,
  method: str,
  bound: float | None = None,
) -> Plan:
  """Build the plan of one or several pipelines.

  Args:
    chains: (place, number of layers) of the stages of each pipeline, in order.
    bound: Value that no plan can beat, in the unit of the objective. A plan within a billionth of it
      reaches it.
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


def assemble_ways(
  problem: Problem,
  held: Sequence[Held],
  ways: Mapping[tuple[int, int], float],
  *,
  method: str,
  bound: float | None = None,
) -> Plan:
  """Build a plan in which several places may hold the same layers, and each sequence takes one way through.

  Args:
    held: Places with the layers they hold.
    ways: Batches a second from one of `held` to another, by index. Places that are connected by them are
      one pipeline.
    bound: Throughput that no plan can beat.
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
  """Connected components of `number` nodes, each sorted, in the order of their first nodes."""
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
