"""Finds the ways of sequences between places that hold the same layers."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from neurojax.plan.plan import Held
from neurojax.plan.problem import Problem

FEW_WAYS, MAX_WAYS = 300, 5000
"""Numbers of ways up to which a linear program finds them: always, and where links are the bottleneck."""

Ways = dict[tuple[int, int], float]


def routed(given: Problem, held: Sequence[Held]) -> tuple[list[Held], Ways] | None:
  """Rates of the places and of the ways between them, in batches a second; None if nothing gets through.

  Args:
    held: Layers on places, with rates that match each other, links left aside. Those that get no rate are
      left out of the result.
  """
  meetings = _meetings(held)
  number = sum(len(into) * len(out) for into, out in meetings.values())
  if number <= FEW_WAYS and (flow := _flow(given, held)) is not None:
    return flow
  if (near := _greedy(given, held, meetings)) is not None:
    return list(held), near
  if FEW_WAYS < number <= MAX_WAYS and (flow := _flow(given, held)) is not None:
    return flow
  near = _greedy(given, held, meetings, narrow=True)
  return None if near is None else (list(held), near)


def _meetings(held: Sequence[Held]) -> dict[int, tuple[list[int], list[int]]]:
  """For each layer boundary, the holders that end there and those that start there."""
  starts: dict[int, list[int]] = {}
  for i, one in enumerate(held):
    starts.setdefault(one.first, []).append(i)
  found: dict[int, tuple[list[int], list[int]]] = {
    layer: ([], inside) for layer, inside in starts.items() if layer
  }
  for i, one in enumerate(held):
    if one.end in found:
      found[one.end][0].append(i)
  return found


def _greedy(
  given: Problem,
  held: Sequence[Held],
  meetings: dict[int, tuple[list[int], list[int]]],
  *,
  narrow: bool = False,
) -> Ways | None:
  """Ways to the nearest places first; None if rates do not agree or, unless `narrow`, a link is too slow."""
  ways: Ways = {}
  for into, out in meetings.values():
    left = {i: held[i].rate for i in (*into, *out)}
    scale = sum(held[i].rate for i in out)
    if abs(sum(held[i].rate for i in into) - scale) > 1e-6 * scale:
      return None
    hop_IJ = given.hop_PP[np.ix_([held[i].place for i in into], [held[j].place for j in out])]
    open_ends = len(out)
    for index in np.argsort(hop_IJ, axis=None, kind="stable"):
      if not open_ends:
        break
      i, j = into[index // len(out)], out[index % len(out)]
      rate = min(left[i], left[j])
      if rate <= 1e-7 * scale:
        continue
      if not narrow and rate * given.transfer_PP[held[i].place, held[j].place] > 1 + 1e-9:
        return None
      ways[i, j] = rate
      left[i] -= rate
      left[j] -= rate
      open_ends -= left[j] <= 1e-7 * scale
  total = given.num_layers
  for one in held:
    is_end = one.first == 0 or one.end == total
    if is_end and not narrow and one.rate * given.end_transfer_P[one.place] > 1 + 1e-9:
      return None
  reached = [{j for _, j in ways}, {i for i, _ in ways}]
  for i, one in enumerate(held):
    if (one.first and i not in reached[0]) or (one.end < total and i not in reached[1]):
      return None
  return ways


def _flow(given: Problem, held: Sequence[Held]) -> tuple[list[Held], Ways] | None:
  """The greatest flow, and of equal ones one with short hops."""
  from scipy.optimize import linprog
  from scipy.sparse import coo_array

  total = given.num_layers
  edges = [(i, j) for into, out in _meetings(held).values() for i in into for j in out]
  if len(edges) > MAX_WAYS:
    return None
  # Variables: each place's rate, then each way's.
  number = len(held)
  cap = np.array([1 / given.step_s(one.place, one.first, one.end) for one in held])
  scale = float(cap.max())
  cap /= scale
  for i, one in enumerate(held):
    if one.first == 0 or one.end == total:
      cap[i] = min(cap[i], 1 / (given.end_transfer_P[one.place] * scale))
  transfer = [given.transfer_PP[held[i].place, held[j].place] for i, j in edges]
  upper = [*cap, *(1 / (t * scale) for t in transfer)]
  entries: list[tuple[int, int, float]] = []
  rows = 0
  for i, one in enumerate(held):
    for side, is_end in ((0, one.end == total), (1, one.first == 0)):
      if not is_end:
        entries.append((rows, i, -1.0))
        entries += [(rows, number + e, 1.0) for e, edge in enumerate(edges) if edge[side] == i]
        rows += 1
  gain = np.zeros(len(upper))
  gain[[i for i, one in enumerate(held) if one.first == 0]] = 1.0
  matrix = None
  if rows:
    r, c, v = zip(*entries, strict=True)
    matrix = coo_array((v, (r, c)), shape=(rows, len(upper))).tocsr()
  equal = {} if matrix is None else {"A_eq": matrix, "b_eq": np.zeros(rows)}
  bounds = [(0.0, u) for u in upper]
  most = linprog(-gain, bounds=bounds, method="highs", **equal)
  if most.x is None or -most.fun <= 1e-12:
    return None
  hops = [given.hop_PP[held[i].place, held[j].place] for i, j in edges]
  own = [given.enter_P[one.place] * ((one.first == 0) + (one.end == total)) for one in held]
  short = linprog(
    np.array([*own, *hops]) / (max(*own, *hops, 1e-12)),
    A_ub=-gain[None],
    b_ub=[most.fun * (1 - 1e-9)],
    bounds=bounds,
    method="highs",
    **equal,
  )
  flow = (short if short.x is not None else most).x
  return _kept(held, edges, flow, scale)


def _kept(
  held: Sequence[Held], edges: Sequence[tuple[int, int]], flow: np.ndarray, scale: float
) -> tuple[list[Held], Ways]:
  """The places and ways that carry any flow."""
  least = 1e-7 * float(flow.max())
  index: dict[int, int] = {}
  kept: list[Held] = []
  for i, one in enumerate(held):
    if flow[i] > least:
      index[i] = len(kept)
      kept.append(dataclasses.replace(one, rate=float(flow[i]) * scale))
  ways = {
    (index[i], index[j]): float(rate) * scale
    for (i, j), rate in zip(edges, flow[len(held) :], strict=True)
    if rate > least and i in index and j in index
  }
  return kept, ways
