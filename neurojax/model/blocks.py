"""Moves the positions of sequences between slots, and between slots and a pool of kept blocks.

A pool is a cache of its own (`neurollm.empty_cache`), whose slots are called places: each holds one block of
positions of one sequence, in every layer. Functions are pure, and cheap when their cache is donated.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from neurojax.model.cache import Cache, ConvState, KVCache, LayerCache


def keep(
  cache: Cache,
  pool: Cache,
  slot: Int[Array, ""],
  start: Int[Array, ""],
  place: Int[Array, ""],
  *,
  length: int,
) -> Cache:
  """Copies the block of `length` positions of a slot from `start` on to a place of the pool.

  The state of a convolution is that of the end of what the slot holds: the block must be its last.
  Returns: The pool.
  """

  def kept(own: LayerCache, others: LayerCache) -> LayerCache:
    if isinstance(own, ConvState):
      assert isinstance(others, ConvState)
      return ConvState(_copy_slot(own.u_LPXM, others.u_LPXM, slot, place))
    assert isinstance(others, KVCache)
    at_S = _places(own, start, length)
    return _each(own, others, lambda source, target: (
      target.at[:, place, :, :length].set(source[:, slot][:, :, at_S])
    ))  # fmt: skip

  return _both(kept, cache, pool)


def restore(
  cache: Cache,
  pool: Cache,
  slot: Int[Array, ""],
  start: Int[Array, ""],
  place: Int[Array, ""],
  *,
  length: int,
) -> Cache:
  """Copies a place of the pool to `length` positions of a slot from `start` on.

  Blocks of a sequence are restored in order.

  Returns: The cache.
  """

  def restored(own: LayerCache, others: LayerCache) -> LayerCache:
    if isinstance(own, ConvState):
      assert isinstance(others, ConvState)
      return ConvState(_copy_slot(others.u_LPXM, own.u_LPXM, place, slot))
    assert isinstance(others, KVCache)
    at_S = _places(own, start, length)
    return _each(own, others, lambda target, source: (
      # Indices with a slice between them put the indexed axis in front.
      target.at[:, slot, :, at_S].set(jnp.moveaxis(source[:, place, :, :length], 2, 0))
    ))  # fmt: skip

  return _both(restored, cache, pool)


def copy(cache: Cache, source: Int[Array, ""], target: Int[Array, ""]) -> Cache:
  """Copies all that a slot holds to another slot."""
  return jax.tree.map(lambda leaf: _copy_slot(leaf, leaf, source, target), cache)


def _copy_slot(
  source: jax.Array, target: jax.Array, at: Int[Array, ""], to: Int[Array, ""]
) -> jax.Array:
  return lax.dynamic_update_index_in_dim(
    target, lax.dynamic_index_in_dim(source, at, axis=1, keepdims=False), to, axis=1
  )


def _places(cache: KVCache, start: jax.Array, count: int) -> jax.Array:
  """Where a cache keeps `count` positions from `start` on."""
  return (start + jnp.arange(count, dtype=jnp.int32)) % cache.capacity


def _each(
  own: KVCache, others: KVCache, one: Callable[[jax.Array, jax.Array], jax.Array]
) -> KVCache:
  """Calls `one` with each array of both caches. Returns a cache of what it gives."""
  changed = {
    field.name: one(getattr(own, field.name), getattr(others, field.name))
    for field in dataclasses.fields(KVCache)
    if field.name != "is_ring" and getattr(own, field.name) is not None
  }
  return KVCache(**changed, is_ring=own.is_ring)


def _both(one: Callable[[LayerCache, LayerCache], LayerCache], cache: Cache, pool: Cache) -> Cache:
  if isinstance(cache, dict):
    assert isinstance(pool, dict)
    return {name: one(cache[name], pool[name]) for name in cache}
  assert not isinstance(pool, dict)
  return one(cache, pool)
