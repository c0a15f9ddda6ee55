"""Fused programs against the model that they were fused from."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurojax.config import ModelConfig, Span
from neurojax.files.dummy import write_dummy
from neurojax.files.load import load_span
from neurojax.files.open import open_model
from neurojax.model.neurollm import NeuroLLM
from neurojax.stage import fused, rounded
from neurojax.stage.fused import Fused, fuse
from neurojax.stage.kernels import REFERENCE, Kernels

LLAMA = ModelConfig(
  vocab_size=97, model_dim=256, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32,
  ffn_dim=384, rope_style="interleaved", norm_eps=1e-5, tied_embedding=True,
)  # fmt: skip
QWEN = dataclasses.replace(
  LLAMA, rope_style="half", rope_base=1e6, qk_norm=True, tied_embedding=False
)
FAMILIES = {"llama": LLAMA, "qwen3": QWEN}
CAPACITY = 128
TOKENS = jnp.asarray([[3, 41, 7, 0, 96, 5, 5, 2, 19], [8, 8, 1, 30, 77, 64, 50, 21, 4]])


@pytest.fixture(scope="module", params=FAMILIES)
def path(request, tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("models") / f"{request.param}.gguf"
  write_dummy(path, FAMILIES[request.param], "Q2_0 (group 64)")
  return path


def load(path: Path, mode: str, **kwargs) -> NeuroLLM:
  with open_model(path) as file:
    return load_span(file, weights=mode, **kwargs)


@pytest.fixture(scope="module")
def model(path: Path) -> NeuroLLM:
  return load(path, "w2a16")


@pytest.fixture(scope="module")
def whole(model: NeuroLLM) -> Fused:
  return fuse(model)


def caches(whole: Fused, batch: int):
  return whole.new_cache(batch=batch, capacity=CAPACITY, dtype=jnp.float32)


def close(a, b):
  np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


def all_logits(whole: Fused, tokens_BT, start_B=None, cache=None):
  keys, values = cache or caches(whole, tokens_BT.shape[0])
  x_BTD, keys, values = fused.prefill(
    whole, fused.embed(whole, tokens_BT), keys, values, start_B,
    kernels=REFERENCE, dtype=jnp.float32,
  )  # fmt: skip
  flat = x_BTD.reshape(-1, x_BTD.shape[-1])
  logits = fused.logits(whole, flat, kernels=REFERENCE)
  return logits.reshape(*tokens_BT.shape, -1), keys, values


def test_prefill_gives_the_models_logits(model: NeuroLLM, whole: Fused):
  wanted, _ = model(TOKENS)
  assert np.abs(wanted).max() > 0.1
  close(all_logits(whole, TOKENS)[0], wanted)


def test_a_prompt_in_chunks_and_steps_is_one_pass(whole: Fused):
  wanted, keys, values = all_logits(whole, TOKENS)
  first, *cache = all_logits(whole, TOKENS[:, :4])
  second, *cache = all_logits(whole, TOKENS[:, 4:7], jnp.full(2, 4), cache)
  parts = [first, second]
  for t in (7, 8):
    logits, *cache = fused.step(whole, TOKENS[:, t], *cache, jnp.full(2, t), kernels=REFERENCE)
    parts.append(logits[:, None])
  close(jnp.concatenate(parts, axis=1), wanted)
  close(cache[0], keys)
  close(cache[1], values)


def test_each_row_of_a_batch_is_by_itself(whole: Fused):
  """Rows of different lengths, each compared with a batch of one."""
  lengths = np.array([9, 5])
  _, *cache = all_logits(whole, TOKENS)
  together, keys, _ = fused.step(
    whole, jnp.asarray([11, 12]), *cache, jnp.asarray(lengths), kernels=REFERENCE
  )
  for row, length in enumerate(lengths):
    _, *alone = all_logits(whole, TOKENS[row : row + 1, :length])
    logits, alone_keys, _ = fused.step(
      whole, jnp.asarray([11 + row]), *alone, jnp.asarray([length]), kernels=REFERENCE
    )
    close(together[row], logits[0])
    close(keys[:, row, :, : length + 1], alone_keys[:, 0, :, : length + 1])


def in_slots(cache_LPKSH, slots, count: int):
  """The rows of a cache in some of `count` slots; noise everywhere else."""
  shape = (cache_LPKSH.shape[0], count, *cache_LPKSH.shape[2:])
  noise = 5 * jax.random.normal(jax.random.key(count), shape, cache_LPKSH.dtype)
  return noise.at[:, jnp.asarray(slots)].set(cache_LPKSH)


@pytest.mark.parametrize("slots", [(4, 0), (1, 3)])
def test_rows_in_any_slots_are_rows_in_their_own(whole: Fused, slots: tuple[int, int]):
  """A prompt, a chunk behind it, and a step; whatever other slots hold is neither read nor changed."""
  slot_B = jnp.asarray(slots)
  own = caches(whole, 2)
  wide = tuple(in_slots(cache, slots, 5) for cache in own)
  before, free = wide, jnp.asarray([i for i in range(5) if i not in slots])
  for start, stop in ((0, 4), (4, 8)):
    start_B = None if start == 0 else jnp.full(2, start)
    x_BTD = fused.embed(whole, TOKENS[:, start:stop])
    wanted, *own = fused.prefill(whole, x_BTD, *own, start_B, kernels=REFERENCE, dtype=jnp.float32)
    found, *wide = fused.prefill(
      whole, x_BTD, *wide, start_B, slot_B, kernels=REFERENCE, dtype=jnp.float32
    )
    close(found, wanted)
  wanted, *own = fused.step(whole, TOKENS[:, 8], *own, jnp.full(2, 8), kernels=REFERENCE)
  found, *wide = fused.step(whole, TOKENS[:, 8], *wide, jnp.full(2, 8), slot_B, kernels=REFERENCE)
  close(found, wanted)
  for new, old, expected in zip(wide, before, own, strict=True):
    close(new[:, slot_B], expected)
    np.testing.assert_array_equal(new[:, free], old[:, free])


def test_padding_stores_nothing_and_changes_no_other_row(whole: Fused):
  """Rows that stand for nothing name the slot of a live one; a padded prompt stores behind its end."""
  _, *own = all_logits(whole, TOKENS[:1, :5])
  wide = [in_slots(cache, (2,), 4) for cache in own]
  padded = jnp.concatenate([TOKENS[:1, 5:7], jnp.full((1, 6), 96)], axis=1)
  x_BTD, *wide = fused.prefill(
    whole, fused.embed(whole, padded), *wide, jnp.asarray([5]), jnp.asarray([2]),
    kernels=REFERENCE, dtype=jnp.float32,
  )  # fmt: skip
  wanted, *own = fused.prefill(
    whole, fused.embed(whole, TOKENS[:1, 5:7]), *own, jnp.asarray([5]),
    kernels=REFERENCE, dtype=jnp.float32,
  )  # fmt: skip
  close(x_BTD[:, :2], wanted)
  tokens, positions = jnp.asarray([9, 30, 11]), jnp.asarray([-1, 7, CAPACITY])
  found, *after = fused.step(whole, tokens, *wide, positions, jnp.full(3, 2), kernels=REFERENCE)
  wanted, *own = fused.step(whole, tokens[1:2], *own, positions[1:2], kernels=REFERENCE)
  close(found[1], wanted[0])
  for new, old, expected in zip(after, wide, own, strict=True):
    close(new[:, 2, :, :8], expected[:, 0, :, :8])
    np.testing.assert_array_equal(new.at[:, 2, :, 7].set(0), old.at[:, 2, :, 7].set(0))


@pytest.mark.parametrize("mode", ["w2a16", "w2a8"])
def test_generate_takes_the_models_tokens(path: Path, mode: str):
  """Layers run in a loop or written out: each mode and each family has both."""
  unroll = (mode == "w2a8") == (path.stem == "llama")
  model = load(path, mode)
  whole = fuse(model)
  cache, tokens, wanted = model.new_cache(batch=2, capacity=CAPACITY), TOKENS[:, :1], []
  for position in range(6):
    logits, cache = model(tokens, cache=cache, start_B=jnp.full(2, position))
    tokens = jnp.argmax(logits[:, -1:], axis=-1)
    wanted.append(tokens)
  kernels = dataclasses.replace(REFERENCE, unroll=unroll)
  found, *_ = fused.generate(
    whole, TOKENS[:, 0], *caches(whole, 2), jnp.zeros(2, jnp.int32), steps=6, kernels=kernels
  )
  np.testing.assert_array_equal(found, jnp.concatenate(wanted, axis=1))
  # In slots, beside a row that stands for nothing and stays so.
  slots, pad = (2, 0), jnp.asarray([-1], jnp.int32)
  wide = [in_slots(cache, slots, 3) for cache in caches(whole, 2)]
  found, *after = fused.generate(
    whole, jnp.append(TOKENS[:, 0], 5), *wide, jnp.append(jnp.zeros(2, jnp.int32), pad),
    slot_B=jnp.asarray([*slots, 2]), steps=6, kernels=kernels,
  )  # fmt: skip
  for new, old in zip(after, wide, strict=True):
    np.testing.assert_array_equal(new[:, :, :, 6:], old[:, :, :, 6:])
    np.testing.assert_array_equal(new[:, 1], old[:, 1])
  found = found[:2]
  np.testing.assert_array_equal(found, jnp.concatenate(wanted, axis=1))


def test_one_sequence_takes_the_kernel_for_a_token(nothing_ahead, path: Path):
  """That kernel rounds activations in its own order of sums: logits are compared, not tokens."""
  whole = fuse(load(path, "w2a8"))
  wanted, *after = fused.step(
    whole, TOKENS[0, :1], *caches(whole, 1), jnp.zeros(1, jnp.int32), kernels=REFERENCE
  )
  kernels = dataclasses.replace(REFERENCE, programs=1, interpret=True)
  found, *cache = fused.step(
    whole, TOKENS[0, :1], *caches(whole, 1), jnp.zeros(1, jnp.int32), kernels=kernels
  )
  # A level of an activation may round the other way.
  np.testing.assert_allclose(found, wanted, atol=0.02 * np.abs(wanted).max())
  np.testing.assert_allclose(cache[1], after[1], atol=0.02 * np.abs(after[1]).max())
  wide = (in_slots(cache, (1,), 2) for cache in caches(whole, 1))
  slotted, *_ = fused.step(
    whole, TOKENS[0, :1], *wide, jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.int32), kernels=kernels
  )
  np.testing.assert_array_equal(slotted, found)


def test_sampling_follows_the_key_and_the_temperature(whole: Fused):
  def sample(seed: int, temperature: float):
    tokens, *_ = fused.generate(
      whole, TOKENS[:, 0], *caches(whole, 2), jnp.zeros(2, jnp.int32), jax.random.key(seed),
      steps=5, temperature=temperature, kernels=REFERENCE,
    )  # fmt: skip
    return tokens.tolist()

  assert sample(1, 1.0) == sample(1, 1.0) != sample(2, 1.0)
  assert sample(1, 1e-6) == sample(2, 0.0)
  with pytest.raises(ValueError, match="needs a key"):
    fused.generate(
      whole, TOKENS[:, 0], *caches(whole, 2), jnp.zeros(2, jnp.int32), steps=1, temperature=1.0,
      kernels=REFERENCE,
    )  # fmt: skip


def test_spans_one_after_the_other_are_the_whole(path: Path, whole: Fused):
  num_layers = whole.layers.num_layers
  x_BTD = fused.embed(whole, TOKENS)
  for first, last in ((0, 0), (1, num_layers - 1)):
    span = Span(first_layer=first, last_layer=last, num_layers=num_layers)
    part = fuse(load(path, "w2a16", span=span))
    assert (part.embedding is None, part.head is None) == (first > 0, last < num_layers - 1)
    x_BTD, *_ = fused.prefill(part, x_BTD, *caches(part, 2), kernels=REFERENCE, dtype=jnp.float32)
  logits = fused.logits(part, x_BTD[:, -1], kernels=REFERENCE)
  close(logits, all_logits(whole, TOKENS)[0][:, -1])


def test_what_cannot_be_fused_is_named(path: Path):
  with open_model(path) as file:
    dense = load_span(file)
  with pytest.raises(ValueError, match="q_DNH is not ternary"):
    fuse(dense)
  model = load(path, "w2a8")
  up = model.layers.ffn.up_DF
  up.set_value(dataclasses.replace(up.get_value(), mode="w2a16"))
  with pytest.raises(ValueError, match=r"alike.*gate_DF.*up_DF"):
    fuse(model)


def test_memory_counts_a_tied_embedding_once(model: NeuroLLM, whole: Fused):
  leaves = jax.tree.leaves((model.layers, whole.head))
  matrices = sum(leaf.nbytes for leaf in leaves) + whole.final_norm.nbytes
  if not model.config.tied_embedding:
    matrices += sum(leaf.nbytes for leaf in jax.tree.leaves(whole.embedding))
  assert whole.nbytes == matrices


def test_invariant_products_are_those_whose_bits_agree(path: Path):
  """Triton's in place of Mosaic's only where it adds up the same numbers in the same order."""
  w = fuse(load(path, "w2a8")).layers.qkv
  grouped = {size: dataclasses.replace(w, group_size=size) for size in (None, 64, 128, 256)}
  for m, size, taken in ((1, 128, True), (64, None, True), (65, 128, False), (8, 64, False)):
    assert (rounded.whole_tiles(m, grouped[size]) is not None) == taken
  assert rounded.whole_tiles(8, dataclasses.replace(grouped[128], mode="w2a16")) is None
  kernels = Kernels("dense", invariant=True)
  with pytest.raises(ValueError, match="not invariant"):
    fused.multiply(jnp.ones((1, LLAMA.model_dim)), w, jnp.int32(0), kernels=kernels)


def test_kernels_are_a_static_argument():
  assert hash(Kernels()) == hash(Kernels()) and Kernels() != REFERENCE
