"""Checks whether a model fits a fleet's memory, and finds a placement that shows it.

Layers are contiguous and places may come in any order. So for memory alone a placement is a number of layers for
each place, one place that also holds the embedding, and another that holds the head (or one place for all).
"""

import dataclasses
import functools
import heapq
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from neurojax import count
from neurojax.config import ModelConfig, Span
from neurojax.count.working import DeviceKind
from neurojax.scaling.candidates import VOCAB_SIZE, candidates
from neurojax.scaling.purpose import Purpose


@dataclasses.dataclass(frozen=True, kw_only=True)
class Need:
  """Bytes of any stage of a model: base + n * layer, and those that its role adds.

  Attributes:
    num_layers: Layers of the model.
    base: Bytes of a stage without layers.
    layer: Bytes of each layer.
    first: Bytes that the embedding adds.
    last: Bytes that norm and head add.
    whole: Bytes that both add on one place.
  """

  num_layers: int
  base: int
  layer: int
  first: int
  last: int
  whole: int

  @property
  def total(self) -> int:
    """Bytes of the whole model on one place."""
    return self.base + self.num_layers * self.layer + self.whole

  def stage(self, layers: int, *, first: bool, last: bool) -> int:
    extra = self.whole if first and last else first * self.first + last * self.last
    return self.base + layers * self.layer + extra


Needs = Need | Sequence[Need]
"""One need for all places, or one for each."""


def need(config: ModelConfig, purpose: Purpose, kind: DeviceKind = "cuda") -> Need:
  """Compute a model's need from the bytes of a few stages: bytes are linear in the number of layers."""
  # Four layers show every kind of stage, whatever the model's depth.
  four = dataclasses.replace(config, num_layers=4)

  def size(first: int, last: int) -> int:
    return purpose.stage_bytes(four, Span(first_layer=first, last_layer=last, num_layers=4), kind)

  one = size(1, 1)
  layer = size(1, 2) - one
  base = one - layer
  return Need(
    num_layers=config.num_layers,
    base=base,
    layer=layer,
    first=size(0, 0) - one,
    last=size(3, 3) - one,
    whole=size(0, 3) - base - 4 * layer,
  )


def fits(needed: Needs, free: Sequence[int]) -> bool:
  """True if places with these free bytes can hold the model."""
  needs = _each(needed, free)
  if all(need.total < _NOWHERE for need in needs):
    kinds = {need: _table((need,)) for need in needs}
    return bool(_fitting(kinds, needs, free)[0])
  alone = any(need.total <= space for need, space in zip(needs, free, strict=True))
  return alone or _ends(needs, free) is not None


def largest(
  purpose: Purpose,
  free: Sequence[int],
  vocab_size: int = VOCAB_SIZE,
  most_parameters: float | None = None,
  kinds: Sequence[DeviceKind] | None = None,
) -> ModelConfig | None:
  """The candidate with the most parameters that fits; None if none does.

  The list of candidates is fixed, and each that fits still fits with more memory: more memory never gives a
  smaller model.

  Args:
    free: Free bytes of each place.
    vocab_size: Vocabulary of the candidates.
    most_parameters: Candidates with more parameters are left out.
    kinds: Kinds of the places' devices; GPUs if absent.
  """
  every = candidates(vocab_size, purpose.context)
  kinds = ["cuda"] * len(free) if kinds is None else kinds
  tables = {kind: _candidate_table(purpose, vocab_size, kind) for kind in set(kinds)}
  fitting = _fitting(tables, kinds, free)
  if most_parameters is not None:
    fitting = fitting & np.array([count.parameters(c) <= most_parameters for c in every])
  return every[int(fitting.nonzero()[0][-1])] if fitting.any() else None


def missing_bytes(needed: Needs, free: Sequence[int]) -> int:
  """The least bytes more on the largest place with which the model fits; 0 if it fits."""
  needs = _each(needed, free)
  if fits(needs, free):
    return 0
  most = max(range(len(free)), key=lambda index: free[index])
  low, high = 0, max(needs[most].total - free[most], 1)
  while low + 1 < high:
    middle = (low + high) // 2
    more = [space + middle * (index == most) for index, space in enumerate(free)]
    low, high = (low, middle) if fits(needs, more) else (middle, high)
  return high


