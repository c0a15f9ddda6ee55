"""Sizes a model for a fleet with more or less memory: the points of a plot."""

import dataclasses
from typing import Any

from neurojax.plan.fleet import Device, Fleet
from neurojax.scaling.purpose import Purpose
from neurojax.scaling.size import size

FACTORS = tuple(2 ** (step / 2) for step in range(-8, 9))
"""Factors of each place's free memory, from a sixteenth to sixteen."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
  """One size of a fleet and its model.

  Attributes:
    memory_bytes: Free bytes on all places.
    parameters: Parameters of the largest model that fits.
    loss: Its predicted loss in bfloat16, in nats per token.
    tokens_per_s: Its predicted speed of decoding or training; None if unknown.
  """

  memory_bytes: int
  parameters: int
  loss: float
  tokens_per_s: float | None


def curve(fleet: Fleet, purpose: Purpose, **options: Any) -> list[Point]:
  """A point for each of FACTORS at which a model fits. Options are those of `size`."""
  points = []
  for factor in FACTORS:
    other = scaled(fleet, factor)
    try:
      found = size(other, purpose, **options, time_limit_s=0.5)
    except ValueError:
      # Too small for any candidate. Other errors were raised at the fleet's own size.
      continue
    speed = found.speed
    points.append(
      Point(
        memory_bytes=sum(place.free_bytes for place in other.places()),
        parameters=found.parameters,
        loss=found.losses.bf16.value,
        tokens_per_s=speed.decode_tokens_per_s or speed.train_tokens_per_s,
      )
    )
  return points


def scaled(fleet: Fleet, factor: float) -> Fleet:
  """The same fleet with `factor` times the free memory on every place."""

  def device(given: Device) -> Device:
    memory = given.used_bytes + max(1, int(given.free_bytes * factor))
    return dataclasses.replace(given, memory_bytes=memory)

  return dataclasses.replace(
    fleet,
    hosts=tuple(
      dataclasses.replace(
        host,
        devices=tuple(device(given) for given in host.devices),
        memory_bytes=host.memory_bytes and max(1, int(host.memory_bytes * factor)),
      )
      for host in fleet.hosts
    ),
  )
