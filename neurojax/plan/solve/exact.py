"""Finds the best order and division of layers for few places, or few kinds of place.

Dynamic programming over the number of used places of each kind, the kind of the last one, and the number of
layers placed (Held and Karp, J. SIAM 10(1), 1962, with a partition of the layers). Places that can be
exchanged without a difference are one kind: P unlike places have 2^P states, P alike ones P + 1.
"""

import itertools
import math

import numpy as np

from neurojax.plan.problem import FIRST, LAST, MIDDLE, WHOLE, Problem
from neurojax.plan.solve.uniform import Division

MAX_OPERATIONS = 6e8
MAX_ENTRIES = 2e7


def kinds(problem: Problem, step_PRL: np.ndarray, hop_PP: np.ndarray) -> list[list[int]]:
  """Groups of places that can be exchanged for each other."""
  found: list[list[int]] = []
  by_key: dict[bytes, list[int]] = {}
  for place in range(len(step_PRL)):
    ends = problem.enter_P[place].tobytes() + problem.leave_P[place].tobytes()
    key = step_PRL[place].tobytes() + ends + np.sort(hop_PP[place]).tobytes()
    for kind in by_key.get(key, ()):
      other = found[kind][0]
      same = hop_PP[place] == hop_PP[other]
      same[[place, other]] = True
      if same.all():
        found[kind].append(place)
        break
    else:
      by_key.setdefault(key, []).append(len(found))
      found.append([place])
  return found


def is_small(sizes: list[int], num_layers: int) -> bool:
  """True if `solve_exact` takes about a second at most for kinds of these sizes."""
  states = math.prod(size + 1 for size in sizes)
  entries = states * len(sizes) * (num_layers + 1)
  return entries <= MAX_ENTRIES and entries * (num_layers / 2 + len(sizes)) <= MAX_OPERATIONS


def solve_exact(
  problem: Problem, step_PRL: np.ndarray, hop_PP: np.ndarray, groups: list[list[int]]
) -> tuple[float, Division] | None:
  """The least latency, and (place, layers) of the stages in order; None if the layers cannot be placed.

  Pins that bind several places together are not kept.
  """
  total, number = problem.num_layers, len(groups)
  some = [group[0] for group in groups]
  size_C = np.array([len(group) for group in groups])
  step_CRL = step_PRL[some]
  enter_C, leave_C = problem.enter_P[some], problem.leave_P[some]
  hop_CC = hop_PP[np.ix_(some, some)].copy()
  for kind, group in enumerate(groups):
    hop_CC[kind, kind] = hop_PP[group[0], group[1]] if len(group) > 1 else np.inf
  forced_C = ~np.isfinite(step_CRL[:, MIDDLE, 0])
  stride_C = np.cumprod(np.concatenate([[1], size_C[:-1] + 1])).astype(int)
  used_SC = np.array(list(itertools.product(*(range(n + 1) for n in size_C[::-1]))))[:, ::-1]
  level_S = used_SC.sum(axis=1)
  best_SCL = np.full((len(used_SC), number, total + 1), np.inf)
  for kind in range(number):
    best_SCL[stride_C[kind], kind] = enter_C[kind] + step_CRL[kind, FIRST]
  best, end = np.inf, (0, -1, 0)
  whole_C = step_CRL[:, WHOLE, total] + enter_C + leave_C
  for kind in range(number):
    # One place alone, if no pin requires layers elsewhere.
    needed = forced_C.copy()
    needed[kind] = size_C[kind] > 1 and forced_C[kind]
    if whole_C[kind] < best and not needed.any():
      best, end = whole_C[kind], (int(stride_C[kind]), kind, total)
  for level in range(1, min(int(size_C.sum()), total)):
    (states,) = (level_S == level).nonzero()
    for kind in range(number):
      sources = states[used_SC[states, kind] < size_C[kind]]
      if not len(sources):
        continue
      reached_SL = (best_SCL[sources] + hop_CC[:, kind][:, None]).min(axis=1)
      targets = sources + stride_C[kind]
      ending_SL = reached_SL[:, ::-1] + (step_CRL[kind, LAST] + leave_C[kind])
      value_S = ending_SL.min(axis=1)
      complete_S = (used_SC[targets][:, forced_C] == size_C[forced_C]).all(axis=1)
      value_S[~complete_S] = np.inf
      winner = int(value_S.argmin())
      if value_S[winner] < best:
        best = value_S[winner]
        end = int(targets[winner]), kind, int(ending_SL[winner].argmin())
      out_SL = np.full_like(reached_SL, np.inf)
      for layers in np.isfinite(step_CRL[kind, MIDDLE]).nonzero()[0]:
        if layers:
          candidate_SL = reached_SL[:, :-layers] + step_CRL[kind, MIDDLE, layers]
          np.minimum(out_SL[:, layers:], candidate_SL, out=out_SL[:, layers:])
      best_SCL[targets, kind] = out_SL
  if not np.isfinite(best):
    return None
  return float(best), _walk_back(end, best_SCL, step_CRL, hop_CC, stride_C, groups, total)


def _walk_back(
  end: tuple[int, int, int],
  best_SCL: np.ndarray,
  step_CRL: np.ndarray,
  hop_CC: np.ndarray,
  stride_C: np.ndarray,
  groups: list[list[int]],
  total: int,
) -> Division:
  state, kind, layers = end
  chain = [(kind, layers)]
  state, placed = state - stride_C[kind], total - layers
  after = kind
  while placed:
    # The previous kind, then its number of layers: those that gave the value in the table.
    kind = int((best_SCL[state, :, placed] + hop_CC[:, after]).argmin())
    source = state - stride_C[kind]
    if source == 0:
      layers = placed
    else:
      reached_L = (best_SCL[source] + hop_CC[:, kind][:, None]).min(axis=0)
      value_L = reached_L[:placed][::-1] + step_CRL[kind, MIDDLE, 1 : placed + 1]
      layers = 1 + int(value_L.argmin())
    chain.append((kind, layers))
    state, placed, after = source, placed - layers, kind
  free = [list(group) for group in groups]
  return [(free[kind].pop(0), layers) for kind, layers in reversed(chain)]
