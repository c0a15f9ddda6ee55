"""A placement problem as tables of numbers: the seconds of each place for every number of layers."""

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from neurojax import count, forms
from neurojax.config import ModelConfig, Span
from neurojax.count import wording
from neurojax.count.serving import Load, layer_bytes, stage_bytes, stage_working
from neurojax.count.working import DeviceKind
from neurojax.plan import predict
from neurojax.plan.fleet import MOST_BYTES, Fleet, Place

MIDDLE, FIRST, LAST, WHOLE = range(4)
"""Roles of a stage: what it holds beside layers. Bit 1 is the embedding, bit 2 the final norm and the head."""

MOST_PLACES = 4096
"""Places that are planned together at most: tables from place to place grow with the square."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """A model to place on a fleet, with the time of every possible stage and hop. Made by `problem`.

  Attributes:
    context: Positions in the caches at the decode step that is timed.
    batch: Sequences that the step computes together.
    pins: Number of layers that a host or place has to hold, by label, those of the fleet included.
    step_PRL: Seconds of a stage by place, role and number of layers; infinite where memory or a pin
      forbids it.
    latency_PP: Seconds of latency of a hop from place to place.
    transfer_PP: Seconds that it occupies the link.
    enter_P: Seconds from the coordinator to a first stage.
    leave_P: Seconds from a last stage to the coordinator.
    end_transfer_P: Seconds that either of these occupies the link.
    in_flight: Batches in flight in each pipeline, for throughput; None: as many as help.
  """

  config: ModelConfig
  fleet: Fleet
  load: Load
  context: int
  batch: int
  pins: Mapping[str, int]
  places: tuple[Place, ...]
  step_PRL: np.ndarray
  latency_PP: np.ndarray
  transfer_PP: np.ndarray
  enter_P: np.ndarray
  leave_P: np.ndarray
  end_transfer_P: np.ndarray
  in_flight: int | None = None

  @property
  def num_layers(self) -> int:
    return self.config.num_layers

  @functools.cached_property
  def hosts(self) -> list[list[int]]:
    """Numbers of the places of each host."""
    found: dict[str, list[int]] = {}
    for index, place in enumerate(self.places):
      found.setdefault(place.host.label, []).append(index)
    return list(found.values())

  @functools.cached_property
  def host_P(self) -> np.ndarray:
    """Number of the host of each place."""
    host_P = np.zeros(len(self.places), int)
    for number, places in enumerate(self.hosts):
      host_P[places] = number
    return host_P

  @functools.cached_property
  def hop_PP(self) -> np.ndarray:
    return self.latency_PP + self.transfer_PP

  def host_pin(self, number: int) -> int | None:
    """Number of layers that a host of several places has to hold together; None: not pinned."""
    places = self.hosts[number]
    label = self.places[places[0]].host.label
    return self.pins.get(label) if len(places) > 1 else None

  def role_bytes(self, place: int) -> tuple[int, np.ndarray]:
    """Bytes of one layer on a place, and bytes that each role adds to a stage."""
    return self._role_bytes[self.places[place].device.kind]

  @functools.cached_property
  def _role_bytes(self) -> dict[str, tuple[int, np.ndarray]]:
    kinds = {place.device.kind for place in self.places}
    return {kind: role_bytes(self.config, self.load, kind) for kind in kinds}

  def restricted(self, places: list[int]) -> "Problem":
    """The same problem with some of the places."""
    labels = {self.places[p].label for p in places} | {self.places[p].host.label for p in places}
    return dataclasses.replace(
      self,
      pins={label: layers for label, layers in self.pins.items() if label in labels},
      places=tuple(self.places[p] for p in places),
      step_PRL=self.step_PRL[places],
      latency_PP=self.latency_PP[np.ix_(places, places)],
      transfer_PP=self.transfer_PP[np.ix_(places, places)],
      enter_P=self.enter_P[places],
      leave_P=self.leave_P[places],
      end_transfer_P=self.end_transfer_P[places],
    )

  def step_s(self, place: int, first: int, end: int) -> float:
    """Seconds of a stage of the layers from `first` to before `end`."""
    role = (first == 0) * FIRST + (end == self.num_layers) * LAST
    return float(self.step_PRL[place, role, end - first])

  def span(self, first: int, layers: int) -> Span:
    return Span(first_layer=first, last_layer=first + layers - 1, num_layers=self.num_layers)


def problem(
  config: ModelConfig,
  fleet: Fleet,
  load: Load,
  *,
  context: int,
  batch: int = 1,
  pins: Mapping[str, int] | None = None,
  in_flight: int | None = None,
) -> Problem:
  """Compute the tables of a placement problem. Arguments as for `best.best`.

  Raises: ValueError: an unknown speed or memory, or a pin that cannot be kept, with the reason.
  """
  if in_flight is not None and in_flight < 1:
    raise ValueError(f"in_flight = {in_flight}: at least 1 batch, or None for as many as help")
  if batch > load.sequences:
    raise ValueError(
      f"batch = {batch}: the caches of sequences = {load.sequences} are planned; "
      "plan more or make the batch smaller"
    )
  if context > load.capacity:
    raise ValueError(
      f"context = {context}: caches of capacity = {load.capacity} positions are planned"
    )
  takes = stage_bytes(config, Span.whole(config), load)
  if takes > MOST_BYTES * 1000:
    raise ValueError(
      f"the model takes {takes:,} bytes with {load.sequences} caches of {load.capacity} positions: "
      "more than any fleet that can be planned for has; make it, or these, smaller"
    )
  places = fleet.places()
  if len(places) > MOST_PLACES:
    raise ValueError(
      f"{len(places)} places: at most {MOST_PLACES} are planned together; plan for a part of the fleet"
    )
  pins = _pins(config, fleet, places, pins or {})
  step_PRL = _steps(config, load, places, context, batch)
  _fix(step_PRL, places, pins, load, config)
  latency_HH, transfer_HH, labels = _links(fleet, predict.wire_bytes(config, load, batch=batch))
  host_P = np.array([labels[place.host.label] for place in places])
  token = predict.TOKEN_BYTES * batch
  elsewhere = fleet.link(None, None)
  ends = {
    name: fleet.link(fleet.coordinator, name)
    for name in labels
    if fleet.links or name == fleet.coordinator
  }
  ends_P = [ends.get(place.host.label, elsewhere) for place in places]
  end_transfer_P = np.array([token / link.bytes_per_s for link in ends_P])
  enter_P = np.array([link.latency_s for link in ends_P]) + end_transfer_P
  return Problem(
    config=config,
    fleet=fleet,
    load=load,
    context=context,
    batch=batch,
    pins=pins,
    places=places,
    step_PRL=step_PRL,
    latency_PP=latency_HH[np.ix_(host_P, host_P)],
    transfer_PP=transfer_HH[np.ix_(host_P, host_P)],
    enter_P=enter_P,
    leave_P=enter_P.copy(),
    end_transfer_P=end_transfer_P,
    in_flight=in_flight,
  )


def role_bytes(
  config: ModelConfig, load: Load, kind: DeviceKind = "cuda"
) -> tuple[int, np.ndarray]:
  """Bytes of one layer, and bytes that each role adds to a stage, on a kind of device."""
  layer = layer_bytes(config, load, kind)
  whole = stage_bytes(config, Span.whole(config), load, kind) - config.num_layers * layer
  embedding = count.embedding_bytes(config, **load.form)
  head = count.head_bytes(config, **load.form)
  norm = config.model_dim * forms.DTYPE_BYTES[load.dtype]
  working = stage_working(config, load, kind)
  base, last = working.base, working.base + working.last
  return layer, np.array([base, base + embedding, last + norm + head, whole])


def _steps(
  config: ModelConfig, load: Load, places: tuple[Place, ...], context: int, batch: int
) -> np.ndarray:
  total = config.num_layers
  n_L = np.arange(total + 1)
  work = predict.work(config, load, batch=batch, context=context)
  sizes: dict[str, np.ndarray] = {}
  for kind in {place.device.kind for place in places}:
    layer, extra_R = role_bytes(config, load, kind)
    sizes[kind] = extra_R[:, None] + layer * n_L
  allowed_RL = np.ones((4, total + 1), bool)
  allowed_RL[1:, 0] = False
  allowed_RL[WHOLE, :total] = False
  allowed_RL[:WHOLE, total] = False
  # A middle stage leaves at least one layer to either end, an end stage one to the other end.
  allowed_RL[MIDDLE, max(1, total - 1) :] = False
  allowed_RL[MIDDLE, 0] = True
  step_PRL = np.full((len(places), 4, total + 1), np.inf)
  seen: dict[int, np.ndarray] = {}
  for index, place in enumerate(places):
    step_RL = seen.get(id(place.device))
    if step_RL is None:
      step_RL = np.empty((4, total + 1))
      for role in range(4):
        try:
          read_s, compute_s, overhead_s = work.cost(
            place.device, load, n_L, bool(role & FIRST), bool(role & LAST)
          )
        except ValueError as error:
          raise ValueError(f"{place.label}: {error}") from error
        step_RL[role] = np.maximum(read_s, compute_s) + overhead_s
      step_RL[MIDDLE, 0] = 0.0
      seen[id(place.device)] = step_RL
    fits_RL = allowed_RL & (sizes[place.device.kind] <= place.free_bytes)
    fits_RL[MIDDLE, 0] = True
    step_PRL[index][fits_RL] = step_RL[fits_RL]
  return step_PRL


def _pins(
  config: ModelConfig, fleet: Fleet, places: tuple[Place, ...], given: Mapping[str, int]
) -> dict[str, int]:
  """All pins by label. Raises: ValueError: a pin that contradicts the model, the fleet or the others."""
  pins = {host.label: host.layers for host in fleet.hosts if host.layers is not None} | dict(given)
  known = {place.label for place in places} | {place.host.label for place in places}
  for label, layers in pins.items():
    if label not in known:
      raise ValueError(f"pin {label} = {layers}: no such host; there are {_some(sorted(known))}")
    if not 0 <= layers <= config.num_layers:
      raise ValueError(
        f"pin {label} = {layers}: the model has {config.num_layers} layers; 0 keeps the host out"
      )
  total = sum(pins.values())
  if total > config.num_layers:
    raise ValueError(
      f"the pins hold {total} layers together, {total - config.num_layers} more than the model's "
      f"{config.num_layers}: {_some([f'{label} = {n}' for label, n in pins.items()])}"
    )
  return pins


def _fix(
  step_PRL: np.ndarray,
  places: tuple[Place, ...],
  pins: Mapping[str, int],
  load: Load,
  config: ModelConfig,
) -> None:
  """Forbid, in place, all stages that contradict the pins of single places.

  A pin of a host with several places binds their sum, which the solvers see to."""
  several = {place.host.label for place in places if place.label != place.host.label}
  layers_of = {
    kind: layer_bytes(config, load, kind) for kind in {place.device.kind for place in places}
  }
  for label in sorted(several & set(pins)):
    inside = [index for index, place in enumerate(places) if place.host.label == label]
    most = sum(int(np.isfinite(step_PRL[i]).any(axis=0).nonzero()[0].max()) for i in inside)
    if most < pins[label]:
      free = sum(places[index].free_bytes for index in inside)
      raise ValueError(
        f"pin {label} = {pins[label]}: {pins[label]} layers take "
        f"{pins[label] * min(layers_of.values()):,} bytes or more, and "
        f"{free:,} are free on its {wording.counted(len(inside), 'place')}; at most {most} fit"
      )
  for index, place in enumerate(places):
    layers = pins.get(place.label)
    if place.host.label in several and pins.get(place.host.label) == 0:
      layers = 0
    if layers is None:
      continue
    layer = layers_of[place.device.kind]
    kept_R = step_PRL[index, :, layers].copy()
    if not np.isfinite(kept_R).any():
      most = max(0, int(np.isfinite(step_PRL[index]).any(axis=0).nonzero()[0].max()))
      raise ValueError(
        f"pin {place.label} = {layers}: {layers} layers take {layers * layer:,} bytes, "
        f"{layers * layer - place.free_bytes:,} more than its {place.free_bytes:,}; at most {most} fit"
        if layers * layer > place.free_bytes
        else f"pin {place.label} = {layers}: with all layers it also needs embedding and head, which "
        f"do not fit into its {place.free_bytes:,} bytes; at most {most} layers fit"
      )
    step_PRL[index] = np.inf
    step_PRL[index, :, layers] = kept_R


def _links(fleet: Fleet, size_bytes: int) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
  """Seconds of latency and transfer between hosts, and the number of each host by label."""
  labels = {host.label: index for index, host in enumerate(fleet.hosts)}
  number = len(labels)
  latency_HH = np.full((number, number), fleet.latency_s)
  transfer_HH = np.full((number, number), size_bytes / fleet.bytes_per_s)
  np.fill_diagonal(latency_HH, fleet.local_latency_s)
  np.fill_diagonal(transfer_HH, size_bytes / fleet.local_bytes_per_s)
  for link in fleet.links:
    a, b = (labels[end] for end in link.hosts)
    latency_HH[a, b] = latency_HH[b, a] = link.latency_s
    transfer_HH[a, b] = transfer_HH[b, a] = size_bytes / link.bytes_per_s
  return latency_HH, transfer_HH, labels


def _some(names: list[str]) -> str:
  return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
