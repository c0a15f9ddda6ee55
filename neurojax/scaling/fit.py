"""Whether a model fits a fleet's memory, and a placement that shows it. Imports no JAX.

Layers are contiguous and the order of places is free, so memory alone asks for a number of layers for
each place, one place that also holds the embedding and another that holds the head (or one for all).
"""

import dataclasses
import functools
import heapq
from collections import Counter
from collections.abc import Sequence

import numpy as np

from neurojax.config import ModelConfig, Span
from neurojax.scaling import count
from neurojax.scaling.count import Scales
from neurojax.scaling.ladder import VOCAB_SIZE, ladder
from neurojax.scaling.load import Load, stage_bytes
from neurojax.scaling.training import Optimizer, TrainBytes, train_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
  """Stages that answer: weights, and the caches of `sequences` places of `context` positions.

  Attributes:
    weights: "dense", "int8", or packed two-bit codes ("w2a8", "w2a16") with `scales` for every matrix.
    dtype: Of activations and caches, and of dense weights.
  """

  weights: count.Weights = "dense"
  scales: Scales | None = None
  dtype: str = "bfloat16"
  context: int = 2048
  sequences: int = 1

  def load(self, config: ModelConfig) -> Load:
    return Load(
      dtype=self.dtype,
      weights=self.weights,
      capacity=count.capacity_for(self.context),
      max_sequences=self.sequences,
      ternary=None if self.scales is None else count.uniform_ternary(config, self.scales),
    )

  def stage_bytes(self, config: ModelConfig, span: Span) -> int:
    return stage_bytes(config, span, self.load(config))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
  """Stages that train: see `training.train_bytes`, whose arguments these are. `context` is the length
  of a sequence, `sequences` how many are in memory at once."""

  context: int = 2048
  sequences: int = 1
  optimizer: Optimizer = "adamw"
  remat: bool = True
  compute_dtype: str = "bfloat16"
  diloco: bool = False

  def train_bytes(self, config: ModelConfig, span: Span) -> TrainBytes:
    return train_bytes(
      config,
      span,
      batch=self.sequences,
      sequence=self.context,
      optimizer=self.optimizer,
      remat=self.remat,
      compute_dtype=self.compute_dtype,
      diloco=self.diloco,
    )

  def stage_bytes(self, config: ModelConfig, span: Span) -> int:
    return self.train_bytes(config, span).total


Purpose = Serving | Training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Need:
  """Bytes of any stage of a model: base + n * layer, and what embedding (`first`), head (`last`) or
  both on one place (`whole`) add."""

  num_layers: int
  base: int
  layer: int
  first: int
  last: int
  whole: int

  @property
  def total(self) -> int:
    """On one place."""
    return self.base + self.num_layers * self.layer + self.whole

  def stage(self, layers: int, *, first: bool, last: bool) -> int:
    extra = self.whole if first and last else first * self.first + last * self.last
    return self.base + layers * self.layer + extra


def need(config: ModelConfig, purpose: Purpose) -> Need:
  """From the bytes of five stages of a model of the same widths: all of them are linear in layers."""
  # Four layers show every kind of stage, whatever the model's depth.
  four = dataclasses.replace(config, num_layers=4)

  def size(first: int, last: int) -> int:
    return purpose.stage_bytes(four, Span(first_layer=first, last_layer=last, num_layers=4))

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


def fits(needed: Need, free: Sequence[int]) -> bool:
  """Whether places with so many free bytes can hold the model."""
  if needed.total < _NOWHERE:
    return bool(_fitting(_table((needed,)), free)[0])
  return needed.total <= max(free) or _ends(needed, free) is not None


def largest(
  purpose: Purpose,
  free: Sequence[int],
  vocab_size: int = VOCAB_SIZE,
  most_parameters: float | None = None,
) -> ModelConfig | None:
  """The candidate with the most parameters that fits; None if none does.

  The list of candidates is fixed and every one that fits still fits with more memory: more never
  gives a smaller model.
  """
  candidates = ladder(vocab_size, purpose.context)
  fitting = _fitting(_ladder_table(purpose, vocab_size), free)
  if most_parameters is not None:
    fitting = fitting & np.array([count.parameters(c) <= most_parameters for c in candidates])
  return candidates[int(fitting.nonzero()[0][-1])] if fitting.any() else None


def missing_bytes(needed: Need, free: Sequence[int]) -> int:
  """The least that the largest place needs more for the model to fit; 0 if it fits."""
  if fits(needed, free):
    return 0
  most = max(range(len(free)), key=lambda index: free[index])
  low, high = 0, needed.total
  while low + 1 < high:
    middle = (low + high) // 2
    more = [space + middle * (index == most) for index, space in enumerate(free)]
    low, high = (low, middle) if fits(needed, more) else (middle, high)
  return high


