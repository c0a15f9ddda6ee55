"""Places layers in proportion to free memory, where nothing else is known of the hosts."""

import heapq
from collections.abc import Mapping, Sequence

from neurojax import count, forms
from neurojax.config import ModelConfig, Span
from neurojax.count.serving import Load, layer_bytes, stage_bytes, stage_working
from neurojax.count.working import DeviceKind
from neurojax.plan.plan import Placement


def proportional(
  config: ModelConfig,
  hosts: Sequence[tuple[str, int]],
  load: Load,
  kinds: Sequence[DeviceKind] | None = None,
) -> tuple[Placement, ...]:
  """Give each host contiguous layers in proportion to its free memory.

  Embedding, head and final norm are taken off the first and last host's memory beforehand. Shares are rounded by
  largest remainder, and no host gets more layers than it has room for. Hosts without a layer are left out.

  Args:
    hosts: (name, free bytes) in the order of the pipeline.
    load: What every stage has to hold.
    kinds: Kinds of the hosts' devices, for working memory; GPUs if absent.
  Raises: ValueError: the fleet is too small; says by how much.
  """
  if not hosts:
    raise ValueError("no hosts to place the layers on")
  kinds = ["cuda"] * len(hosts) if kinds is None else kinds
  shares = _shares(config, [free for _, free in hosts], load, kinds)
  if shares is None:
    raise ValueError(_too_small(config, hosts, load, kinds))
  kinds = [kinds[index] for index, _ in shares]
  hosts, counts = [hosts[index] for index, _ in shares], [layers for _, layers in shares]
  spans, first = [], 0
  for layers in counts:
    spans.append(
      Span(first_layer=first, last_layer=first + layers - 1, num_layers=config.num_layers)
    )
    first += layers
  return tuple(
    Placement(
      host=name, span=span, memory_bytes=stage_bytes(config, span, load, kind), free_bytes=free
    )
    for (name, free), span, kind in zip(hosts, spans, kinds, strict=True)
  )


def as_planned(
  config: ModelConfig,
  spans: Mapping[str, Span],
  free: Mapping[str, int],
  load: Load,
  kinds: Mapping[str, DeviceKind] | None = None,
) -> tuple[Placement, ...]:
  """The placements of a plan, checked against the memory that each host has free now.

  Args:
    spans: Layers of each host by name.
    free: Free bytes of each host.
    load: What every stage has to hold.
    kinds: Kinds of the hosts' devices; GPUs if absent.
  Raises: ValueError: a host has too little, and by how much.
  """
  placements = []
  for host, span in spans.items():
    needed = stage_bytes(config, span, load, kinds[host] if kinds else "cuda")
    if needed > free[host]:
      raise ValueError(
        f"the plan gives {host} layers {span}: they take {needed:,} bytes with {load.sequences} "
        f"caches of {load.capacity} positions ({load.weights}, {load.dtype}), and {free[host]:,} are "
        "free there: plan for the same weights, context and sequences, with what is free now"
      )
    placements.append(Placement(host=host, span=span, memory_bytes=needed, free_bytes=free[host]))
  return tuple(placements)


def _shares(
  config: ModelConfig, free: list[int], load: Load, kinds: Sequence[DeviceKind]
) -> list[tuple[int, int]] | None:
  """(number of the host, its layers) of the hosts that get any; None if the layers do not fit."""
  indices = list(range(len(free)))
  while indices:
    counts = _counts(
      config, [free[index] for index in indices], load, [kinds[index] for index in indices]
    )
    if counts is None:
      return None
    if all(counts):
      return list(zip(indices, counts, strict=True))
    # A host without layers is no stage: embedding and head move to the hosts that are then first and last.
    indices.pop(counts.index(0))
  return None


def _counts(
  config: ModelConfig, free: list[int], load: Load, kinds: Sequence[DeviceKind]
) -> list[int] | None:
  """Layers of each host, which may be 0; None if the layers do not fit."""
  if len(free) == 1:
    # Exactly what the host itself would count; below, every layer counts like the largest.
    whole = Span(first_layer=0, last_layer=config.num_layers - 1, num_layers=config.num_layers)
    fits = stage_bytes(config, whole, load, kinds[0]) <= free[0]
    return [config.num_layers] if fits else None
  layers = {kind: layer_bytes(config, load, kind) for kind in set(kinds)}
  working = {kind: stage_working(config, load, kind) for kind in set(kinds)}
  embedding = count.embedding_bytes(config, **load.form)
  head = count.head_bytes(config, **load.form)
  norm = config.model_dim * forms.DTYPE_BYTES[load.dtype]
  room = [space - working[kind].base for space, kind in zip(free, kinds, strict=True)]
  room[0] -= embedding
  room[-1] -= working[kinds[-1]].last
  room[-1] -= norm + (head if len(free) > 1 or not config.tied_embedding else 0)
  most = [max(0, space // layers[kind]) for space, kind in zip(room, kinds, strict=True)]
  total = config.num_layers
  if sum(most) < total:
    return None
  space: list[float] = [max(0, r) for r in room]
  if len(layers) > 1:
    # Kinds of device differ in the bytes of a layer: in proportion to the layers that each has room for.
    space = [s / layers[kind] for s, kind in zip(space, kinds, strict=True)]
  whole = sum(space)
  exact = [total * s / whole for s in space]
  counts = [min(int(e), m) for e, m in zip(exact, most, strict=True)]
  # Largest remainder first; of equal ones that of the first host.
  open_hosts = [(counts[i] - exact[i], i) for i in range(len(free)) if counts[i] < most[i]]
  heapq.heapify(open_hosts)
  for _ in range(total - sum(counts)):
    _, i = open_hosts[0]
    counts[i] += 1
    if counts[i] < most[i]:
      heapq.heapreplace(open_hosts, (counts[i] - exact[i], i))
    else:
      heapq.heappop(open_hosts)
  return counts


def _too_small(
  config: ModelConfig, hosts: Sequence[tuple[str, int]], load: Load, kinds: Sequence[DeviceKind]
) -> str:
  """Words for what is missing: the least memory more on the largest host with which the layers fit."""
  free = [space for _, space in hosts]
  largest = max(range(len(free)), key=lambda i: free[i])
  whole = Span(first_layer=0, last_layer=config.num_layers - 1, num_layers=config.num_layers)
  low, high = 0, stage_bytes(config, whole, load, kinds[largest])
  while low + 1 < high:
    middle = (low + high) // 2
    more = [space + middle * (i == largest) for i, space in enumerate(free)]
    low, high = (low, middle) if _shares(config, more, load, kinds) else (middle, high)
  base = stage_working(config, load, kinds[largest]).base
  work = f", {base:,} for the working memory of each stage" if base else ""
  return (
    f"the fleet is too small: {len(free)} hosts have {sum(free):,} bytes free for {config.num_layers} "
    f"layers of {layer_bytes(config, load, kinds[largest]):,} bytes each ({load.sequences} caches of "
    f"{load.capacity} positions included), embedding and head{work}; {high:,} bytes more on "
    f"{hosts[largest][0]} would do: add memory or a host, shorten the context, allow fewer sequences, "
    "or hold the weights as int8"
  )
