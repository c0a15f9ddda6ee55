"""Finds the plan that is predicted to be fastest, or says how far from it the plan can be.

It needs the speeds of devices and links. `plan.proportional` places layers where only memory is known.
"""

import dataclasses
import heapq
import math
import time
from collections.abc import Mapping

import numpy as np

from neurojax.config import ModelConfig
from neurojax.count.serving import Load
from neurojax.plan.assemble import assemble
from neurojax.plan.baselines import BASELINES
from neurojax.plan.explain import explained
from neurojax.plan.fleet import Fleet
from neurojax.plan.plan import Objective, Plan, bounded
from neurojax.plan.problem import Problem, problem
from neurojax.plan.shortage import check, most_layers
from neurojax.plan.solve.chain import interval_bound_s, least, paced, pinned_out
from neurojax.plan.solve.replicas import replicated
from neurojax.plan.solve.uniform import Division

MANY_PLACES = 16
"""Fleets of more places are searched by quicker means."""


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
  in_flight: int | None = None,
  time_limit_s: float = 5.0,
) -> Plan:
  """Find the plan of least decode latency, or of most throughput (of equal ones that of least latency).

  A plan cuts the layers into contiguous stages, one on each place that it uses; places may come in any order.
  The plan is the best wherever hops between hosts are alike, and for few places or few kinds of place; else
  `Plan.gap` says how far from the best it can be.

  Args:
    load: What every stage has to hold.
    context: Positions in the caches at the decode step that is timed; the caches' capacity if absent.
    batch: Sequences that each step computes together.
    pins: Number of layers that hosts or single places have to hold, beside the pins of the fleet.
    replicas: 1 gives every layer one place. A larger number makes so many whole pipelines side by side, over
      hosts (or places of one host) that are shared out by speed. None, for throughput, lets several places
      hold the same layers, single stages or whole models, wherever that gives more.
    in_flight: Batches in flight in each pipeline, for throughput. With few of them stages are idle, and a
      shorter pipeline may give more. None: as many as help.
    time_limit_s: Seconds after which no further order of places is tried, once there is a plan.
  Raises: ValueError: nothing fits, or a pin cannot be kept: which limit, by how much, what would fit.
  """
  deadline_s = time.monotonic() + time_limit_s
  given = problem(
    config,
    fleet,
    load,
    context=context or load.capacity,
    batch=batch,
    pins=pins,
    in_flight=in_flight,
  )
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
  in_flight: int | None = None,
) -> dict[str, Plan | str]:
  """Simple placements of the same model, with times predicted alike and pins left aside.

  Returns: By name a plan, or the reason why the placement does not fit.
  """
  free = dataclasses.replace(
    fleet, hosts=tuple(dataclasses.replace(host, layers=None) for host in fleet.hosts)
  )
  given = problem(
    config, free, load, context=context or load.capacity, batch=batch, in_flight=in_flight
  )
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
  time_limit_s: float = 5.0,
) -> tuple[str, Plan]:
  """Plan for a fleet with another host: a copy of the fleet's best device, with the links of its model.

  Args:
    made: The plan without it. Batch, context, batches in flight and objective are taken from it.
    pins, replicas: As `made` was planned with.
  Returns: A description of what was added, and the plan.
  Raises: ValueError: there is no plan for the larger fleet.
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
      in_flight=made.in_flight,
      time_limit_s=time_limit_s,
    )
  except ValueError:
    # Places that are shared out again among several pipelines may not hold the model as often.
    if not made.is_replicated:
      raise
    plan = made
  if made.is_replicated:
    # The new host may also stay idle.
    plan = min(plan, made, key=lambda plan: plan.value())
  return f"{place.device.name or place.device.kind} like {place.label}", plan


def _single(given: Problem, objective: Objective, deadline_s: float) -> Plan:
  if objective == "latency":
    found = least(given, math.inf, deadline_s)
    if not found.chain:
      raise ValueError(pinned_out(given))
    bound = found.bound_s
  else:
    found, cycle_s = paced(given, deadline_s)
    bound = given.batch / cycle_s
  plan = assemble(given, [found.chain], objective=objective, method=found.method, bound=bound)
  return _or_simple(given, plan)


def _shared(given: Problem, deadline_s: float) -> Plan:
  """Place layers on as many places as give most throughput: the best of three ways to do so."""
  shared = replicated(given, deadline_s)
  plans = [shared.plan] if shared.plan else []
  many = len(given.places) > MANY_PLACES

  def alone() -> None:
    # Skipped where a single pipeline cannot be as fast.
    most = max((plan.throughput for plan in plans), default=0.0)
    if most <= _most_alone(given) * (1 + 1e-9):
      plans.append(_single(given, "throughput", deadline_s))

  if not (many and given.in_flight):
    alone()
  gap = min((bounded(plan, shared.bound).gap or 0.0 for plan in plans), default=math.inf)
  # Among many places, shared ranges come nearer to the bound in a tenth of the time.
  if gap > (0.03 if many else 0.0) and time.monotonic() < deadline_s:
    plans.append(_side_by_side(given, "throughput", None, deadline_s))
  if many and given.in_flight:
    # With few in flight, several whole pipelines give more than one long one.
    alone()
  return bounded(min(plans, key=lambda plan: plan.value()), shared.bound)


def _most_alone(given: Problem) -> float:
  """A bound on the tokens per second of a single pipeline."""
  layers_L = np.arange(1, given.num_layers + 1)
  rate = float((layers_L / given.step_PRL[:, :, 1:]).max())
  latency_s = given.num_layers / rate
  return given.batch / max(interval_bound_s(given), latency_s / (given.in_flight or math.inf))


def _or_simple(given: Problem, plan: Plan) -> Plan:
  """The plan, or a simple placement where that is better than what the search found."""
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


def _side_by_side(
  given: Problem, objective: Objective, replicas: int | None, deadline_s: float
) -> Plan:
  """Plan several whole pipelines over places that are shared out by speed.

  The bound is that every place is busy all the time.
  """
  layers_L = np.arange(1, given.num_layers + 1)
  rate_P = (layers_L / given.step_PRL[:, :, 1:]).max(axis=(1, 2))
  bound = given.batch * float(rate_P.sum()) / given.num_layers
  found: Plan | None = None
  numbers = [replicas] if replicas else _numbers(given)
  scored = []
  for number in numbers:
    deals = _dealt(given, rate_P, number)
    # A pin of a host cannot be kept if several pipelines each have a part of its places.
    torn = [
      given.places[places[0]].host.label
      for host, places in enumerate(given.hosts)
      if given.host_pin(host) and sum(not set(places).isdisjoint(deal) for deal in deals) > 1
    ]
    if torn:
      if replicas:
        raise ValueError(
          f"replicas = {number}: {', '.join(torn)} would be in several pipelines, and is pinned to a "
          f"number of layers: pin its single places, or ask for at most {len(given.hosts)} replicas"
        )
      continue
    parts = [given.restricted(deal) for deal in deals]
    if any(most_layers(part.step_PRL, np.inf) < given.num_layers for part in parts):
      if replicas:
        raise ValueError(
          f"replicas = {number}: each pipeline needs the whole model, and the places, shared out by "
          "speed, do not hold it so often: ask for fewer, or let the planner choose (auto)"
        )
      continue
    scored.append((sum(_most_alone(part) for part in parts), number, deals, parts))
  # A bound for each number of pipelines costs little to compute; only the best numbers are planned.
  tried = 1 if len(given.places) > MANY_PLACES else 3
  for _, number, deals, parts in sorted(scored, key=lambda one: (-one[0], one[1]))[:tried]:
    if found is not None and time.monotonic() > deadline_s:
      break
    chains = []
    solved: dict[bytes, Division] = {}
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
      raise ValueError(
        f"replicas = {replicas}: {replicas} pipelines do not fit beside the pins: ask for fewer, or unpin a host"
      )
    return _single(given, objective, deadline_s)
  return found


def _numbers(given: Problem) -> list[int]:
  """Numbers of pipelines to try: up to one for each host, then multiples of the hosts up to one for each place."""
  hosts, places = len(given.hosts), len(given.places)
  found = {n for n in range(1, hosts + 1) if n <= 8 or hosts % n == 0}
  found |= {2**k for k in range(hosts.bit_length()) if 2**k <= hosts}
  return sorted(found | set(range(hosts, places + 1, hosts)) | {places})


def _dealt(given: Problem, rate_P: np.ndarray, number: int) -> list[list[int]]:
  """Share out the places into `number` parts of about equal speed.

  Parts are whole hosts, or parts of one host where there are fewer hosts.
  """
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
  """Share out rates into parts: the fastest first, always to the part that is slowest so far."""
  parts: list[list[int]] = [[] for _ in range(number)]
  slowest = [(0.0, 0, part) for part in range(number)]
  for one in sorted(range(len(rates)), key=lambda k: (-rates[k], k)):
    rate, size, part = slowest[0]
    parts[part].append(one)
    heapq.heapreplace(slowest, (rate + rates[one], size + 1, part))
  return parts
