"""Checks whether a model fits a fleet; if it does not, says how much is missing and what would fit."""

import numpy as np

from neurojax import forms
from neurojax.count.serving import Load
from neurojax.count.wording import counted
from neurojax.plan.problem import FIRST, LAST, MIDDLE, WHOLE, Problem, role_bytes


def most_layers(step_PRL: np.ndarray, interval_s: float) -> int:
  """The most layers that the places hold together if no stage may take longer than `interval_s`.

  Links are left aside. Pins of single places are kept; a pinned place that cannot keep its pin counts as
  without layers.
  """
  width = step_PRL.shape[2]
  within_PRL = np.isfinite(step_PRL) & (step_PRL <= interval_s)
  if within_PRL[:, WHOLE, -1].any():
    return width - 1
  most_PR = np.where(
    within_PRL.any(axis=2), width - 1 - within_PRL[:, :, ::-1].argmax(axis=2), -(width**2)
  )
  middle_P = np.maximum(most_PR[:, MIDDLE], 0)
  first_P, last_P = most_PR[:, FIRST] - middle_P, most_PR[:, LAST] - middle_P
  if len(first_P) < 2:
    return 0
  return max(0, min(int(middle_P.sum()) + _best_ends(first_P, last_P), width - 1))


def check(given: Problem) -> None:
  """Check that the layers fit.

  Raises: ValueError: they do not; the message says by how much, and what would fit.
  """
  pinned = sum(given.pins.values())
  if pinned < given.num_layers and all(
    place.label in given.pins or place.host.label in given.pins for place in given.places
  ):
    raise ValueError(
      f"every host is pinned, and the pins hold {pinned} of {given.num_layers} layers: "
      f"{given.num_layers - pinned} too few; unpin a host or raise a pin"
    )
  if most_layers(given.step_PRL, np.inf) >= given.num_layers:
    return
  load = given.load
  free = np.array([place.free_bytes for place in given.places])
  pins = {
    p: given.pins[place.label] for p, place in enumerate(given.places) if place.label in given.pins
  }
  most = _most(given, load, free, pins)
  largest = max((p for p in range(len(free)) if p not in pins), key=lambda p: free[p], default=None)
  fits = f"{most} of {given.num_layers} layers fit"
  if largest is None:
    raise ValueError(
      f"every place is pinned, but with embedding and head only {most} of {given.num_layers} layers fit: "
      "move the pins of the first and last host"
    )
  layer, extra_R = given.role_bytes(largest)
  low, high = 0, int(layer * given.num_layers + extra_R[WHOLE])
  while high - low > 1:
    middle = (low + high) // 2
    more = free.copy()
    more[largest] += middle
    enough = _most(given, load, more, pins) >= given.num_layers
    low, high = (low, middle) if enough else (middle, high)
  working = int(extra_R[MIDDLE])
  each = f", {working:,} for the working memory of each stage" if working else ""
  pinned = f", {sum(pins.values())} of them pinned to {counted(len(pins), 'place')}" if pins else ""
  raise ValueError(
    f"the fleet is too small: {int(free.sum()):,} bytes are free on {counted(len(free), 'place')} for "
    f"{given.num_layers} layers of {layer:,} bytes each ({load.sequences} caches of {load.capacity} "
    f"positions included){pinned}, {int(extra_R[FIRST] - working):,} for the embedding and "
    f"{int(extra_R[LAST] - working):,} for norm and head{each}; {fits}. {high:,} bytes more on {given.places[largest].label} would do; "
    + _smaller(given, free, pins)
  )


def _smaller(given: Problem, free: np.ndarray, pins: dict[int, int]) -> str:
  """The nearest contexts, sequences and weights that fit the memory there is, as words."""
  load, total = given.load, given.num_layers
  found = []

  def fits(**changes: int) -> bool:
    return _most(given, load.serve(**changes), free, pins) >= total

  if fits(context=forms.KEY_BLOCK):
    low, high = 1, -(-load.capacity // forms.KEY_BLOCK)
    while high - low > 1:
      middle = (low + high) // 2
      low, high = (middle, high) if fits(context=middle * forms.KEY_BLOCK) else (low, middle)
    found.append(f"a context of {low * forms.KEY_BLOCK}")
  if load.sequences > 1 and fits(sequences=1):
    low, high = 1, load.sequences
    while high - low > 1:
      middle = (low + high) // 2
      low, high = (middle, high) if fits(sequences=middle) else (low, middle)
    found.append(f"{low} sequences at once")
  if load.weights == "dense":
    held = load.serve(weights="int8")
    if _most(given, held, free, pins) >= total:
      found.append("weights held as int8")
  if not found:
    return "no shorter context and no fewer sequences would fit: add memory or a host"
  return f"without more memory these fit: {', or '.join(found)}"


def _most(given: Problem, load: Load, free: np.ndarray, pins: dict[int, int]) -> int:
  """The most layers that the places hold together, by bytes alone; see `most_layers`."""
  total = given.num_layers
  sizes = {
    kind: role_bytes(given.config, load, kind) for kind in {p.device.kind for p in given.places}
  }
  layer_P = np.array([sizes[place.device.kind][0] for place in given.places])
  extra_PR = np.stack([sizes[place.device.kind][1] for place in given.places])
  most_PR = np.floor_divide(free[:, None] - extra_PR, layer_P[:, None])
  if any(most_PR[p, WHOLE] >= total for p in range(len(free)) if pins.get(p, total) == total):
    return total
  for p, layers in pins.items():
    most_PR[p] = np.where(most_PR[p] >= layers, layers, 0)
  middle_P = np.maximum(most_PR[:, MIDDLE], 0)
  none = -(total**2) - 1
  first_P = np.where(most_PR[:, FIRST] > 0, most_PR[:, FIRST] - middle_P, none)
  last_P = np.where(most_PR[:, LAST] > 0, most_PR[:, LAST] - middle_P, none)
  # A first and a last stage have a layer each.
  if len(free) < 2 or total < 2:
    return int(np.clip(most_PR[:, WHOLE].max(), 0, total))
  return int(np.clip(middle_P.sum() + _best_ends(first_P, last_P), 0, total))


def _best_ends(first_P: np.ndarray, last_P: np.ndarray) -> int:
  """The greatest sum of an entry of each array, at two different places."""
  a, b = int(first_P.argmax()), int(last_P.argmax())
  if a != b:
    return int(first_P[a] + last_P[b])
  return int(max(np.delete(first_P, a).max() + last_P[b], first_P[a] + np.delete(last_P, b).max()))