def place(
  needed: Need, free: Sequence[int], speeds: Sequence[float] | None = None
) -> list[tuple[int, int]] | None:
  """(index of the place, layers) along the pipeline; None if the model does not fit.

  With speeds the slowest stage takes the least that memory allows, embedding and head not counted;
  without, one place is used if one holds all, else layers are spread by memory.
  """
  best: tuple[float, list[tuple[int, int]]] | None = None
  alone = [index for index, space in enumerate(free) if space >= needed.total]
  if alone:
    index = max(alone, key=lambda i: (speeds[i] if speeds else 0.0, free[i], -i))
    best = (needed.num_layers / speeds[index] if speeds else 0.0, [(index, needed.num_layers)])
    if not speeds:
      return best[1]
  ends = _ends(needed, free)
  if ends is not None:
    counts = _spread(needed, free, ends, speeds or [float(space) for space in free])
    slowest = max(n / speeds[i] for i, n in counts.items()) if speeds else 0.0
    if best is None or slowest < best[0]:
      first, last = ends
      middle = [index for index in sorted(counts) if index not in ends]
      best = slowest, [(index, counts[index]) for index in (first, *middle, last)]
  return best[1] if best else None


def _capacity(needed: Need, space: int, extra: int = 0) -> int:
  return max(0, (space - needed.base - extra) // needed.layer)


def _ends(needed: Need, free: Sequence[int]) -> tuple[int, int] | None:
  """The places where embedding and head cost the fewest layers, if the model then fits."""
  if needed.num_layers < 2:
    return None
  most = [_capacity(needed, space) for space in free]
  lost = []
  for extra in (needed.first, needed.last):
    left = [_capacity(needed, space, extra) for space in free]
    possible = [(m - n, index) for index, (m, n) in enumerate(zip(most, left, strict=True)) if n]
    lost.append(heapq.nsmallest(2, possible))
  pairs = [(a + b, i, j) for a, i in lost[0] for b, j in lost[1] if i != j]
  if not pairs or sum(most) - min(pairs)[0] < needed.num_layers:
    return None
  return min(pairs)[1:]


def _spread(
  needed: Need, free: Sequence[int], ends: tuple[int, int], speeds: Sequence[float]
) -> dict[int, int]:
  """Layers of each place: one after the other to whoever is then done first and has room."""
  extra = {ends[0]: needed.first, ends[1]: needed.last}
  room = [_capacity(needed, space, extra.get(index, 0)) for index, space in enumerate(free)]
  counts = dict.fromkeys(ends, 1)
  queue = [((counts.get(i, 0) + 1) / speeds[i], i) for i in range(len(free)) if speeds[i] > 0]
  heapq.heapify(queue)
  left = needed.num_layers - 2
  while left:
    _, index = heapq.heappop(queue)
    if counts.get(index, 0) >= room[index]:
      continue
    counts[index] = counts.get(index, 0) + 1
    left -= 1
    heapq.heappush(queue, ((counts[index] + 1) / speeds[index], index))
  return counts


_NOWHERE = 2**60
"""Bytes that no place has (`fleet.MOST_BYTES`); more than these are as many."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Table:
  """The needs of candidates C as arrays."""

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
def _ladder_table(purpose: Purpose, vocab_size: int) -> _Table:
  return _table([need(config, purpose) for config in ladder(vocab_size, purpose.context)])


def _fitting(table: _Table, free: Sequence[int]) -> np.ndarray:
  """Which candidates fit: `_ends` for all of them at once."""
  # Places with equal memory are alike; of each kind two matter as ends.
  kinds = Counter(free)
  space_K, number_K = np.array(list(kinds), np.int64), np.array(list(kinds.values()))
  alone_C = table.total <= space_K.max()
  two_K = np.repeat(np.arange(len(space_K)), np.minimum(number_K, 2))
  if len(two_K) < 2:
    return alone_C

  def capacity(extra_C: np.ndarray | int) -> np.ndarray:
    room_CK = space_K[None] - (table.base + extra_C)[:, None]
    return np.maximum(0, room_CK // table.layer[:, None])

  most_CK = capacity(0)
  impossible = np.int64(2**60)
  ends = []
  for extra_C in (table.first, table.last):
    left_CK = capacity(extra_C)
    lost_CE = np.where(left_CK > 0, most_CK - left_CK, impossible)[:, two_K]
    least_C2 = np.argpartition(lost_CE, 1, axis=1)[:, :2]
    ends.append((least_C2, np.take_along_axis(lost_CE, least_C2, axis=1)))
  (at_a, lost_a), (at_b, lost_b) = ends
  pair_C22 = lost_a[:, :, None] + lost_b[:, None, :]
  pair_C22 = np.where(at_a[:, :, None] == at_b[:, None, :], impossible, pair_C22)
  lost_C = pair_C22.min(axis=(1, 2))
  most_C = (most_CK * number_K[None]).sum(axis=1)
  cut_C = (lost_C < impossible) & (most_C - lost_C >= table.num_layers) & (table.num_layers > 1)
  return alone_C | cut_C
