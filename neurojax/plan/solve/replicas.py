"""Lets several places hold the same layers, for the most tokens per second.

A place holds one range of layers. A sequence goes through places whose ranges join, and its caches lie there.
Sequences are a flow through a network, in which a place takes one batch at a time. There are three parts:
a bound (each place does what it is best at), a mixed integer program where that is
small, and else consecutive places of an order for consecutive ranges.
"""

import dataclasses
import time
from collections import Counter

import numpy as np

from neurojax.plan.assemble import assemble_ways
from neurojax.plan.plan import Held, Plan, bounded
from neurojax.plan.problem import FIRST, LAST, MIDDLE, Problem
from neurojax.plan.solve.routes import routed

PROGRAM = "mixed integer program over places and ranges of layers"
ALONG = "dynamic programming along orders of places, ranges shared"

MAX_VARIABLES, PROGRAM_S = 400, 1.0
"""Kinds of place times ranges up to which the program is tried, and its time limit in seconds."""


@dataclasses.dataclass(frozen=True)
class Replicated:
  """A plan, None if none was found, and a bound on the tokens per second of every placement of ranges."""

  plan: Plan | None
  bound: float


def replicated(given: Problem, deadline_s: float) -> Replicated:
  """The placement of ranges with most throughput that is found before `deadline_s` (of time.monotonic()).

  Its bound leaves links aside.
  """
  most = rate_bound(given)
  forced = set(np.flatnonzero(~np.isfinite(given.step_PRL[:, MIDDLE, 0])))
  together = any(given.host_pin(number) is not None for number in range(len(given.hosts)))
  ways: list[tuple[str, list[Held]]] = []
  proven = False
  groups = _kinds(given)
  if len(groups) * given.num_layers * (given.num_layers + 1) // 2 <= MAX_VARIABLES:
    solved = _program(given, groups, most, min(deadline_s, time.monotonic() + PROGRAM_S))
    if solved is not None:
      held, most, proven = solved
      ways.append((PROGRAM, held))
  if not (proven or forced or together) and (along := _along_orders(given, most, deadline_s)):
    ways.append((ALONG, along))
  plans = []
  for method, held in ways:
    flow = routed(given, held)
    if flow and _keeps_pins(given, flow[0]):
      plans.append(assemble_ways(given, *flow, method=method))
  found = min(plans, key=lambda plan: plan.value(), default=None)
  if found is not None and proven and found.throughput >= given.batch * most * (1 - 1e-6):
    # What the solver proves, it proves to its own tolerance.
    most = found.throughput / given.batch
  bound = given.batch * most
  return Replicated(found and bounded(found, bound), bound)


def _keeps_pins(given: Problem, held: list[Held]) -> bool:
  """True if all pins are kept. Where nothing flows through a pinned host, other methods have to be used."""
  layers: Counter[str] = Counter()
  for one in held:
    place = given.places[one.place]
    for label in {place.label, place.host.label}:
      layers[label] += one.layers
  return all(layers[label] == pinned for label, pinned in given.pins.items())


def rate_bound(given: Problem) -> float:
  """A bound on the batches per second of every placement, links left aside.

  Embedding, head and all layers are computed at this rate at least. With weights for them that add up to 1
  (`first`, `last`, the rest for the layers), no place gives more than with its best range.
  """
  step_KRL, size_K = _tables(given)
  layers_L = np.arange(given.num_layers + 1)
  with np.errstate(divide="ignore"):
    rate_KRL = np.where(np.isfinite(step_KRL) & (step_KRL > 0), 1 / step_KRL, 0.0)
  rate_KRL[:, :, 0] = 0.0
  is_first = np.array([bool(role & FIRST) for role in range(4)])[:, None]
  is_last = np.array([bool(role & LAST) for role in range(4)])[:, None]

  def value(first: float, last: float) -> float:
    gain_RL = (1 - first - last) * layers_L / given.num_layers + first * is_first + last * is_last
    return float(((rate_KRL * gain_RL).max(axis=(1, 2)) * size_K).sum())

  best, first, last = value(0, 0), 0.0, 0.0
  # The value is convex in both: each in turn by thirds.
  for _ in range(2):
    for at_last in (True, False):
      low, high = 0.0, 1 - (first if at_last else last)
      for _ in range(10):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        of_a = value(first, a) if at_last else value(a, last)
        of_b = value(first, b) if at_last else value(b, last)
        best = min(best, of_a, of_b)
        low, high = (low, b) if of_a <= of_b else (a, high)
      first, last = (first, low) if at_last else (low, last)
  return best