def place(
  needed: Needs, free: Sequence[int], speeds: Sequence[float] | None = None, head: float = 0.0
) -> list[tuple[int, int]] | None:
  """Place the layers: (number of the place, layers) along the pipeline; None if the model does not fit.

  With speeds, the slowest stage takes the least time that memory allows, so more memory never makes it slower.
  Without, one place is used if it holds all layers, else layers are spread by memory.

  Args:
    speeds: Layers that each place computes in some unit of time.
    head: Work of the head on the last stage, in layers.
  """
  needs = _each(needed, free)
  total = needs[0].num_layers
  if speeds is not None:
    return _fastest(needs, free, np.array(speeds), head)
  alone = [i for i, space in enumerate(free) if space >= needs[i].total]
  if alone:
    return [(max(alone, key=lambda i: (free[i], -i)), total)]
  ends = _ends(needs, free)
  if ends is None:
    return None
  room = [_capacity(need, space) for need, space in zip(needs, free, strict=True)]
  for index, extra in zip(ends, ("first", "last"), strict=True):
    room[index] = _capacity(needs[index], free[index], getattr(needs[index], extra))
  return _spread(total, room, ends, [float(space) for space in free])


def _fastest(
  needs: Sequence[Need], free: Sequence[int], speed_P: np.ndarray, head: float
) -> list[tuple[int, int]] | None:
  """The fastest placement, by bisection over the time of the slowest stage."""
  total = needs[0].num_layers
  room_PR = np.array([
    [_capacity(need, space, extra) for extra in (0, need.first, need.last)]
    for need, space in zip(needs, free, strict=True)
  ])  # fmt: skip
  room_PR = np.minimum(room_PR, total)
  alone = [i for i, need in enumerate(needs) if need.total <= free[i]]

  def within(time_s: float) -> tuple[np.ndarray, tuple[int, int]] | None:
    """Layers that each place can have as a middle, first and last stage, and the best two places for the
    ends; None if the layers do not fit."""
    quota_P = np.minimum(time_s * speed_P * (1 + 1e-12), total)
    last_P = np.minimum(time_s * speed_P * (1 + 1e-12) - head, total)
    most_PR = np.minimum(room_PR, np.stack([quota_P, quota_P, last_P], axis=1).astype(int))
    ends = _best_ends(most_PR)
    if ends is None:
      return None
    lost = most_PR[ends[0], 0] - most_PR[ends[0], 1] + most_PR[ends[1], 0] - most_PR[ends[1], 2]
    return (most_PR, ends) if most_PR[:, 0].sum() - lost >= total else None

  best_s, best = np.inf, None
  if alone:
    index = max(alone, key=lambda i: (speed_P[i], free[i], -i))
    best_s, best = (total + head) / speed_P[index], [(index, total)]
  high = (total + head) / float(speed_P.min())
  if total < 2 or within(high) is None:
    return best
  low = 0.0
  while high - low > 1e-12 * high:
    middle = (low + high) / 2
    low, high = (low, middle) if within(middle) else (middle, high)
  if high >= best_s:
    return best
  found = within(high)
  assert found is not None
  most_PR, (first, last) = found
  room = [int(n) for n in most_PR[:, 0]]
  room[first], room[last] = int(most_PR[first, 1]), int(most_PR[last, 2])
  return _spread(total, room, (first, last), [float(speed) for speed in speed_P], head)


def _best_ends(most_PR: np.ndarray) -> tuple[int, int] | None:
  """The two places that lose the fewest layers to embedding and head, and hold a layer beside them."""
  found = []
  for role in (1, 2):
    lost_P = np.where(most_PR[:, role] > 0, most_PR[:, 0] - most_PR[:, role], np.iinfo(int).max)
    found.append([
      (int(lost_P[i]), int(i))
      for i in np.argsort(lost_P, kind="stable")[:2]
      if most_PR[i, role] > 0
    ])  # fmt: skip
  pairs = [(a + b, i, j) for a, i in found[0] for b, j in found[1] if i != j]
  return min(pairs)[1:] if pairs else None


def _each(needed: Needs, free: Sequence[int]) -> Sequence[Need]:
  return [needed] * len(free) if isinstance(needed, Need) else needed


