"""Finds the best chain of places for a model: one stage after the other, each layer once.

`least` finds the chain of least latency, `paced` the one with the shortest cycle, which gives most throughput.
Both give a bound that no chain can beat.
"""

import dataclasses
import itertools
import math
import time

import numpy as np

from neurojax.plan.problem import FIRST, MIDDLE, Problem
from neurojax.plan.shortage import most_layers
from neurojax.plan.solve import exact, search, uniform
from neurojax.plan.solve.uniform import Division

ORDERLESS = "dynamic programming over layers, hops between hosts being alike"
ORDERED = "dynamic programming over layers and sets of places"
SEARCHED = "search over orders, with a bound"
NEAR = 1e-3
"""Distance from the bound at which a search over orders stops. Exact methods go on to the end."""


@dataclasses.dataclass(frozen=True)
class Found:
  """A chain of places.

  Attributes:
    latency_s: Seconds of one decoded token.
    chain: (place, number of layers) of each stage; empty if there is no chain.
    bound_s: A latency that no chain within the same limits can beat.
    method: Name of the method that found it.
  """

  latency_s: float
  chain: Division
  bound_s: float
  method: str


def least(
  given: Problem, interval_s: float, deadline_s: float, *, runs: int | None = None
) -> Found:
  """The chain of least latency in which no stage and no link is busy for longer than `interval_s`."""
  within = interval_s * (1 + 1e-12)
  step_PRL = np.where(given.step_PRL <= within, given.step_PRL, np.inf)
  step_PRL[given.end_transfer_P > within, FIRST:] = np.inf
  hop_PP = np.where(given.transfer_PP <= within, given.hop_PP, np.inf)
  if uniform.uniform_hop_s(given, hop_PP) is not None:
    return _proven(uniform.solve_uniform(given, step_PRL, hop_PP), ORDERLESS)
  loose_PRL, together = step_PRL, False
  if any(given.host_pin(number) for number in range(len(given.hosts))):
    together = True
    divided = _divided(given, step_PRL, hop_PP)
    if divided is None:
      return _proven(None, SEARCHED)
    step_PRL = divided
  groups = exact.kinds(given, step_PRL, hop_PP)
  small = exact.is_small([len(group) for group in groups], given.num_layers)
  if small and not together:
    return _proven(exact.solve_exact(given, step_PRL, hop_PP, groups), ORDERED)
  bound_s, starts = search.bound_s(given, loose_PRL, hop_PP)
  if not math.isfinite(bound_s):
    return _proven(None, SEARCHED)
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
  if solved is None:
    # A search that finds nothing does not prove that there is nothing.
    return Found(math.inf, [], bound_s, SEARCHED)
  return Found(solved[0], solved[1], min(bound_s, solved[0]), SEARCHED)


