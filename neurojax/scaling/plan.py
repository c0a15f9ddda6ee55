"""Which host holds which layers. Imports no JAX.

`proportional` is what a pipeline does of which only memory is known. `best` needs speeds and links, and
finds the plan that is predicted to be fastest, or says how far from it the plan can be.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Mapping

import numpy as np

from neurojax.config import ModelConfig
from neurojax.scaling import exact, knapsack, search
from neurojax.scaling.capacity import check, most_layers
from neurojax.scaling.explain import explained
from neurojax.scaling.fleet import Fleet
from neurojax.scaling.knapsack import Sequence
from neurojax.scaling.load import Load, layer_bytes, stage_bytes
from neurojax.scaling.placements import (
  BASELINES,
  Hop,
  Objective,
  Plan,
  Reason,
  Stage,
  assemble,
  bounded,
)
from neurojax.scaling.problem import MIDDLE, Problem, problem
from neurojax.scaling.proportional import Placement, as_planned, proportional
from neurojax.scaling.replicas import replicated

__all__ = [
  "BASELINES",
  "Hop",
  "Load",
  "Objective",
  "Placement",
  "Plan",
  "Reason",
  "Stage",
  "as_planned",
  "best",
  "compared",
  "layer_bytes",
  "problem",
  "proportional",
  "stage_bytes",
]

ORDERLESS = "dynamic programming over layers, hops between hosts being alike"
ORDERED = "dynamic programming over layers and sets of places"
SEARCHED = "search over orders, with a bound"
MANY_PLACES = 16
NEAR = 1e-3
"""As near to a bound as a search over orders has to come; what is exact goes on to the end."""


@dataclasses.dataclass(frozen=True)
class _Found:
  """bound_s: What no chain within the same limits can be faster than."""

  latency_s: float
  chain: Sequence
  bound_s: float
  method: str


def best(
  config: ModelConfig,
  fleet: Fleet,
  load: Load,
  *,
  objective: Objective = "latency",
  context: int | None = None,
  batch: int = 1,
  pins: Mapping[str, int] | None = None,
  replicas: int | None = 1,
  time_limit_s: float = 5.0,
) -> Plan:
  """The plan of least decode latency, or of greatest throughput and of these the one of least latency.

  Searched are contiguous covers of the layers by one stage on each place, in any order, places left out
  at will. Exact wherever hops between hosts are alike, and for few places or few kinds of place; else
  `Plan.gap` says how far from the best it can be.

  Args:
    context: Positions in the caches of the decode step that is timed; the caches' capacity if absent.
    batch: Sequences that go through together.
    pins: Layers that hosts, or single places, are to hold, beside those that the fleet says.
    replicas: 1 has every layer lie once. More are so many whole pipelines side by side, over hosts, or
      places of one, dealt out by speed. None, for throughput, lets several places hold the same layers,
      single stages or whole models, wherever that gives more.
    time_limit_s: After it no further order is tried, once there is a plan.
  Raises: ValueError: nothing fits, or a pin cannot be kept: which limit, by how much, what would fit.
  """
  deadline_s = time.monotonic() + time_limit_s
  given = problem(config, fleet, load, context=context or load.capacity, batch=batch, pins=pins)
  if replicas is not None and not 1 <= replicas <= len(given.places):
    raise ValueError(
      f"replicas = {replicas}: between 1 and the number of places, {len(given.places)}"
    )
  check(given)
  if replicas == 1 or (replicas is None and objective == "latency"):
    plan = _single(given, objective, deadline_s)
  elif replicas is None:
    plan = _shared(given, deadline_s)
  else:
    plan = _side_by_side(given, objective, replicas, deadline_s)
  return explained(given, plan)


def compared(
  config: ModelConfig,
  fleet: Fleet,
  load: Load,
  *,
  objective: Objective = "latency",
  context: int | None = None,
  batch: int = 1,
) -> dict[str, Plan | str]:
  """The simple placements under the same predictor, pins left aside; why not, where one does not fit."""
  free = dataclasses.replace(
    fleet, hosts=tuple(dataclasses.replace(host, layers=None) for host in fleet.hosts)
  )
  given = problem(config, free, load, context=context or load.capacity, batch=batch)
  found: dict[str, Plan | str] = {}
  for name, baseline in BASELINES.items():
    try:
      found[name] = baseline(given, objective)
    except ValueError as error:
      found[name] = str(error)
  return found


def one_more(
  config: ModelConfig,
  fleet: Fleet,
  load: Load,
  made: Plan,
  *,
  pins: Mapping[str, int] | None = None,
  replicas: int | None = 1,
) -> tuple[str, Plan]:
  """The plan with one more host that has the best device of the fleet alone, linked as its like is.

  Args:
    made: What is planned without it; batch, context and objective are taken from there.
    replicas: What it was planned with.
  Returns: What was added, and the plan.
  """
  given = problem(config, fleet, load, context=made.context, batch=made.batch)
  layer_P = (given.step_PRL[:, :, 1:] / np.arange(1, given.num_layers + 1)).min(axis=(1, 2))
  chosen = min(range(len(layer_P)), key=lambda p: (layer_P[p], -given.places[p].free_bytes, p))
  place = given.places[chosen]
  name = f"another {place.label}"
  while any(host.label == name for host in fleet.hosts):
    name += "+"
  host = dataclasses.replace(
    place.host, name=name, address=None, devices=(place.device,), layers=None
  )
  links = [
    dataclasses.replace(
      link, hosts=tuple(name if end == place.host.label else end for end in link.hosts)
    )
    for link in fleet.links
    if place.host.label in link.hosts
  ]
  larger = dataclasses.replace(fleet, hosts=(*fleet.hosts, host), links=(*fleet.links, *links))
  try:
    plan = best(
      config,
      larger,
      load,
      objective=made.objective,
      context=made.context,
      batch=made.batch,
      pins=pins,
      replicas=replicas,
    )
  except ValueError:
    # Places dealt out anew among several pipelines may not hold the model as often.
    if not made.is_replicated:
      raise
    plan = made
  if made.is_replicated:
    # The new host may as well stay idle.
    plan = min(plan, made, key=lambda plan: plan.value())
  return f"{place.device.name or place.device.kind} like {place.label}", plan


def _single(given: Problem, objective: Objective, deadline_s: float) -> Plan:
  if objective == "latency":
    found = _least(given, math.inf, deadline_s)
    if found is None:
      raise ValueError(_pinned_out(given))
    plan = assemble(
      given, [found.chain], objective=objective, method=found.method, bound=found.bound_s
    )
    return _or_simple(given, plan)
  interval_s = _interval_bound_s(given)
  found = _least(given, interval_s, deadline_s)
  bound_s = interval_s
  if found is None:
    found, bound_s = _narrowed(given, interval_s, deadline_s)
  bound = given.batch / bound_s
  plan = assemble(given, [found.chain], objective=objective, method=found.method, bound=bound)
  return _or_simple(given, plan)


def _shared(given: Problem, deadline_s: float) -> Plan:
  """Layers on as many places as give most throughput: the best of three ways to share them out."""
  shared = replicated(given, deadline_s)
  plans = [shared.plan] if shared.plan else []
  # Where layers that lie once are bound to be slower, nobody need look for them.
  if not plans or plans[0].throughput <= given.batch / _interval_bound_s(given) * (1 + 1e-9):
    plans.append(_single(given, "throughput", deadline_s))
  gap = min(bounded(plan, shared.bound).gap or 0.0 for plan in plans)
  # Among many places, shared ranges come nearer to the bound in a tenth of the time.
  if gap > (0.03 if len(given.places) > MANY_PLACES else 0.0):
    plans.append(_side_by_side(given, "throughput", None, deadline_s))
  return bounded(min(plans, key=lambda plan: plan.value()), shared.bound)


def _or_simple(given: Problem, plan: Plan) -> Plan:
  """The plan, or a simple one where the search found none as good."""
  if not plan.gap or given.pins:
    return plan
  for name in ("proportional", "equal", "fill"):
    try:
      other = BASELINES[name](given, plan.objective)
    except ValueError:
      continue
    if other.value() < plan.value():
      index = {place.label: number for number, place in enumerate(given.places)}
      chain = [(index[stage.label], stage.layers) for stage in other.stages]
      plan = assemble(
        given, [chain], objective=plan.objective, method=plan.method, bound=plan.bound
      )
  return plan


def _least(
  given: Problem, interval_s: float, deadline_s: float, *, runs: int | None = None
) -> _Found | None:
  """The chain of least latency of which no stage and no link is busy for longer than `interval_s`."""
  within = interval_s * (1 + 1e-12)
  step_PRL = np.where(given.step_PRL <= within, given.step_PRL, np.inf)
  hop_PP = np.where(given.transfer_PP <= within, given.hop_PP, np.inf)
  if knapsack.uniform_hop_s(given, hop_PP) is not None:
    solved = knapsack.solve_uniform(given, step_PRL, hop_PP)
    return _Found(solved[0], solved[1], solved[0], ORDERLESS) if solved else None
  loose_PRL, together = step_PRL, False
  if any(given.host_pin(number) for number in range(len(given.hosts))):
    together = True
    step_PRL = _divided(given, step_PRL, hop_PP)
    if step_PRL is None:
      return None
  groups = exact.kinds(given, step_PRL, hop_PP)
  small = exact.is_small([len(group) for group in groups], given.num_layers)
  if small and not together:
    solved = exact.solve_exact(given, step_PRL, hop_PP, groups)
    return _Found(solved[0], solved[1], solved[0], ORDERED) if solved else None
  bound_s, starts = search.bound_s(given, loose_PRL, hop_PP)
  if not math.isfinite(bound_s):
    return None
  if small:
    solved = exact.solve_exact(given, step_PRL, hop_PP, groups)
  else:
    number, width = len(given.places), given.num_layers + 1
    effort = number * width * (number + width)
    solved = search.search(
      given,
      step_PRL,
      hop_PP,
      starts=starts,
      deadline_s=deadline_s,
      runs=runs or int(np.clip(4e8 / effort, 6, 60)),
    )
  return _Found(solved[0], solved[1], min(bound_s, solved[0]), SEARCHED) if solved else None


def _divided(given: Problem, step_PRL: np.ndarray, hop_PP: np.ndarray) -> np.ndarray | None:
  """Pins of hosts with several places, divided among these as if all hops were alike."""
  between_PP = given.host_P[:, None] != given.host_P
  local_s = knapsack.local_hop_s(given, hop_PP)
  usual_s = max(
    local_s, float(np.median(given.hop_PP[between_PP])) if between_PP.any() else local_s
  )
  solved = knapsack.solve_uniform(given, step_PRL, np.where(between_PP, usual_s, local_s))
  if solved is None:
    return None
  layers = dict(solved[1])
  step_PRL = step_PRL.copy()
  for number, places in enumerate(given.hosts):
    if given.host_pin(number):
      for place in places:
        n = layers.get(place, 0)
        kept_R = step_PRL[place, :, n].copy()
        step_PRL[place] = np.inf
        step_PRL[place, :, n] = kept_R
  return step_PRL


def _interval_bound_s(given: Problem) -> float:
  """The shortest interval in which the places could do all layers, whatever links and pins say."""
  step_PRL = given.step_PRL
  values = np.unique(step_PRL[np.isfinite(step_PRL)])
  values = values[values > 0]
  low, high = -1, len(values) - 1
  while high - low > 1:
    middle = (low + high) // 2
    if most_layers(step_PRL, values[middle]) >= given.num_layers:
      high = middle
    else:
      low = middle
  return float(values[high])


def _narrowed(given: Problem, low_s: float, deadline_s: float) -> tuple[_Found, float]:
  """By bisection over the times that stages and links can be busy: the shortest for which there is a
  chain, and the bound."""
  found = _least(given, math.inf, deadline_s)
  if found is None:
    raise ValueError(_pinned_out(given))
  times = np.unique(np.concatenate([given.step_PRL.ravel(), given.transfer_PP.ravel()]))
  times = times[(times > low_s * (1 + 1e-12)) & (times <= _busiest_s(given, found.chain))]
  low, high, proven = -1, len(times) - 1, low_s
  sure, stride = True, NEAR
  while high - low > 1:
    if found.method == SEARCHED and _busiest_s(given, found.chain) <= low_s * (1 + NEAR):
      break
    middle = (low + high) // 2
    if found.method == SEARCHED and high == len(times) - 1:
      # Something lies close above what is proven, and most times lie far above it: upwards in strides.
      middle = min(middle, max(low + 1, int(np.searchsorted(times, low_s * (1 + stride)))))
      stride *= 4
    better = _least(given, float(times[middle]), deadline_s, runs=6)
    if better is not None:
      found = better
      high = int(np.searchsorted(times, _busiest_s(given, better.chain) * (1 - 1e-12)))
    else:
      low = middle
      # That a search finds nothing proves nothing.
      sure = sure and found.method != SEARCHED
      if sure:
        proven = float(times[middle + 1])
  if len(times) and sure and found.method != SEARCHED:
    proven = float(times[max(high, 0)])
    found = _least(given, proven, deadline_s) or found
  return found, min(proven, _busiest_s(given, found.chain))


def _busiest_s(given: Problem, chain: Sequence) -> float:
  last = len(chain) - 1
  steps = [given.step_PRL[p, (k == 0) | ((k == last) << 1), n] for k, (p, n) in enumerate(chain)]
  hops = [given.transfer_PP[a[0], b[0]] for a, b in itertools.pairwise(chain)]
  return float(max(steps + hops))


def _side_by_side(
  given: Problem, objective: Objective, replicas: int | None, deadline_s: float
) -> Plan:
  """Several whole pipelines over places dealt out by speed. The bound: every place busy all the time."""
  layers_L = np.arange(1, given.num_layers + 1)
  rate_P = (layers_L / given.step_PRL[:, :, 1:]).max(axis=(1, 2))
  bound = given.batch * float(rate_P.sum()) / given.num_layers
  found: Plan | None = None
  numbers = [replicas] if replicas else _numbers(given)
  scored = []
  for number in numbers:
    deals = _dealt(given, rate_P, number)
    parts = [given.restricted(deal) for deal in deals]
    if any(most_layers(part.step_PRL, np.inf) < given.num_layers for part in parts):
      if replicas:
        raise ValueError(
          f"replicas = {number}: each pipeline needs the whole model, and the places, dealt out by "
          "speed, do not hold it so often: ask for fewer, or let the planner choose"
        )
      continue
    scored.append((sum(1 / _interval_bound_s(part) for part in parts), number, deals, parts))
  # The promise of a deal costs little to compute; the plans of the best ones are made.
  for _, number, deals, parts in sorted(scored, key=lambda one: (-one[0], one[1]))[:3]:
    chains = []
    solved: dict[bytes, Sequence] = {}
    try:
      for deal, part in zip(deals, parts, strict=True):
        key = part.step_PRL.tobytes() + part.hop_PP.tobytes() + part.enter_P.tobytes()
        if key not in solved:
          plan = _single(part, objective, deadline_s)
          index = {place.label: number for number, place in enumerate(part.places)}
          solved[key] = [(index[stage.label], stage.layers) for stage in plan.stages]
        chains.append([(deal[place], layers) for place, layers in solved[key]])
    except ValueError:
      continue
    method = f"{number} pipelines over places dealt out by speed"
    plan = assemble(
      given,
      chains,
      objective=objective,
      method=method,
      bound=bound if objective == "throughput" else None,
    )
    if found is None or plan.value() < found.value():
      found = plan
  if found is None:
    if replicas:
      raise ValueError(f"replicas = {replicas}: no {replicas} pipelines fit beside the pins")
    return _single(given, objective, deadline_s)
  return found


def _numbers(given: Problem) -> list[int]:
  """How many pipelines are tried: up to one for each host, and so many for each where it has devices."""
  hosts, places = len(given.hosts), len(given.places)
  found = {n for n in range(1, hosts + 1) if n <= 8 or hosts % n == 0}
  found |= {2**k for k in range(hosts.bit_length()) if 2**k <= hosts}
  return sorted(found | set(range(hosts, places + 1, hosts)) | {places})


def _dealt(given: Problem, rate_P: np.ndarray, number: int) -> list[list[int]]:
  """Places in so many parts of about equal speed: whole hosts, or parts of one where hosts are fewer."""
  if number == 1:
    return [list(range(len(given.places)))]
  rate_H = [float(rate_P[places].sum()) for places in given.hosts]
  if number <= len(rate_H):
    parts = _balanced(rate_H, number)
    return [sorted(p for host in part for p in given.hosts[host]) for part in parts]
  shares = [1] * len(rate_H)
  for _ in range(number - len(rate_H)):
    able = [h for h in range(len(rate_H)) if shares[h] < len(given.hosts[h])]
    shares[max(able, key=lambda h: (rate_H[h] / (shares[h] + 1), -h))] += 1
  deals = []
  for places, share in zip(given.hosts, shares, strict=True):
    parts = _balanced([float(rate_P[place]) for place in places], share)
    deals += [sorted(places[k] for k in part) for part in parts]
  return deals


def _balanced(rates: list[float], number: int) -> list[list[int]]:
  """The fastest first, always to the slowest part."""
  sums = [0.0] * number
  parts: list[list[int]] = [[] for _ in range(number)]
  for one in sorted(range(len(rates)), key=lambda k: (-rates[k], k)):
    chosen = min(range(number), key=lambda i: (sums[i], len(parts[i]), i))
    sums[chosen] += rates[one]
    parts[chosen].append(one)
  return parts


def _pinned_out(given: Problem) -> str:
  pins = ", ".join(f"{label} = {layers}" for label, layers in given.pins.items())
  if not pins:
    return "no chain of places holds the layers: the ends do not fit beside each other"
  free = [place for p, place in enumerate(given.places) if given.step_PRL[p, MIDDLE, 0] == 0]
  return (
    f"the pins ({pins}) cannot be kept together: {given.num_layers} layers, with the embedding on the "
    f"first host and the head on the last, do not fit around them into the {len(free)} places that are "
    "free to choose: unpin one of them"
  )
