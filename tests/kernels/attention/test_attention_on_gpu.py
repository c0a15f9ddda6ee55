"""Attention over long caches and whole prompts on a GPU, against the reference there."""

import jax
import jax.numpy as jnp
import pytest

from neurojax.kernels.attention import api
from tests.kernels import hopper

pytestmark = hopper.needed

N, K, H, LAYERS, CAPACITY = 32, 8, 128, 2, 2304


def normal(seed: int, *shape: int, dtype=jnp.bfloat16) -> jax.Array:
  return jax.random.normal(jax.random.key(seed), shape, dtype)


def close(out: jax.Array, wanted: jax.Array, rtol: float) -> None:
  difference = jnp.abs(out.astype(jnp.float32) - wanted.astype(jnp.float32)).max()
  assert float(difference / jnp.abs(wanted.astype(jnp.float32)).max()) < rtol


@pytest.mark.parametrize("batch", [1, 3, 16, 64])
def test_a_step_over_ragged_lengths(batch: int):
  qkv = normal(0, batch, (N + 2 * K) * H, dtype=jnp.float32)
  keys, values = (normal(seed, LAYERS, batch, K, CAPACITY, H) for seed in (1, 2))
  position = jax.random.randint(jax.random.key(3), (batch,), 0, CAPACITY).at[0].set(CAPACITY - 1)
  norms = (1 + normal(4, H, dtype=jnp.float32) / 4, 1 + normal(5, H, dtype=jnp.float32) / 4)

  def step(implementation):
    def run(qkv, keys, values):
      turns = api.rotation(position, H, base=1e6, style="half")
      return api.decode(
        qkv, keys, values, jnp.int32(1), position,
        rotation_B2H=turns, norms=norms, implementation=implementation,
      )  # fmt: skip

    return jax.jit(run)(qkv, keys, values)

  out, new_keys, new_values = step("triton")
  wanted, wanted_keys, wanted_values = step("reference")
  # Weights of the softmax pass as bfloat16.
  close(out, wanted, 1e-2)
  close(new_keys, wanted_keys, 1e-2)
  close(new_values, wanted_values, 1e-2)
  assert (new_keys[0] == keys[0]).all()


@pytest.mark.parametrize(("length", "start"), [(17, 0), (128, 1000), (512, 1700)])
def test_a_chunk_over_the_cache(length: int, start: int):
  q = normal(0, 2, length, N, H)
  keys, values = (normal(seed, LAYERS, 2, K, CAPACITY, H) for seed in (1, 2))
  starts = jnp.asarray([start, start // 2], jnp.int32)
  out, wanted = (
    jax.jit(
      lambda *args, name=name: api.attend_cache(*args, jnp.int32(1), starts, implementation=name)
    )(q, keys, values)
    for name in ("triton", "reference")
  )
  close(out, wanted, 1.5e-2)


@pytest.mark.parametrize("length", [1, 100, 2048])
def test_a_whole_prompt(length: int):
  q, k, v = normal(0, 1, length, N, H), normal(1, 1, length, K, H), normal(2, 1, length, K, H)
  out, wanted = (
    jax.jit(lambda *args, name=name: api.attend(*args, implementation=name))(q, k, v)
    for name in ("cudnn", "reference")
  )
  close(out, wanted, 1.5e-2)


WIDTHS = (1, 8, 16, 64)
SLOTS = 80


@pytest.mark.parametrize("batch", WIDTHS)
def test_a_step_has_the_same_bits_beside_any_rows_and_in_any_slot(batch: int):
  """Rows of the widest step, in slots of a shuffled order, against fewer in slots of another."""
  most = max(WIDTHS)
  qkv = normal(0, most, (N + 2 * K) * H, dtype=jnp.float32)
  keys, values = (normal(seed, LAYERS, SLOTS, K, CAPACITY, H) for seed in (1, 2))
  position = jax.random.randint(jax.random.key(3), (most,), 0, CAPACITY)
  slot, other = (jax.random.permutation(jax.random.key(seed), SLOTS)[:most] for seed in (4, 5))

  @jax.jit
  def step(qkv, keys, values, position, slot):
    turns = api.rotation(position, H, base=1e6, style="half")
    out, keys, values = api.decode(
      qkv, keys, values, jnp.int32(1), position,
      slot_B=slot, rotation_B2H=turns, implementation="triton",
    )  # fmt: skip
    return out, keys[1, slot, :, position], values[1, slot, :, position]

  def moved(cache):
    return cache.at[:, other].set(cache[:, slot])

  wanted = step(qkv, keys, values, position, slot)
  found = step(qkv[:batch], moved(keys), moved(values), position[:batch], other[:batch])
  for a, b in zip(found, wanted, strict=True):
    assert int((a != b[:batch]).sum()) == 0


@pytest.mark.parametrize("length", [2, 16, 64, 256, 512, 1024])
def test_a_query_has_the_same_bits_in_a_chunk_of_any_length(length: int):
  total, slot = 2048, jnp.full(1, 3, jnp.int32)
  q = normal(0, 1, total, N, H)
  keys, values = (normal(seed, 1, 5, K, CAPACITY, H) for seed in (1, 2))
  attend = jax.jit(
    lambda q, start: api.attend_cache(
      q, keys, values, jnp.int32(0), start, slot_B=slot, implementation="triton"
    )
  )
  whole = attend(q, jnp.zeros(1, jnp.int32))
  for start in (0, total - length, (total - length) // 2):
    part = attend(q[:, start : start + length], jnp.full(1, start, jnp.int32))
    assert int((part != whole[:, start : start + length]).sum()) == 0
