"""What a stage knows of its sequences, on the device, and how it changes without computing anything.

The functions are pure, and programs of their own: `stage.compile` compiles them with a donated state.
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array

from neurojax.model import blocks
from neurojax.model import sample as sampling
from neurojax.model.sample import SlotSettings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StageState:
  """What a stage knows of its sequences, on the device. Programs consume it and give it back.

  Attributes:
    cache: Keys and values, or states of convolutions, of all slots.
    pool: Kept blocks, see `model.blocks`; None: there are no places.
    sampler: Samplers of all slots; None but on the last stage.
    last_P: int32, the token drawn last in each slot; None but on the last stage.
  """

  # Any, because tree maps put shapes, shardings and None in an array's place.
  cache: Any
  pool: Any
  sampler: Any
  last_P: Any


def begin(state: StageState, slot: Array, settings: SlotSettings) -> StageState:
  """Begins a sequence's sampler."""
  return dataclasses.replace(state, sampler=sampling.open_slot(state.sampler, slot, settings))


def observe(state: StageState, slot: Array, tokens_T: Array, count: Array) -> StageState:
  """Tells a sampler of prompt tokens that were not computed here."""
  sampler = sampling.observe(state.sampler, slot, tokens_T, count)
  return dataclasses.replace(state, sampler=sampler)


def keep(state: StageState, slot: Array, start: Array, place: Array, *, length: int) -> StageState:
  """Keeps the block of a slot that begins at position `start`."""
  pool = blocks.keep(state.cache, state.pool, slot, start, place, length=length)
  return dataclasses.replace(state, pool=pool)


def restore(
  state: StageState, slot: Array, start: Array, place: Array, *, length: int
) -> StageState:
  """Copies a kept block to the positions of a slot from `start` on."""
  cache = blocks.restore(state.cache, state.pool, slot, start, place, length=length)
  return dataclasses.replace(state, cache=cache)


def copy(state: StageState, source: Array, target: Array) -> StageState:
  """Copies all positions of a slot to another one."""
  return dataclasses.replace(state, cache=blocks.copy(state.cache, source, target))