def _tables(given: Problem) -> tuple[np.ndarray, np.ndarray]:
  """The different step tables, and the number of places with each."""
  groups = _kinds(given)
  return given.step_PRL[[group[0] for group in groups]], np.array([len(g) for g in groups])


def _kinds(given: Problem) -> list[list[int]]:
  """Places with the same steps; hosts whose places are pinned together stay apart."""
  found: dict[tuple[bytes, int], list[int]] = {}
  for place in range(len(given.places)):
    host = int(given.host_P[place])
    apart = host if given.host_pin(host) is not None else -1
    found.setdefault((given.step_PRL[place].tobytes(), apart), []).append(place)
  return list(found.values())


def _role(first: int, end: int, total: int) -> int:
  return (first == 0) * FIRST + (end == total) * LAST


def _program(
  given: Problem, groups: list[list[int]], most: float, deadline_s: float
) -> tuple[list[Held], float, bool] | None:
  """The ranges held, a bound, and True if the program was solved; None if it has no solution."""
  from scipy.optimize import Bounds, LinearConstraint, milp
  from scipy.sparse import coo_array

  total = given.num_layers
  columns = []
  for kind, group in enumerate(groups):
    for first in range(total):
      for end in range(first + 1, total + 1):
        step_s = given.step_s(group[0], first, end)
        if np.isfinite(step_s) and step_s > 0:
          columns.append((kind, first, end, 1 / (step_s * most)))
  if not columns:
    return None
  # Variables: how many of a kind hold a range, then what flows through them, in parts of `most`.
  number = len(columns)
  entries: list[tuple[int, int, float]] = []
  low: list[float] = []
  high: list[float] = []

  def row(parts: list[tuple[int, float]], least: float, greatest: float) -> None:
    entries.extend((len(low), column, factor) for column, factor in parts)
    low.append(least)
    high.append(greatest)

  for index, (_, _, _, rate) in enumerate(columns):
    row([(number + index, 1.0), (index, -rate)], -np.inf, 0.0)
  for boundary in range(1, total):
    into = [(number + i, 1.0) for i, c in enumerate(columns) if c[2] == boundary]
    row(into + [(number + i, -1.0) for i, c in enumerate(columns) if c[1] == boundary], 0.0, 0.0)
  for kind, group in enumerate(groups):
    forced = not np.isfinite(given.step_PRL[group[0], MIDDLE, 0])
    held = [(i, 1.0) for i, c in enumerate(columns) if c[0] == kind]
    row(held, len(group) if forced else 0.0, len(group))
  for host, places in enumerate(given.hosts):
    pin = given.host_pin(host)
    if pin is not None:
      inside = {kind for kind, group in enumerate(groups) if group[0] in places}
      row([(i, float(c[2] - c[1])) for i, c in enumerate(columns) if c[0] in inside], pin, pin)
  rows, cols, values = zip(*entries, strict=True)
  matrix = coo_array((values, (rows, cols)), shape=(len(low), 2 * number)).tocsr()
  gain = np.zeros(2 * number)
  gain[[number + i for i, c in enumerate(columns) if c[1] == 0]] = -1.0
  result = milp(
    gain,
    constraints=LinearConstraint(matrix, low, high),
    integrality=np.concatenate([np.ones(number), np.zeros(number)]),
    bounds=Bounds(0, np.concatenate([[len(groups[c[0]]) for c in columns], np.full(number, 2.0)])),
    options={"time_limit": max(0.1, deadline_s - time.monotonic()), "mip_rel_gap": 1e-9},
  )
  if result.x is None:
    return None
  bound = most if result.mip_dual_bound is None else min(most, -result.mip_dual_bound * most)
  free = [list(group) for group in groups]
  found = []
  for index, (kind, first, end, _) in enumerate(columns):
    holding = round(result.x[index])
    if result.x[number + index] < 1e-7:
      continue
    for _ in range(holding):
      rate = float(result.x[number + index]) / holding * most
      found.append(Held(free[kind].pop(0), first, end - first, rate))
  return found, bound, result.status == 0


def _along_orders(given: Problem, most: float, deadline_s: float) -> list[Held] | None:
  """The best of several orders of the places."""
  best: tuple[float, list[Held]] | None = None
  for number, order in enumerate(_orders(given)):
    if number and time.monotonic() > deadline_s:
      break
    table = _Order(given, order)
    low = best[0] * (1 + 1e-4) if best else 0.0
    found = table.cut(low) if best else None
    if best and found is None:
      continue
    high = most
    for _ in range(24):
      if high - low <= 1e-5 * high:
        break
      # What is found is mostly better than what was asked for.
      middle = (low + high) / 2
      better = table.cut(middle)
      if better is None:
        high = middle
      else:
        found, low = better, better[0]
    if found is not None and (best is None or found[0] > best[0]):
      best = found
  return best[1] if best else None


