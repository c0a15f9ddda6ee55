"""Runs the layers of a model: loops over stacked parameters, with a cache or without one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Int

from neurojax.model.cache import LayerCache
from neurojax.model.order import Rounds

ScanBody = Callable[[jax.Array, tuple[jax.Array, nnx.State]], tuple[jax.Array, None]]
"""(activations, (index of a layer in its stack, its parameters)) -> (activations, None)."""


def unknown_count(count: int, start: Int[Array, ""]) -> Int[Array, ""]:
  """Returns `count`, computed so that XLA cannot know it.

  XLA dissolves a loop of one round into the program around it, and then rounds otherwise: a stage of
  one layer would not give the bits of the whole model. A count that depends on an input keeps the loop.

  Args:
    start: Any number of the program's inputs that is not negative.
  """
  return jnp.minimum(start + count, count)


def loop_runs(
  each: Rounds,
  body: Callable[[str], Any],
  start: Int[Array, ""],
  x_BTD: jax.Array,
  caches: dict[str, LayerCache],
) -> tuple[jax.Array, dict[str, LayerCache]]:
  """Runs layers with caches: each run is a loop of its own, whose count XLA cannot know.

  Args:
    body: The loop body of a stack by its name: (index, (activations, cache)) -> the same pair.
  """

  def once(turn: jax.Array | int, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
    x_BTD, caches = carry[0], dict(carry[1])
    for run in each.runs:
      first, count = run.first + turn * run.stride, unknown_count(run.count, start)
      carried = (x_BTD, caches[run.stack])
      x_BTD, caches[run.stack] = lax.fori_loop(first, first + count, body(run.stack), carried)
    return x_BTD, caches

  if each.count == 1:
    return once(0, (x_BTD, caches))
  return lax.fori_loop(0, each.count, once, (x_BTD, caches))


def scan_runs(
  each: Rounds,
  body: Callable[[str], ScanBody],
  states: dict[str, nnx.State],
  x_BTD: jax.Array,
  *,
  unroll: int = 1,
) -> jax.Array:
  """Runs layers without a cache, differentiably: one scan for each run.

  Args:
    body: The scan body of a stack by its name.
    states: Stacked parameters by the name of their stack.
    unroll: Layers that the compiler sees one after the other in each round of a scan.
  """
  for turn in range(each.count):
    for run in each.runs:
      first = run.first + turn * run.stride
      stacked, places = states[run.stack], slice(first, first + run.count)
      if run.count != jax.tree.leaves(stacked)[0].shape[0]:
        stacked = jax.tree.map(lambda leaf, places=places: leaf[places], stacked)
      index_L = jnp.arange(first, first + run.count, dtype=jnp.int32)
      x_BTD, _ = lax.scan(body(run.stack), x_BTD, (index_L, stacked), unroll=min(unroll, run.count))
  return x_BTD
