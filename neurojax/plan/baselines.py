"""Simple placements that plans are compared with."""

from collections import Counter
from collections.abc import Callable

from neurojax.plan import proportional as by_memory
from neurojax.plan.assemble import assemble
from neurojax.plan.plan import Objective, Plan
from neurojax.plan.problem import FIRST, LAST, MIDDLE, Problem


def proportional(problem: Problem, objective: Objective = "latency") -> Plan:
  """Give layers in proportion to free memory, in the fleet's order: what a pipeline without a plan does.

  This is the intent of the page that this project started from; its code gives every layer to the first node.
  Raises: ValueError: the fleet is too small.
  """
  hosts = [(place.label, place.free_bytes) for place in problem.places]
  kinds = [place.device.kind for place in problem.places]
  placed = by_memory.proportional(problem.config, hosts, problem.load, kinds)
  index = {place.label: number for number, place in enumerate(problem.places)}
  chain = [(index[p.host], len(p.span)) for p in placed]
  return assemble(problem, [chain], objective=objective, method="proportional to memory")


def equal(problem: Problem, objective: Objective = "latency") -> Plan:
  """Give every place the same number of layers, in the fleet's order; the first places get the remainder.

  Raises: ValueError: a place cannot hold its share, and by how much.
  """
  share, more = divmod(problem.num_layers, len(problem.places))
  chain = [(p, share + (p < more)) for p in range(len(problem.places)) if share + (p < more)]
  return _checked(problem, chain, objective, "equal split")


def fill(problem: Problem, objective: Objective = "latency") -> Plan:
  """Give each place, in the fleet's order, all layers that it can hold.

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
    f"fill in order leaves {left} of {problem.num_layers} layers over: another host with {left * layer:,} "
    "bytes, and those of the head, would do"
  )


def greedy(problem: Problem, objective: Objective = "latency") -> Plan:
  """Give every layer to the place with most memory left: the rule of NeuroGrid's scheduler.

  Layers are not contiguous: two like places take turns, and every change is a hop and a stage of its own. Only
  the rule is compared, with our count: true bytes (its own estimate is FP16 times 1.3), the head with the last
  layer (its coordinator keeps both ends), and a hop only where the place changes (its code makes a round trip
  for every remote layer). Each of these makes it look better than it was.

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
        f"greedy: layer {index} of {total} finds no place: it takes {need:,} bytes, and the most memory left, "
        f"on {problem.places[chosen].label}, is {left[chosen]:,}"
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
