"""Which host holds which layers. Imports no JAX."""

import dataclasses
from collections.abc import Sequence

from neurojax.config import ModelConfig, Span
from neurojax.scaling import count
from neurojax.scaling.count import Weights


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
  """What every stage has to hold: the form of weights and caches."""

  dtype: str
  weights: Weights
  capacity: int
  max_sequences: int


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
  hosts = list(hosts)
  while True:
    counts = _shares(config, [free for _, free in hosts], load)
    if all(counts):
      break
    # Without layers a host is no stage; the outer parts move to whoever is first and last then.
    hosts.pop(counts.index(0))
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
  weights = count.span_bytes(config, span, dtype=load.dtype, weights=load.weights)
  cache = count.cache_bytes(config, len(span), capacity=load.capacity, dtype=load.dtype)
  return weights + load.max_sequences * cache


def _shares(config: ModelConfig, free: list[int], load: Load) -> list[int]:
  per_layer = count.layer_bytes(config, dtype=load.dtype, weights=load.weights)
  per_layer += load.max_sequences * count.cache_bytes(
    config, 1, capacity=load.capacity, dtype=load.dtype
  )
  table = count.embedding_bytes(config, dtype=load.dtype, weights=load.weights)
  norm = config.model_dim * count.DTYPE_BYTES[load.dtype]
  room = list(free)
  room[0] -= table
  room[-1] -= norm + (table if len(free) > 1 or not config.tied_embedding else 0)
  most = [max(0, space // per_layer) for space in room]
  total = config.num_layers
  if sum(most) < total:
    missing = (total - sum(most)) * per_layer
    raise ValueError(
      f"the fleet is too small: {sum(free):,} bytes on {len(free)} hosts hold {sum(most)} of {total} layers "
      f"(each {per_layer:,} bytes with {load.max_sequences} caches of {load.capacity} positions, beside "
      f"embedding and head of {table:,}); about {missing:,} bytes are missing: add memory or a host, "
      "shorten the context, allow fewer sequences, or hold the weights as int8"
    )
  space = [max(0, r) for r in room]
  exact = [total * s / sum(space) for s in space]
  counts = [min(int(e), m) for e, m in zip(exact, most, strict=True)]
  while sum(counts) < total:
    open_hosts = [i for i in range(len(free)) if counts[i] < most[i]]
    counts[max(open_hosts, key=lambda i: (exact[i] - counts[i], -i))] += 1
  return counts
