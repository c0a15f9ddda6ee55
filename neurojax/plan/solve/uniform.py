"""Finds the best division of layers where the order of hosts does not matter.

A table has, for each role (bits: 1 embedding, 2 head) and number of layers, the least seconds in which a
group of places can compute them. Two groups join by a (min, +) convolution. After the last one, the entry of
role 3 and all layers is the optimum. P places and L layers take O(P L^2).
"""

import dataclasses

import numpy as np

from neurojax.plan.problem import FIRST, LAST, MIDDLE, WHOLE, Problem

Division = list[tuple[int, int]]
"""(place, number of layers) of each stage along the pipeline."""

_PAIRS = [(a, b) for a in range(4) for b in range(4) if not a & b]


@dataclasses.dataclass
class _Joined:
  """The joined table of several members.

  Attributes:
    table_RL: Least seconds by role and number of layers.
    took: For each member, the entry of its own table that each joined entry uses: role * (L + 1) + layers.
  """

  table_RL: np.ndarray
  took: list[np.ndarray]

  def split(self, role: int, layers: int) -> list[tuple[int, int]]:
    """(role, layers) of each member in an entry of the joined table."""
    width = self.table_RL.shape[1]
    parts = []
    for took_RL in reversed(self.took):
      part = divmod(int(took_RL[role, layers]), width)
      parts.append(part)
      role, layers = role ^ part[0], layers - part[1]
    assert (role, layers) == (0, 0)
    return parts[::-1]


def join(tables: list[np.ndarray]) -> _Joined:
  """The (min, +) convolution of tables [role, layers]."""
  width = tables[0].shape[1]
  table_RL = np.full((4, width), np.inf)
  table_RL[MIDDLE, 0] = 0.0
  took = []
  for member_RL in tables:
    joined_RL = np.full((4, width), np.inf)
    took_RL = np.zeros((4, width), np.int32)
    # Entry [l, n] of the window is the table at l - n; below 0 it is infinite.
    padded_RL = np.full((4, 2 * width - 1), np.inf)
    padded_RL[:, width - 1 :] = table_RL
    window_RLN = np.lib.stride_tricks.sliding_window_view(padded_RL, width, axis=1)[:, :, ::-1]
    finite_RN = np.isfinite(member_RL)
    for before, role in _PAIRS:
      (possible,) = finite_RN[role].nonzero()
      if not len(possible) or not np.isfinite(table_RL[before]).any():
        continue
      low, high = possible[0], possible[-1] + 1
      sums_LN = window_RLN[before][:, low:high] + member_RL[role, low:high]
      best_L = sums_LN.argmin(axis=1)
      value_L = sums_LN[np.arange(width), best_L]
      after = before | role
      better_L = value_L < joined_RL[after]
      joined_RL[after][better_L] = value_L[better_L]
      took_RL[after][better_L] = role * width + low + best_L[better_L]
    table_RL = joined_RL
    took.append(took_RL)
  return _Joined(table_RL, took)


def unordered(
  problem: Problem, step_PRL: np.ndarray, offset_PR: np.ndarray
) -> tuple[float, list[tuple[int, int, int]]] | None:
  """The least sum of steps and offsets of the places used, and (place, role, layers) of each of them.

  Args:
    offset_PR: Seconds that each place adds to its step, by role.
  """
  total = problem.num_layers
  tables: list[np.ndarray] = []
  members: list[tuple[list[int], _Joined | None]] = []
  for number, places in enumerate(problem.hosts):
    own = []
    for place in places:
      table_RL = step_PRL[place] + offset_PR[place][:, None]
      table_RL[MIDDLE, 0] = step_PRL[place, MIDDLE, 0]
      own.append(table_RL)
    pin = problem.host_pin(number)
    if pin is None:
      tables += own
      members += [([place], None) for place in places]
      continue
    joined = join(own)
    kept_RL = np.full_like(joined.table_RL, np.inf)
    kept_RL[:, pin] = joined.table_RL[:, pin]
    tables.append(kept_RL)
    members.append((places, joined))
  all_ = join(tables)
  value = all_.table_RL[WHOLE, total]
  if not np.isfinite(value):
    return None
  parts = []
  for (places, joined), (role, n) in zip(members, all_.split(WHOLE, total), strict=True):
    split = joined.split(role, n) if joined else [(role, n)]
    parts += [(place, r, k) for place, (r, k) in zip(places, split, strict=True) if k]
  return float(value), parts


def uniform_hop_s(problem: Problem, hop_PP: np.ndarray) -> float | None:
  """Seconds of every hop between two hosts, if all are alike and hops within a host are no longer; else None."""
  firsts = [places[0] for places in problem.hosts]
  hop_HH = hop_PP[np.ix_(firsts, firsts)]
  if len(firsts) == 1:
    return float("inf")
  other = hop_HH[~np.eye(len(firsts), dtype=bool)]
  return (
    float(other[0])
    if (other == other[0]).all() and local_hop_s(problem, hop_PP) <= other[0]
    else None
  )


def local_hop_s(problem: Problem, hop_PP: np.ndarray) -> float:
  return float(hop_PP[problem.hosts[0][0], problem.hosts[0][0]])


