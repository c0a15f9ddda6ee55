"""The fused programs on a GPU beside the reference on the CPU: the same tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurojax.config import ModelConfig
from neurojax.measure.speed import stage
from neurojax.stage import fused
from neurojax.stage.fused import Fused
from neurojax.stage.kernels import REFERENCE, Kernels
from tests.kernels import hopper

pytestmark = hopper.needed

CONFIG = dataclasses.replace(
  ModelConfig.named("bonsai-1.7b"), num_layers=3, vocab_size=4096, tied_embedding=False
)
STEPS, CAPACITY = 48, 128


@functools.cache
def model(mode: str) -> Fused:
  return stage.random_model(CONFIG, mode, seed=7)


def kernels(mode: str, batch: int, **how) -> Kernels:
  return dataclasses.replace(stage.kernels_for(mode, batch), **how)


def generate(model: Fused, tokens_B, kernels: Kernels) -> tuple[np.ndarray, ...]:
  """Greedy tokens [B, T], by the loop on the device."""
  loop = jax.jit(functools.partial(fused.generate, steps=STEPS, kernels=kernels))
  batch = len(tokens_B)
  cache = model.new_cache(batch=batch, capacity=CAPACITY)
  tokens, *_ = loop(model, jnp.asarray(tokens_B, jnp.int32), *cache, jnp.zeros(batch, jnp.int32))
  return np.asarray(tokens)


def forced_logits(model: Fused, fed_BT: np.ndarray, kernels: Kernels, dtype) -> np.ndarray:
  """Logits [T, B, V] after each of the tokens that are fed, step by step."""
  step = jax.jit(functools.partial(fused.step, kernels=kernels))
  batch, length = fed_BT.shape
  cache = model.new_cache(batch=batch, capacity=CAPACITY, dtype=dtype)
  out = []
  for t in range(length):
    tokens_B = jnp.asarray(fed_BT[:, t], jnp.int32)
    logits, *cache = step(model, tokens_B, *cache, jnp.full(batch, t, jnp.int32))
    out.append(np.asarray(logits))
  return np.stack(out)


@pytest.mark.parametrize(
  ("mode", "batch", "how"),
  [
    ("w2a8", 1, {}),
    ("w2a8", 1, {"programs": 0}),
    ("w2a8", 5, {}),
    ("w2a16", 3, {}),
    ("w2a16", 3, {"unroll": True}),
  ],
)
def test_tokens_are_the_cpu_references(mode: str, batch: int, how: dict):
  first_B = np.arange(11, 11 + batch)
  chosen = kernels(mode, batch, **how)
  tokens_BT = generate(model(mode), first_B, chosen)
  fed_BT = np.concatenate([first_B[:, None], tokens_BT[:, :-1]], axis=1)
  cpu = jax.devices("cpu")[0]
  with jax.default_device(cpu):
    wanted_TBV = forced_logits(jax.device_put(model(mode), cpu), fed_BT, REFERENCE, jnp.float32)
  logits_TBV = forced_logits(model(mode), fed_BT, chosen, jnp.bfloat16)
  # The cache holds bfloat16 on the GPU; roundings to int8 that flip for it add to that.
  error = np.abs(logits_TBV - wanted_TBV).max() / np.abs(wanted_TBV).max()
  print(f"{mode}, batch {batch}, {how}: logits to {error:.1e}")
  assert error < 3e-2
  likeliest_BT = wanted_TBV.argmax(-1).T
  top_BT = wanted_TBV.max(-1).T
  theirs_BT = np.take_along_axis(wanted_TBV, tokens_BT.T[..., None], axis=2)[..., 0].T
  # Where the tokens differ, the reference's own margin is less than the error: a tie that flipped.
  ties = (top_BT - theirs_BT) <= 2 * np.abs(logits_TBV - wanted_TBV).max()
  assert (tokens_BT == likeliest_BT)[~ties].all()
  same = (tokens_BT == likeliest_BT).mean()
  print(f"  {same:.1%} of {tokens_BT.size} tokens are the same, the others ties within the error")
  assert same > 0.9 and len(np.unique(tokens_BT)) > 1


def test_the_token_kernel_gives_the_same_bits_twice():
  chosen = kernels("w2a8", 1)
  np.testing.assert_array_equal(
    generate(model("w2a8"), [5], chosen), generate(model("w2a8"), [5], chosen)
  )


WIDTHS, SLOTS = (1, 8, 16, 64), 64


@functools.cache
def row_bits(width: int) -> tuple[np.ndarray, ...]:
  """Logits, and new keys and values, of the first rows of a step; each in a slot of its own."""
  how = kernels("w2a8", 2, invariant=True)
  rng = np.random.default_rng(1)
  tokens, position = (rng.integers(0, most, max(WIDTHS)) for most in (4096, CAPACITY))
  slot = rng.permutation(SLOTS)[: max(WIDTHS)]
  tokens, position, slot = (jnp.asarray(a[:width], jnp.int32) for a in (tokens, position, slot))
  whole = model("w2a8")
  shape = whole.new_cache(batch=SLOTS, capacity=CAPACITY)[0].shape
  cache = [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(2)]
  step = jax.jit(functools.partial(fused.step, kernels=how))
  logits, *cache = step(whole, tokens, *cache, position, slot)
  return tuple(np.asarray(a) for a in (logits, *(c[:, slot, :, position] for c in cache)))


@pytest.mark.parametrize("width", WIDTHS)
def test_a_row_of_an_invariant_step_has_the_same_bits_beside_any_others(width: int):
  for a, b in zip(row_bits(width), row_bits(max(WIDTHS)), strict=True):
    assert (a != b[:width]).sum() == 0


@pytest.mark.parametrize("length", [2, 32, 64, 256])
def test_a_position_of_an_invariant_prompt_has_the_same_bits_in_chunks_of_any_length(length: int):
  how, total = kernels("w2a8", 2, invariant=True), 512
  ids = jax.random.randint(jax.random.key(0), (1, total), 0, 4096)
  whole, slot = model("w2a8"), jnp.full(1, 2, jnp.int32)

  @jax.jit
  def chunk(whole, ids, keys, values, start):
    return fused.prefill(whole, fused.embed(whole, ids), keys, values, start, slot, kernels=how)

  def run(length: int) -> tuple[np.ndarray, ...]:
    cache, parts = whole.new_cache(batch=3, capacity=total), []
    for start in range(0, total, length):
      x, *cache = chunk(
        whole, ids[:, start : start + length], *cache, jnp.full(1, start, jnp.int32)
      )
      parts.append(np.asarray(x))
    return np.concatenate(parts, axis=1), *(np.asarray(c) for c in cache)

  for a, b in zip(run(length), run(total), strict=True):
    assert (a != b).sum() == 0
