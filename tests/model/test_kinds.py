"""Layers of several kinds: any cut, chunks, padding, and what caches keep, each held to the bits or to an
exact oracle. That the numbers are right, tests/golden/families shows."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from neurojax.config import LayerKind, ModelConfig, RopeScaling, Span
from neurojax.model import params
from neurojax.model.attention import Scores, attend, attend_cache
from neurojax.model.cache import ConvState, KVCache, Rows
from neurojax.model.ffn import Experts
from neurojax.model.neurollm import NeuroLLM
from neurojax.model.order import rounds
from neurojax.model.rope import frequencies
from neurojax.stage.cut import cut
from neurojax.weights.int8 import Int8Array
from neurojax.weights.quantize import absmean

pytestmark = pytest.mark.optimized

PLAIN = ModelConfig(
  vocab_size=31, model_dim=16, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=4, ffn_dim=24,
  context_length=256,
)  # fmt: skip
CONV = LayerKind(mixer="convolution")
LOCAL = LayerKind(sliding_window=4)
WHOLE = LayerKind(
  head_dim=8, num_kv_heads=1, shared_kv=True, rope_base=1e6,
  rope_scaling=RopeScaling(kind="proportional", rotated=0.5),
)  # fmt: skip
MIXED = dataclasses.replace(
  PLAIN, layer_kinds=(CONV, LOCAL, WHOLE), layer_pattern=(0, 1, 0, 1, 2), conv_width=3,
  v_norm=True, qk_norm=True, post_norm=True, layer_scale=True,
)  # fmt: skip
ONE_SHAPE = dataclasses.replace(
  PLAIN, layer_kinds=(
    LOCAL, dataclasses.replace(LOCAL, rope_scaling=RopeScaling(kind="linear", factor=8.0)),
  ), layer_pattern=(0, 1), qkv_bias=True, attention_softcap=2.0, logit_softcap=3.0,
  embedding_scale=4.0, activation="gelu_tanh",
)  # fmt: skip


def model(config: ModelConfig) -> NeuroLLM:
  """Random weights, biases and scales of a size that makes all of them matter."""
  graph, state = nnx.split(NeuroLLM(config, rngs=nnx.Rngs(0)))
  rng = np.random.default_rng(0)
  return nnx.merge(
    graph, jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape) * 0.4, x.dtype), state)
  )


@jax.jit
def step(part, inputs, cache, start_B, count_B):
  return part(inputs, cache=cache, start_B=start_B, count_B=count_B)


def run(parts, tokens, lengths, *, padded_to: int = 0, caches=None):
  """Logits of parts of a model in turn, over calls of `lengths`, each padded with token 7."""
  batch = tokens.shape[0]
  caches = caches or [part.new_cache(batch=batch, capacity=128) for part in parts]
  found, start = [], 0
  for length in lengths:
    width = max(length, padded_to) if length > 1 else 1
    x = np.full((batch, width), 7, np.int32)
    x[:, :length] = tokens[:, start : start + length]
    x = jnp.asarray(x)
    ones = jnp.ones(batch, jnp.int32)
    for i, part in enumerate(parts):
      x, caches[i] = step(part, x, caches[i], ones * start, ones * length)
    found.append(np.asarray(x)[:, :length])
    start += length
  return np.concatenate(found, axis=1), caches


TOKENS = np.random.default_rng(1).integers(0, 31, (2, 14)).astype(np.int32)
LENGTHS = (6, 5, 1, 1, 1)
CONFIGS = pytest.mark.parametrize("config", [MIXED, ONE_SHAPE], ids=["mixed", "one shape"])


@pytest.fixture(scope="module")
def models() -> dict[ModelConfig, NeuroLLM]:
  return {config: model(config) for config in (MIXED, ONE_SHAPE)}


@pytest.fixture(scope="module")
def whole(models) -> dict[ModelConfig, np.ndarray]:
  return {config: run([net], TOKENS, LENGTHS, padded_to=8)[0] for config, net in models.items()}


@CONFIGS
def test_any_cut_gives_the_whole_models_logits(models, whole, config: ModelConfig):
  """To the bit, though a part may lack kinds of layers, and a loop of the whole be none in it."""
  parts = [
    cut(models[config], Span(first_layer=first, last_layer=after - 1, num_layers=5))
    for first, after in ((0, 1), (1, 3), (3, 5))
  ]
  found, _ = run(parts, TOKENS, LENGTHS, padded_to=8)
  np.testing.assert_array_equal(found, whole[config])


@CONFIGS
def test_chunks_steps_and_padding_give_what_one_pass_gives(models, whole, config: ModelConfig):
  at_once, _ = jax.jit(lambda net, ids: net(ids))(models[config], jnp.asarray(TOKENS))
  np.testing.assert_allclose(whole[config], at_once, rtol=2e-4, atol=2e-5)
  assert np.std(at_once) > 0.1


@CONFIGS
def test_what_a_sequence_left_is_never_read_by_the_next(models, whole, config: ModelConfig):
  """A cache of NaN is as good as a new one."""
  net = models[config]
  used = jax.tree.map(lambda leaf: jnp.full_like(leaf, 3e4), net.new_cache(batch=2, capacity=128))
  found, _ = run([net], TOKENS, LENGTHS, padded_to=8, caches=[used])
  np.testing.assert_array_equal(found, whole[config])


def test_rows_of_a_batch_do_not_meet(models):
  """Rows that stand at different positions, one of them padded more than the other."""
  net = models[MIXED]
  _, (cache,) = run([net], TOKENS, (6,), padded_to=8)
  x = np.full((2, 8), 7, np.int32)
  x[0, :3], x[1, 0] = TOKENS[0, 6:9], TOKENS[1, 3]
  start_B, count_B = jnp.array([6, 3]), jnp.array([3, 1])
  _, (short,) = run([net], TOKENS[1:], (3,), padded_to=8)
  # The second row goes on from its third position instead.
  put = lambda whole, one: whole.at[:, 1:].set(one)  # noqa: E731
  together, _ = step(net, jnp.asarray(x), jax.tree.map(put, cache, short), start_B, count_B)
  alone, _ = step(net, jnp.asarray(x[1:]), short, start_B[1:], count_B[1:])
  np.testing.assert_allclose(together[1, 0], alone[0, 0], rtol=1e-5, atol=1e-6)


def test_a_convolution_keeps_what_came_before_the_next_position():
  state = ConvState(jnp.arange(2 * 1 * 2 * 3, dtype=jnp.float32).reshape(2, 1, 2, 3))
  layer = jnp.int32(1)
  assert state.read(layer, Rows(jnp.array([5])))[0].tolist() == [[6, 7, 8], [9, 10, 11]]
  assert state.read(layer, Rows(jnp.array([1])))[0].tolist() == [[0, 0, 0], [9, 10, 11]]
  assert state.read(layer, Rows(jnp.array([0])))[0].tolist() == [[0, 0, 0], [0, 0, 0]]
  inputs = jnp.arange(5.0).reshape(1, 5, 1) * jnp.ones((1, 1, 3))
  for count in range(4):
    kept = state.write(layer, inputs, Rows(jnp.array([5]), jnp.array([count]))).u_LPXM
    # Without input the state stays as it is.
    assert kept[1, 0, :, 0].tolist() == ([count, count + 1] if count else [6, 9])
    np.testing.assert_array_equal(kept[0], state.u_LPXM[0])


def exact_attention(q_TNH, k_SKH, v_SKH, start: int, window: int | None, scores: Scores):
  """One query and head at a time in float64."""
  out = np.zeros(q_TNH.shape)
  groups = q_TNH.shape[1] // k_SKH.shape[1]
  for t, n in itertools.product(range(q_TNH.shape[0]), range(q_TNH.shape[1])):
    here = start + t
    seen = slice(0 if window is None else max(0, here - window + 1), here + 1)
    score = k_SKH[seen, n // groups].astype(np.float64) @ q_TNH[t, n] * scores.scale
    if scores.softcap is not None:
      score = scores.softcap * np.tanh(score / scores.softcap)
    weight = np.exp(score - score.max())
    out[t, n] = (weight / weight.sum()) @ v_SKH[seen, n // groups]
  return out


@pytest.mark.parametrize(
  ("length", "start"), [(1, 0), (1, 70), (1, 255), (3, 0), (9, 130), (9, 247)]
)
@pytest.mark.parametrize("window", [1, 5, 100])
def test_windows_and_caps_equal_float64(length: int, start: int, window: int):
  rng = np.random.default_rng(start)
  k, v = rng.standard_normal((2, 256, 2, 4)).astype(np.float32)
  q = rng.standard_normal((length, 4, 4)).astype(np.float32)
  # Beyond the sequence there is what must not be seen.
  k[start + length :], v[start + length :] = 1e4, 1e4
  cache = KVCache(*(jnp.asarray(x.swapaxes(0, 1))[None, None] for x in (k, v)))
  scores = Scores(0.7, 1.5)
  found = attend_cache(
    jnp.asarray(q)[None],
    cache,
    jnp.int32(0),
    Rows(jnp.array([start])),
    scores=scores,
    window=window,
  )
  wanted = exact_attention(q, k, v, start, window, scores)
  np.testing.assert_allclose(found[0], wanted, atol=3e-6, rtol=3e-5)
  if start == 0:
    args = (jnp.asarray(x[:length])[None] for x in (q, k, v))
    found = attend(*args, scores=scores, window=window)
    np.testing.assert_allclose(found[0], wanted, atol=3e-6, rtol=3e-5)


def test_places_of_a_window_are_used_again():
  """Positions go round twice, in calls of any length, each padded with what must not be seen."""
  window, rng = 130, np.random.default_rng(3)
  cache = KVCache.zeros(
    num_layers=2, slots=1, num_kv_heads=2, capacity=1152, head_dim=4, dtype=jnp.float32,
    window=window,
  )  # fmt: skip
  assert cache.is_ring and cache.capacity == 512
  k, v = rng.standard_normal((2, 1100, 2, 4)).astype(np.float32)
  q = rng.standard_normal((1100, 4, 4)).astype(np.float32)
  layer, scores, start = jnp.int32(1), Scores(0.7), 0

  @jax.jit
  def call(cache, q, k, v, start_B):
    cache = cache.write(layer, k, v, Rows(start_B))
    return attend_cache(q, cache, layer, Rows(start_B), scores=scores, window=window), cache

  for length in (256, 200, 1, 1, 54, 1, 256, 256 - 1, *[1] * 3):
    padded = 1 if length == 1 else 256
    given = [np.full((padded, *x.shape[1:]), 1e4, np.float32) for x in (q, k, v)]
    for x, all_x in zip(given, (q, k, v), strict=True):
      x[:length] = all_x[start : start + length]
    found, cache = call(cache, *(jnp.asarray(x)[None] for x in given), jnp.array([start]))
    wanted = exact_attention(q[start : start + length], k, v, start, window, scores)
    np.testing.assert_allclose(found[0, :length], wanted, atol=3e-6, rtol=3e-5)
    start += length
  assert start > 2 * cache.capacity - 10
  with pytest.raises(ValueError, match="at most 256 inputs at a time"):
    attend_cache(jnp.zeros((1, 400, 4, 4)), cache, layer, Rows(jnp.array([0])), window=window)


def test_a_window_counts_the_query_itself():
  """Values say which keys were seen: the mean of the last two."""
  v_BTKH = jnp.asarray([[[[1.0]], [[3.0]], [[7.0]], [[13.0]]]])
  zeros = jnp.zeros((1, 4, 1, 1))
  assert attend(zeros, zeros, v_BTKH, window=2)[0, :, 0, 0].tolist() == [1, 2, 5, 10]


def test_cudnn_does_not_compute_what_it_would_compute_otherwise():
  x = jnp.zeros((1, 2, 1, 8))
  with pytest.raises(NotImplementedError, match="choose 'einsum'"):
    attend(x, x, x, kind="cudnn", scores=Scores(softcap=1.0))


@given(
  pattern=st.lists(st.integers(0, 2), min_size=1, max_size=14), first=st.integers(0, 13),
  length=st.integers(1, 14),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_rounds_are_the_layers_in_their_order(pattern: list[int], first: int, length: int):
  """And a span's layers are those of its stacks."""
  every = (CONV, LOCAL, WHOLE)
  used = sorted(set(pattern))
  kinds = tuple(every[kind] for kind in used)
  config = dataclasses.replace(
    PLAIN, num_layers=14, layer_kinds=kinds, conv_width=3 if CONV in kinds else 0,
    layer_pattern=tuple(used.index(kind) for kind in pattern),
  )  # fmt: skip
  span = Span(first_layer=first, last_layer=min(first + length, 14) - 1, num_layers=14)
  stacks = {stack.name: stack for stack in params.stacks(config, span)}
  found = [
    stacks[run.stack].layers[run.first + turn * run.stride + i]
    for each in rounds(config, span)
    for turn in range(each.count)
    for run in each.runs
    for i in range(run.count)
  ]
  assert found == list(range(span.first_layer, span.last_layer + 1))