def contenders(problem: Problem, step_PRL: np.ndarray) -> list[int] | None:
  """The places that a best plan needs where all hops are alike; None if it may need any.

  A plan has at most as many stages as layers. A place that is not among the fastest L for its role and number of
  layers can be replaced by an idle one of these.
  """
  total = problem.num_layers
  if problem.pins or len(problem.hosts) < len(step_PRL) or len(step_PRL) <= 4 * total:
    return None
  kept = np.zeros(len(step_PRL), bool)
  enter_PR = np.zeros((len(step_PRL), 4))
  enter_PR[:, FIRST] = problem.enter_P
  enter_PR[:, LAST] = problem.leave_P
  enter_PR[:, WHOLE] = problem.enter_P + problem.leave_P
  for role in range(4):
    for layers in range(1, total + 1):
      value_P = step_PRL[:, role, layers] + enter_PR[:, role]
      fastest = np.argpartition(value_P, total)[:total]
      kept[fastest[np.isfinite(value_P[fastest])]] = True
  found = np.flatnonzero(kept)
  return [int(place) for place in found] if 0 < len(found) < len(step_PRL) else None


def solve_uniform(
  problem: Problem, step_PRL: np.ndarray, hop_PP: np.ndarray
) -> tuple[float, Division] | None:
  """The least latency and its division, where `uniform_hop_s` is not None.

  The places of a host are next to each other, because hops between hosts are longer. Only a host that holds
  both ends of a pipeline over several hosts is visited twice.
  """
  if (some := contenders(problem, step_PRL)) is not None:
    fewer = problem.restricted(some)
    solved = solve_uniform(fewer, step_PRL[some], hop_PP[np.ix_(some, some)])
    return solved and (solved[0], [(some[place], layers) for place, layers in solved[1]])
  between_s, local_s = uniform_hop_s(problem, hop_PP), local_hop_s(problem, hop_PP)
  assert between_s is not None
  total = problem.num_layers
  if not np.isfinite(local_s):
    # No hop may be taken at all.
    whole_P = step_PRL[:, WHOLE, total] + problem.enter_P + problem.leave_P
    (forced,) = (~np.isfinite(step_PRL[:, MIDDLE, 0])).nonzero()
    hosts = _pinned_hosts(problem, step_PRL)
    whole_P[[bool(hosts - {h} or set(forced) - {p}) for p, h in enumerate(problem.host_P)]] = np.inf
    place = int(whole_P.argmin())
    return (float(whole_P[place]), [(place, total)]) if np.isfinite(whole_P[place]) else None
  tables, inner = [], []
  alone: tuple[float, int] = (np.inf, -1)
  pinned = _pinned_hosts(problem, step_PRL)
  for number, places in enumerate(problem.hosts):
    offset_PR = np.zeros((len(places), 4))
    offset_PR[:, FIRST] += problem.enter_P[places]
    offset_PR[:, LAST] += problem.leave_P[places]
    offset_PR[:, WHOLE] += problem.enter_P[places] + problem.leave_P[places]
    members = []
    for place, offset_R in zip(places, offset_PR, strict=True):
      member_RL = step_PRL[place] + offset_R[:, None]
      # Every stage is charged for a hop to it; `back_s` below takes back the one too many.
      if len(places) > 1:
        member_RL += local_s
        member_RL[MIDDLE, 0] = step_PRL[place, MIDDLE, 0]
      members.append(member_RL)
    joined = join(members) if len(places) > 1 else None
    table_RL = joined.table_RL.copy() if joined else members[0].copy()
    pin = problem.host_pin(number)
    if pin is not None:
      kept_R = table_RL[:, pin].copy()
      table_RL[:] = np.inf
      table_RL[:, pin] = kept_R
    back_s = local_s if joined else 0.0
    if table_RL[WHOLE, total] - back_s < alone[0] and not pinned - {number}:
      alone = float(table_RL[WHOLE, total] - back_s), number
    table_RL[WHOLE, total] = np.inf
    nothing = table_RL[MIDDLE, 0] if pin is None or pin == 0 else np.inf
    table_RL[:WHOLE] += between_s - back_s
    table_RL[WHOLE] += 2 * (between_s - back_s)
    table_RL[MIDDLE, 0] = nothing
    tables.append(table_RL)
    inner.append(joined)
  best: tuple[float, Division] | None = None
  if np.isfinite(alone[0]):
    parts = [(alone[1], WHOLE, total)]
    best = alone[0], _ordered(problem, inner, parts)
  if np.isfinite(between_s) and len(problem.hosts) > 1:
    joined = join(tables)
    value = joined.table_RL[WHOLE, total] - between_s
    if np.isfinite(value) and (best is None or value < best[0]):
      parts = [(h, role, n) for h, (role, n) in enumerate(joined.split(WHOLE, total)) if n]
      best = float(value), _ordered(problem, inner, parts)
  return best


def _pinned_hosts(problem: Problem, step_PRL: np.ndarray) -> set[int]:
  """Numbers of hosts that have to hold layers."""
  (forced,) = (~np.isfinite(step_PRL[:, MIDDLE, 0])).nonzero()
  together = {h for h in range(len(problem.hosts)) if problem.host_pin(h)}
  return together | {int(problem.host_P[p]) for p in forced}


def _ordered(
  problem: Problem, inner: list[_Joined | None], parts: list[tuple[int, int, int]]
) -> Division:
  """The stages in order: the host and place with the embedding first, those with the head last."""
  front: Division = []
  middle: Division = []
  back: Division = []
  for host, role, layers in parts:
    places, joined = problem.hosts[host], inner[host]
    split = joined.split(role, layers) if joined else [(role, layers)]
    chain = [(place, r, n) for place, (r, n) in zip(places, split, strict=True) if n]
    first = [(p, n) for p, r, n in chain if r & FIRST]
    last = [(p, n) for p, r, n in chain if r & LAST and not r & FIRST]
    rest = [(p, n) for p, r, n in chain if not r]
    if role == MIDDLE:
      middle += rest
    elif role == LAST:
      back = rest + last
    else:
      # Of a host with both ends, what is between lies with the first; the last is visited again.
      front = first + rest
      back = last or back
  return front + middle + back