def _capacity(needed: Need, space: int, extra: int = 0) -> int:
  return max(0, (space - needed.base - extra) // needed.layer)


def _ends(needs: Sequence[Need], free: Sequence[int]) -> tuple[int, int] | None:
  """The two places where embedding and head cost the fewest layers; None if the model does not fit so."""
  if needs[0].num_layers < 2:
    return None
  each = list(zip(needs, free, strict=True))
  most = [_capacity(need, space) for need, space in each]
  lost = []
  for extras in ([need.first for need in needs], [need.last for need in needs]):
    left = [_capacity(*one, extra) for one, extra in zip(each, extras, strict=True)]
    possible = [(m - n, index) for index, (m, n) in enumerate(zip(most, left, strict=True)) if n]
    lost.append(heapq.nsmallest(2, possible))
  pairs = [(a + b, i, j) for a, i in lost[0] for b, j in lost[1] if i != j]
  if not pairs or sum(most) - min(pairs)[0] < needs[0].num_layers:
    return None
  return min(pairs)[1:]


def _spread(
  total: int,
  room: Sequence[int],
  ends: tuple[int, int],
  speeds: Sequence[float],
  head: float = 0.0,
) -> list[tuple[int, int]]:
  """Layers of each place: one after the other to the place that is then done first and has room."""
  first, last = ends
  counts = dict.fromkeys(ends, 1)

  def done_s(index: int) -> float:
    return (counts.get(index, 0) + 1 + head * (index == last)) / speeds[index]

  queue = [(done_s(i), i) for i in range(len(room)) if speeds[i] > 0]
  heapq.heapify(queue)
  left = total - 2
  while left:
    _, index = heapq.heappop(queue)
    if counts.get(index, 0) >= room[index]:
      continue
    counts[index] = counts.get(index, 0) + 1
    left -= 1
    heapq.heappush(queue, (done_s(index), index))
  middle = [index for index in sorted(counts) if index not in ends]
  return [(index, counts[index]) for index in (first, *middle, last)]


_NOWHERE = 2**60
"""More bytes than any place has (`fleet.MOST_BYTES`). Larger needs are cut to it, so that int64 holds them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Table:
  """The needs of all candidates C as arrays."""

  num_layers: np.ndarray
  base: np.ndarray
  layer: np.ndarray
  first: np.ndarray
  last: np.ndarray
  total: np.ndarray


def _table(needs: Sequence[Need]) -> _Table:
  names = [field.name for field in dataclasses.fields(_Table)]
  return _Table(**{
    name: np.array([min(getattr(needed, name), _NOWHERE) for needed in needs], np.int64)
    for name in names
  })  # fmt: skip


@functools.lru_cache(maxsize=64)
def _candidate_table(purpose: Purpose, vocab_size: int, kind: DeviceKind) -> _Table:
  return _table([need(config, purpose, kind) for config in candidates(vocab_size, purpose.context)])


def _fitting(
  tables: Mapping[Hashable, _Table], kinds: Sequence[Hashable], free: Sequence[int]
) -> np.ndarray:
  """True for each candidate that fits: `_ends` for all of them at once.

  Args:
    tables: Needs of the candidates by kind of place.
    kinds: Kind of each place.
  """
  # Places of a kind with equal memory are alike; two of them at most matter as ends.
  alike = Counter(zip(kinds, free, strict=True))
  space_K, number_K = np.array([space for _, space in alike], np.int64), np.array([*alike.values()])

  def by_place(name: str) -> np.ndarray:
    return np.stack([getattr(tables[kind], name) for kind, _ in alike], axis=1)

  alone_C = (by_place("total") <= space_K).any(axis=1)
  two_K = np.repeat(np.arange(len(space_K)), np.minimum(number_K, 2))
  if len(two_K) < 2:
    return alone_C
  base_CK, layer_CK, num_layers = by_place("base"), by_place("layer"), by_place("num_layers")[:, 0]

  def capacity(extra_CK: np.ndarray | int) -> np.ndarray:
    return np.maximum(0, (space_K - (base_CK + extra_CK)) // layer_CK)

  most_CK = capacity(0)
  impossible = np.int64(2**60)
  ends = []
  for name in ("first", "last"):
    left_CK = capacity(by_place(name))
    lost_CE = np.where(left_CK > 0, most_CK - left_CK, impossible)[:, two_K]
    least_C2 = np.argpartition(lost_CE, 1, axis=1)[:, :2]
    ends.append((least_C2, np.take_along_axis(lost_CE, least_C2, axis=1)))
  (at_a, lost_a), (at_b, lost_b) = ends
  pair_C22 = lost_a[:, :, None] + lost_b[:, None, :]
  pair_C22 = np.where(at_a[:, :, None] == at_b[:, None, :], impossible, pair_C22)
  lost_C = pair_C22.min(axis=(1, 2))
  most_C = (most_CK * number_K[None]).sum(axis=1)
  cut_C = (lost_C < impossible) & (most_C - lost_C >= num_layers) & (num_layers > 1)
  return alone_C | cut_C