def test_a_pattern_that_repeats_is_one_program():
  config = dataclasses.replace(
    PLAIN, num_layers=60, layer_kinds=(LOCAL, WHOLE), layer_pattern=(0,) * 5 + (1,)
  )
  [each] = rounds(config, Span.whole(config))
  assert each.count == 10 and [run.count for run in each.runs] == [5, 1]


@pytest.mark.parametrize("count", [1, 2, 9])
@pytest.mark.parametrize("kind", ["dense", "int8", "ternary"])
def test_every_chosen_expert_counts_and_no_other(count: int, kind: str):
  """Few tokens read their own experts, many all: the same numbers, whatever the matrices are held in."""
  config = dataclasses.replace(PLAIN, num_experts=4, experts_per_token=2, model_dim=64, ffn_dim=64)
  experts = Experts(config, dtype=jnp.float32, rngs=nnx.Rngs(1))
  matrices = {}
  for name in ("gate_EDF", "up_EDF", "down_EFD"):
    param = getattr(experts, name)
    dense = np.asarray(param[...]) * 10
    narrow = [_narrow(w, kind) for w in dense]
    matrices[name] = np.stack([w if kind == "dense" else w.dequantize() for w in narrow])
    param.set_value(jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(_arrays, narrow)))
  x = np.random.default_rng(2).standard_normal((1, count, 64)).astype(np.float32)
  found = np.asarray(jax.jit(lambda m, x: m(x))(experts, jnp.asarray(x)))
  router = np.asarray(experts.router_DE[...]).astype(np.float64)
  for t in range(count):
    logits = x[0, t] @ router
    chosen = np.argsort(-logits)[:2]
    weight = np.exp(logits[chosen] - logits[chosen].max())
    wanted = 0
    for e, w in zip(chosen, weight / weight.sum(), strict=True):
      gate, up = x[0, t] @ matrices["gate_EDF"][e], x[0, t] @ matrices["up_EDF"][e]
      wanted += w * (gate / (1 + np.exp(-gate)) * up) @ matrices["down_EFD"][e]
    np.testing.assert_allclose(found[0, t], wanted, rtol=2e-3, atol=2e-3 * np.abs(wanted).max())


