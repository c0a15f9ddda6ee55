"""Searches for good orders of many unlike places, and bounds how far from the best they can be.

For a given order of the places, dynamic programming finds the best use of some of them in that order; the search
is over orders. The bound charges each place for the shortest hop it has, whatever its neighbours.
"""

import time

import numpy as np

from neurojax.plan.problem import FIRST, LAST, MIDDLE, WHOLE, Problem
from neurojax.plan.solve.uniform import Division, unordered


def along(
  problem: Problem, step_PRL: np.ndarray, hop_PP: np.ndarray, order: np.ndarray
) -> tuple[float, Division] | None:
  """The best use of places in the given order; some may be left out. O(K^2 L + K L^2) for K places."""
  total, width = problem.num_layers, problem.num_layers + 1
  number = len(order)
  (forced,) = (~np.isfinite(step_PRL[order, MIDDLE, 0])).nonzero()
  outside = np.setdiff1d(np.arange(len(step_PRL)), order)
  if not np.isfinite(step_PRL[outside, MIDDLE, 0]).all():
    return None
  best_KL = np.full((number, width), np.inf)
  reached_KL = np.full((number, width), np.inf)
  best, end = np.inf, (-1, 0)
  for k, place in enumerate(order):
    before = forced[forced < k]
    low = int(before[-1]) if len(before) else 0
    has_more = bool((forced > k).any())
    enter_s, leave_s = problem.enter_P[place], problem.leave_P[place]
    if not len(before):
      best_KL[k] = enter_s + step_PRL[place, FIRST]
      whole = enter_s + step_PRL[place, WHOLE, total] + leave_s
      if whole < best and not has_more:
        best, end = whole, (k, total)
    if k == low and k == 0:
      continue
    reached_L = (best_KL[low:k] + hop_PP[order[low:k], place][:, None]).min(axis=0)
    reached_KL[k] = reached_L
    if not has_more:
      ending_L = reached_L[::-1] + step_PRL[place, LAST] + leave_s
      layers = int(ending_L.argmin())
      if ending_L[layers] < best:
        best, end = ending_L[layers], (k, layers)
    (possible,) = np.isfinite(step_PRL[place, MIDDLE, 1:]).nonzero()
    if len(possible):
      padded_L = np.full(2 * width - 1, np.inf)
      padded_L[width - 1 :] = reached_L
      window_LN = np.lib.stride_tricks.sliding_window_view(padded_L, width)[:, ::-1]
      low_n, high_n = possible[0] + 1, possible[-1] + 2
      middle_L = (window_LN[:, low_n:high_n] + step_PRL[place, MIDDLE, low_n:high_n]).min(axis=1)
      np.minimum(best_KL[k], middle_L, out=best_KL[k])
  if not np.isfinite(best):
    return None
  k, layers = end
  chain, placed = [(k, layers)], total - layers
  while placed:
    before = forced[forced < k]
    low = int(before[-1]) if len(before) else 0
    after, k = (
      order[k],
      low + int((best_KL[low:k, placed] + hop_PP[order[low:k], order[k]]).argmin()),
    )
    del after
    place = order[k]
    value_L = reached_KL[k, :placed][::-1] + step_PRL[place, MIDDLE, 1 : placed + 1]
    layers = 1 + int(value_L.argmin())
    as_first = problem.enter_P[place] + step_PRL[place, FIRST, placed]
    if not (forced < k).any() and as_first <= value_L[layers - 1]:
      layers = placed
    chain.append((k, layers))
    placed -= layers
  return float(best), [(int(order[k]), layers) for k, layers in reversed(chain)]


def bound_s(
  problem: Problem, step_PRL: np.ndarray, hop_PP: np.ndarray
) -> tuple[float, list[Division]]:
  """A latency that no order can beat, and the places that the bounds would use."""
  apart_PP = hop_PP.copy()
  np.fill_diagonal(apart_PP, np.inf)
  single = len(apart_PP) == 1
  into_P = np.zeros(1) if single else apart_PP.min(axis=0)
  from_P = np.zeros(1) if single else apart_PP.min(axis=1)
  best, used = 0.0, []
  for share in (1.0, 0.0, 0.5):
    offset_PR = np.empty((len(hop_PP), 4))
    # Each hop is paid in parts by the two places it joins.
    offset_PR[:, MIDDLE] = _times(share, into_P) + _times(1 - share, from_P)
    offset_PR[:, FIRST] = problem.enter_P + _times(1 - share, from_P)
    offset_PR[:, LAST] = problem.leave_P + _times(share, into_P)
    offset_PR[:, WHOLE] = problem.enter_P + problem.leave_P
    found = unordered(problem, step_PRL, offset_PR)
    if found is None:
      return np.inf, []
    best = max(best, found[0])
    front = [(p, n) for p, role, n in found[1] if role & FIRST]
    back = [(p, n) for p, role, n in found[1] if role == LAST]
    used.append(front + [(p, n) for p, role, n in found[1] if not role] + back)
  return best, used


