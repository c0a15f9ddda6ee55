"""Which host holds which layers. Imports no JAX."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from neurojax.config import ModelConfig, Span
from neurojax.scaling import count
from neurojax.scaling.count import Ternary, Weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
  """One stage of a plan: a host and the span it holds, with the bytes that takes.

  memory_bytes counts weights and the caches of all sequence places; free_bytes is what the host has.
  """

  host: str
  span: Span
  memory_bytes: int
  free_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
  """What every stage has to hold: the form of weights and caches.

  Attributes:
    ternary: Which matrices are ternary, where `weights` keeps those packed.
  """

  dtype: str
  weights: Weights
  capacity: int
  max_sequences: int
  ternary: Ternary | None = None

  @property
  def form(self) -> dict[str, Any]:
    """How weights are held, as the functions of `count` want it."""
    return {"dtype": self.dtype, "weights": self.weights, "ternary": self.ternary}


def proportional(
  config: ModelConfig, hosts: Sequence[tuple[str, int]], load: Load
) -> tuple[Placement, ...]:
  """Contiguous layers in proportion to free memory, each layer exactly once.

  A host's share is counted after embedding, head and final norm have taken theirs on the first and
  last host. Shares are rounded by largest remainder; then layers move to neighbours until every
  host fits. Hosts that are left without a layer are left out.

  Args:
    hosts: (name, free bytes) in the order of the pipeline.
  Raises: ValueError: the fleet is too small; says by how much.
  """
  if not hosts:
    raise ValueError("no hosts to place the layers on")
  shares = _shares(config, [free for _, free in hosts], load)
  if shares is None:
    raise ValueError(_too_small(config, hosts, load))
  hosts, counts = [hosts[index] for index, _ in shares], [layers for _, layers in shares]
  spans, first = [], 0
  for layers in counts:
    spans.append(
      Span(first_layer=first, last_layer=first + layers - 1, num_layers=config.num_layers)
    )
    first += layers
  return tuple(
    Placement(host=name, span=span, memory_bytes=stage_bytes(config, span, load), free_bytes=free)
    for (name, free), span in zip(hosts, spans, strict=True)
  )


def stage_bytes(config: ModelConfig, span: Span, load: Load) -> int:
  """Weights and all caches of one stage."""
  weights = count.span_bytes(config, span, **load.form)
  cache = count.cache_bytes(config, len(span), capacity=load.capacity, dtype=load.dtype)
  return weights + load.max_sequences * cache


def _shares(config: ModelConfig, free: list[int], load: Load) -> list[tuple[int, int]] | None:
  """(index of the host, its layers) for those that get any; None if the layers do not fit."""
  indices = list(range(len(free)))
  while indices:
    counts = _counts(config, [free[index] for index in indices], load)
    if counts is None:
      return None
    if all(counts):
      return list(zip(indices, counts, strict=True))
    # Without layers a host is no stage; the outer parts move to whoever is first and last then.
    indices.pop(counts.index(0))
  return None


def _counts(config: ModelConfig, free: list[int], load: Load) -> list[int] | None:
  """Layers of each host, some perhaps 0, if all of them hold their part; None if they cannot."""
  per_layer = _layer_bytes(config, load)
  embedding = count.embedding_bytes(config, **load.form)
  head = count.head_bytes(config, **load.form)
  norm = config.model_dim * count.DTYPE_BYTES[load.dtype]
  room = list(free)
  room[0] -= embedding
  room[-1] -= norm + (head if len(free) > 1 or not config.tied_embedding else 0)
  most = [max(0, space // per_layer) for space in room]
  total = config.num_layers
  if sum(most) < total:
    return None
  space = [max(0, r) for r in room]
  exact = [total * s / sum(space) for s in space]
  counts = [min(int(e), m) for e, m in zip(exact, most, strict=True)]
  while sum(counts) < total:
    open_hosts = [i for i in range(len(free)) if counts[i] < most[i]]
    counts[max(open_hosts, key=lambda i: (exact[i] - counts[i], -i))] += 1
  return counts


def _too_small(config: ModelConfig, hosts: Sequence[tuple[str, int]], load: Load) -> str:
  """How much is missing: the least that the largest host needs more for a plan to exist."""
  free = [space for _, space in hosts]
  largest = max(range(len(free)), key=lambda i: free[i])
  whole = Span(first_layer=0, last_layer=config.num_layers - 1, num_layers=config.num_layers)
  low, high = 0, stage_bytes(config, whole, load)
  while low + 1 < high:
    middle = (low + high) // 2
    more = [space + middle * (i == largest) for i, space in enumerate(free)]
    low, high = (low, middle) if _shares(config, more, load) else (middle, high)
  return (
    f"the fleet is too small: {len(free)} hosts have {sum(free):,} bytes free for {config.num_layers} "
    f"layers of {_layer_bytes(config, load):,} bytes each ({load.max_sequences} caches of "
    f"{load.capacity} positions included), embedding and head; {high:,} bytes more on "
    f"{hosts[largest][0]} would do: add memory or a host, shorten the context, allow fewer sequences, "
    "or hold the weights as int8"
  )


def _layer_bytes(config: ModelConfig, load: Load) -> int:
  cache = count.cache_bytes(config, 1, capacity=load.capacity, dtype=load.dtype)
  weights = count.layer_bytes(config, **load.form)
  return weights + load.max_sequences * cache