def _narrow(w: np.ndarray, kind: str):
  if kind == "int8":
    return Int8Array.quantize(w, contracted_axes=1)
  return absmean(w, 1, group_size=64) if kind == "ternary" else w


def _arrays(tree):
  return jax.tree.map(jnp.asarray, tree)


def test_frequencies_by_their_formulas():
  plain, one = frequencies(8, 100.0)
  np.testing.assert_allclose(plain, [1, 100**-0.25, 0.1, 100**-0.75])
  assert one == 1

  def scaled(kind, **fields):
    return frequencies(8, 100.0, RopeScaling(kind=kind, **fields))

  np.testing.assert_allclose(scaled("linear", factor=4.0)[0], plain / 4)
  half = scaled("proportional", rotated=0.5)[0]
  np.testing.assert_allclose(half, [*plain[:2], 0, 0])
  factors = scaled("factors", factors=(1.0, 2.0, 4.0, 1e30), factor=2.0)[0]
  np.testing.assert_allclose(factors, plain / [2, 4, 8, 2e30])
  # Within 100 positions the pairs turn 15.9, 5.0, 1.6 and 0.5 times.
  llama3, _ = scaled("llama3", factor=8.0, original_context_length=100)
  middle = (100 * plain[2] / (2 * np.pi) - 1) / 3
  wanted = [plain[0], plain[1], plain[2] * (middle + (1 - middle) / 8), plain[3] / 8]
  np.testing.assert_allclose(llama3, wanted)
  # A pair turns 10 times at place 0.40 of them, once at 2.4: whole pairs 0 to 3.
  yarn, factor = scaled(
    "yarn", factor=4.0, original_context_length=100, beta_fast=10.0, beta_slow=1.0
  )
  np.testing.assert_allclose(yarn, plain * (1 - np.array([0, 1, 2, 3]) / 3 * 0.75))
  assert factor == pytest.approx(0.1 * np.log(4) + 1)
  assert scaled("yarn", factor=4.0, original_context_length=9, attention_factor=1.5)[1] == 1.5