def search(
  problem: Problem,
  step_PRL: np.ndarray,
  hop_PP: np.ndarray,
  *,
  starts: list[Division],
  deadline_s: float,
  runs: int,
) -> tuple[float, Division] | None:
  """The best of several orders, each improved by moving places as long as that helps.

  Args:
    starts: Divisions whose places, in their order, are tried first.
    deadline_s: Time of time.monotonic() after which no further order is tried.
    runs: Orders that are tried at most.
  """
  number = len(step_PRL)
  best: tuple[float, Division] | None = None
  left = runs

  def attempt(order: np.ndarray) -> bool:
    nonlocal best, left
    if left <= 0 or (best is not None and time.monotonic() > deadline_s):
      return False
    left -= 1
    found = along(problem, step_PRL, hop_PP, order)
    if found is None or (best is not None and found[0] >= best[0] * (1 - 1e-12)):
      return False
    best = found
    return True

  for start in starts:
    used = np.array([place for place, _ in start], int)
    attempt(_fill_in(used, number, hop_PP))
  usable_P = np.isfinite(step_PRL[:, :, 1:]).any(axis=(1, 2))
  speed_P = _layer_s(step_PRL)
  fastest = [int(p) for p in np.argsort(speed_P, kind="stable") if usable_P[p]]
  attempt(np.array(fastest + [p for p in range(number) if not usable_P[p]]))
  for place in fastest[: max(2, runs // 6)]:
    attempt(_nearest(place, hop_PP, speed_P))
  while best is not None:
    used = np.array([place for place, _ in best[1]])
    improved = attempt(_fill_in(used, number, hop_PP))
    improved |= attempt(_fill_in(used[::-1], number, hop_PP))
    if not improved and len(used) > 3:
      improved = attempt(_fill_in(_two_opt(used, hop_PP), number, hop_PP))
    for place in fastest[:6]:
      if improved or len(used) < 2:
        break
      rest = used[used != place]
      improved = attempt(_fill_in(np.concatenate([[place], rest]), number, hop_PP))
      improved |= attempt(_fill_in(np.concatenate([rest, [place]]), number, hop_PP))
    if not improved:
      break
  return best


def _times(factor: float, value_P: np.ndarray) -> np.ndarray:
  """A product in which 0 times infinity is 0."""
  return factor * value_P if factor else np.zeros_like(value_P)


def _layer_s(step_PRL: np.ndarray) -> np.ndarray:
  """Seconds of one layer on each place, at best."""
  layers_L = np.arange(1, step_PRL.shape[2])
  return (step_PRL[:, :, 1:] / layers_L).min(axis=(1, 2))


def _nearest(start: int, hop_PP: np.ndarray, speed_P: np.ndarray) -> np.ndarray:
  """An order of all places in which each is followed by the nearest that is left; of equal ones the fastest."""
  rank_P = np.argsort(np.argsort(speed_P, kind="stable"))
  left = np.ones(len(hop_PP), bool)
  order = [start]
  left[start] = False
  while left.any():
    (others,) = left.nonzero()
    hops = hop_PP[order[-1], others]
    near = others[hops <= hops.min()]
    following = int(near[rank_P[near].argmin()])
    order.append(following)
    left[following] = False
  return np.array(order)


def _fill_in(used: np.ndarray, number: int, hop_PP: np.ndarray) -> np.ndarray:
  """The order `used` with every other place inserted where it adds least to the hops."""
  others = np.setdiff1d(np.arange(number), used)
  if len(used) < 2 or not len(others):
    return np.concatenate([used, others]).astype(int)
  detour_OU = hop_PP[np.ix_(used[:-1], others)].T + hop_PP[np.ix_(others, used[1:])]
  with np.errstate(invalid="ignore"):
    detour_OU = np.nan_to_num(detour_OU - hop_PP[used[:-1], used[1:]], nan=np.inf)
  gap_O = detour_OU.argmin(axis=1)
  order = []
  for gap, place in enumerate(used):
    order.append(place)
    if gap < len(used) - 1:
      order += sorted(others[gap_O == gap], key=lambda p: hop_PP[place, p])
  return np.array(order, int)


def _two_opt(used: np.ndarray, hop_PP: np.ndarray) -> np.ndarray:
  """Reverse the part of the order whose reversal shortens the hops most, until none does."""
  order = used.copy()
  for _ in range(len(order)):
    hop_KK = hop_PP[np.ix_(order, order)]
    now_K = np.append(hop_KK[np.arange(len(order) - 1), np.arange(1, len(order))], 0.0)
    gain, cut = 1e-15, None
    for i in range(len(order) - 2):
      # Turning i+1..j joins i to j, and i+1 to what follows j.
      j = np.arange(i + 2, len(order))
      after = np.minimum(j + 1, len(order) - 1)
      new = hop_KK[i, j] + np.where(j + 1 < len(order), hop_KK[i + 1, after], 0.0)
      with np.errstate(invalid="ignore"):
        gains = np.nan_to_num(now_K[i] + now_K[j] - new, nan=-np.inf)
      if gains.max() > gain:
        gain, cut = float(gains.max()), (i + 1, int(j[gains.argmax()]))
    if cut is None:
      break
    order[cut[0] : cut[1] + 1] = order[cut[0] : cut[1] + 1][::-1]
  return order