def _orders(given: Problem) -> list[np.ndarray]:
  usable_P = np.isfinite(given.step_PRL[:, :, 1:]).any(axis=(1, 2))
  layers_L = np.arange(1, given.num_layers + 1)
  with np.errstate(divide="ignore"):
    speed_P = (layers_L / given.step_PRL[:, :, 1:]).max(axis=(1, 2))
  finite_PL = np.isfinite(given.step_PRL[:, MIDDLE, :])
  room_P = finite_PL.shape[1] - 1 - finite_PL[:, ::-1].argmax(axis=1)
  # Places of one host next to each other, and hosts by the first of theirs.
  keys = [(-room_P, -speed_P), (-speed_P, -room_P), (given.host_P, -speed_P)]
  orders = []
  for first, second in keys:
    order = np.lexsort((np.arange(len(usable_P)), second, first))
    order = order[usable_P[order]]
    # From the middle out: ends with a large embedding or head want the large ones, or the small.
    orders += [order, order[::-1], np.concatenate([order[::2], order[1::2][::-1]])]
  return orders


class _Order:
  """An order of the places, with the batches per second that its first places give together, by role and
  range."""

  def __init__(self, given: Problem, order: np.ndarray):
    self.given, self.order = given, order
    total, number = given.num_layers, len(order)
    step_PRL = given.step_PRL[order]
    with np.errstate(divide="ignore"):
      rate_PRL = np.where(np.isfinite(step_PRL) & (step_PRL > 0), 1 / step_PRL, 0.0)
    rate_PRL[:, :, 0] = 0.0
    self.rate_PRL = rate_PRL
    sum_RLI = np.zeros((4, total + 1, number + 1))
    sum_RLI[:, :, 1:] = rate_PRL.transpose(1, 2, 0).cumsum(axis=2)
    self.sum_RLI = sum_RLI
    # One ascending list of all rows of a role, each beyond the one before it.
    self.apart = 2 * float(sum_RLI.max()) + 1.0
    self.flat_R = (sum_RLI + self.apart * np.arange(total + 1)[:, None]).reshape(4, -1)

  def cut(self, rate: float) -> tuple[float, list[Held]] | None:
    """Ranges whose places give `rate` batches a second each, and the rate of the slowest of them."""
    total, width = self.given.num_layers, len(self.order) + 1
    # at_L: the least number of places that hold the first layers, by number of layers.
    at_L = np.full(total + 1, width)
    from_L = np.zeros(total + 1, int)
    at_L[0] = 0
    for end in range(1, total + 1):
      starts = np.flatnonzero(at_L[:end] < width)
      after = np.full(len(starts), width)
      for is_first in (True, False):
        (chosen,) = ((starts == 0) == is_first).nonzero()
        if len(chosen):
          role = is_first * FIRST + (end == total) * LAST
          after[chosen] = self._after(role, end - starts[chosen], at_L[starts[chosen]], rate)
      if len(after):
        best = int(after.argmin())
        at_L[end], from_L[end] = after[best], starts[best]
    if at_L[total] >= width:
      return None
    groups = []
    end = total
    while end:
      first = int(from_L[end])
      role = _role(first, end, total)
      rate_P = self.rate_PRL[at_L[first] : at_L[end], role, end - first]
      groups.append((first, end, self.order[at_L[first] : at_L[end]], rate_P))
      end = first
    slowest = min(float(group[3].sum()) for group in groups)
    return slowest, [one for group in groups for one in _lean(*group, slowest)]

  def _after(self, role: int, layers: np.ndarray, at: np.ndarray, rate: float) -> np.ndarray:
    """The number of places of the order used up when those from `at` on give the rate; one more than all if
    they do not."""
    width = len(self.order) + 1
    target = self.sum_RLI[role, layers, at] + rate * (1 - 1e-9) + self.apart * layers
    after = np.searchsorted(self.flat_R[role], target) - layers * width
    return np.minimum(after, width)


def _lean(
  first: int, end: int, places: np.ndarray, rate_P: np.ndarray, wanted: float
) -> list[Held]:
  """The fastest places that give the wanted rate together, each with an equal share of its speed."""
  order = np.argsort(-rate_P, kind="stable")
  number = int(np.searchsorted(rate_P[order].cumsum(), wanted * (1 - 1e-9))) + 1
  kept = order[:number]
  share = min(1.0, wanted / rate_P[kept].sum())
  return [Held(int(places[k]), first, end - first, float(rate_P[k] * share)) for k in kept]