def paced(given: Problem, deadline_s: float) -> tuple[Found, float]:
  """The chain with the shortest cycle, of equal ones that of least latency, and a bound on all cycles.

  A cycle is the time that the busiest stage or link takes for a batch, or, where that is longer, the latency
  divided by the batches in flight. The least latency under a limit on stages falls as the limit rises: the
  shortest cycle is where the two meet. It is found by bisection over all limits that occur.

  Raises: ValueError: there is no chain at all.
  """
  low_s = interval_bound_s(given)
  quickest = least(given, low_s, deadline_s)
  if quickest.chain and cycle_s(given, quickest) <= low_s * (1 + 1e-12):
    return quickest, low_s
  every = least(given, math.inf, deadline_s)
  if not every.chain:
    raise ValueError(pinned_out(given))
  best = min(every, quickest, key=lambda found: cycle_s(given, found))
  times = (given.step_PRL.ravel(), given.transfer_PP.ravel(), given.end_transfer_P)
  times = np.unique(np.concatenate(times))
  times = times[(times > low_s * (1 + 1e-12)) & (times < cycle_s(given, best) * (1 - 1e-12))]
  proven = max(low_s, _shared(every.bound_s, given.in_flight))

  def prove(index: int, found: Found) -> None:
    """Raise the bound: a chain within this limit has at least this latency, and any other chain has a stage
    that takes at least the next larger time."""
    nonlocal proven
    beyond = times[index + 1] if index + 1 < len(times) else cycle_s(given, best)
    proven = max(proven, min(float(beyond), _shared(found.bound_s, given.in_flight)))

  prove(-1, quickest)
  # No limit below the bound can be met; the best chain may lie at the last of them.
  low = max(-1, int(np.searchsorted(times, proven, side="right")) - 2)
  high, stride = len(times), NEAR
  while high - low > 1:
    if best.method == SEARCHED and (
      cycle_s(given, best) <= proven * (1 + NEAR) or time.monotonic() > deadline_s
    ):
      break
    middle = (low + high) // 2
    if best.method == SEARCHED and high == len(times):
      # A chain is often close above the bound, and most times lie far above it: upwards in strides.
      middle = min(middle, max(low + 1, int(np.searchsorted(times, low_s * (1 + stride)))))
      stride *= 4
    found = least(given, float(times[middle]), deadline_s, runs=6)
    prove(middle, found)
    if cycle_s(given, found) < cycle_s(given, best):
      best = found
    if _shared(found.latency_s, given.in_flight) > times[middle] * (1 + 1e-12) or not found.chain:
      low = middle
    high = min(high, int(np.searchsorted(times, cycle_s(given, best) * (1 - 1e-12))))
  if best.method != SEARCHED:
    again = least(given, cycle_s(given, best), deadline_s)
    if again.chain and cycle_s(given, again) <= cycle_s(given, best) * (1 + 1e-12):
      best = min(best, again, key=lambda found: found.latency_s)
  return best, min(proven, cycle_s(given, best))


def cycle_s(given: Problem, found: Found) -> float:
  """Seconds from one batch to the next in a stream of batches; infinite without a chain."""
  if not found.chain:
    return math.inf
  return max(_busiest_s(given, found.chain), _shared(found.latency_s, given.in_flight))


def interval_bound_s(given: Problem) -> float:
  """The shortest step time within which the places hold all layers, with links and pins of hosts left aside."""
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


def _shared(latency_s: float, in_flight: int | None) -> float:
  if in_flight is not None:
    return latency_s / in_flight
  return latency_s if math.isinf(latency_s) else 0.0


def _proven(solved: tuple[float, Division] | None, method: str) -> Found:
  if solved is None:
    return Found(math.inf, [], math.inf, method)
  return Found(solved[0], solved[1], solved[0], method)


def _divided(given: Problem, step_PRL: np.ndarray, hop_PP: np.ndarray) -> np.ndarray | None:
  """The step table with pins of hosts shared out among their places, as if all hops were alike; None if that
  is impossible."""
  between_PP = given.host_P[:, None] != given.host_P
  local_s = uniform.local_hop_s(given, hop_PP)
  usual_s = max(
    local_s, float(np.median(given.hop_PP[between_PP])) if between_PP.any() else local_s
  )
  solved = uniform.solve_uniform(given, step_PRL, np.where(between_PP, usual_s, local_s))
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


def _busiest_s(given: Problem, chain: Division) -> float:
  last = len(chain) - 1
  steps = [given.step_PRL[p, (k == 0) | ((k == last) << 1), n] for k, (p, n) in enumerate(chain)]
  hops = [given.transfer_PP[a[0], b[0]] for a, b in itertools.pairwise(chain)]
  ends = [given.end_transfer_P[place] for place in (chain[0][0], chain[-1][0])]
  return float(max(steps + hops + ends))


def pinned_out(given: Problem) -> str:
  """The error text where no chain keeps all pins."""
  pins = ", ".join(f"{label} = {layers}" for label, layers in given.pins.items())
  if not pins:
    return "no chain of places holds the layers: the ends do not fit beside each other"
  free = [place for p, place in enumerate(given.places) if given.step_PRL[p, MIDDLE, 0] == 0]
  return (
    f"the pins ({pins}) cannot be kept together: {given.num_layers} layers, with the embedding on the "
    f"first host and the head on the last, do not fit around them into the {len(free)} places that are "
    "free to choose: unpin one of them"
  )
