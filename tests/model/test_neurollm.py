"""The decoder against an independent float64 model, and the faults of the seed's page, each held off."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from neurojax.config import ModelConfig, Span
from neurojax.model.attention import attend, attend_cache
from neurojax.model.cache import KVCache, Rows, check_room
from neurojax.model.neurollm import NeuroLLM
from neurojax.model.norm import RMSNorm
from neurojax.model.rope import frequencies, rotate
from neurojax.stage.cut import cut

TINY = ModelConfig(
  vocab_size=61,
  model_dim=24,
  num_layers=3,
  num_heads=6,
  num_kv_heads=2,
  head_dim=6,
  ffn_dim=40,
  context_length=256,
  norm_eps=1e-5,
)
VARIANTS = [
  TINY,
  dataclasses.replace(TINY, rope_style="interleaved", tied_embedding=False),
  dataclasses.replace(TINY, num_heads=2, num_kv_heads=2, head_dim=16),
  dataclasses.replace(TINY, num_heads=4, num_kv_heads=1, num_layers=1, rope_base=500.0),
  dataclasses.replace(TINY, sub_norm=True),
]


def ids(config: ModelConfig) -> str:
  subs = "-sub" if config.sub_norm else ""
  return (
    f"{config.num_heads}q{config.num_kv_heads}kv-{config.rope_style}-{config.num_layers}L{subs}"
  )


def model(config: ModelConfig, seed: int = 0) -> NeuroLLM:
  """Random weights of a size that makes attention and gates matter."""
  net = NeuroLLM(config, rngs=nnx.Rngs(seed))
  graph, state = nnx.split(net)
  rng = np.random.default_rng(seed)
  return nnx.merge(
    graph, jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape) * 0.3, x.dtype), state)
  )


def float64_logits(net: NeuroLLM, tokens: np.ndarray) -> np.ndarray:
  """The architecture written out by loops in float64: one position, one head, one pair at a time."""
  c = net.config
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(net)))

  def norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * scale

  def turn(head, position):
    out = head.copy()
    for i in range(c.head_dim // 2):
      angle = position * c.rope_base ** (-2 * i / c.head_dim)
      a, b = (2 * i, 2 * i + 1) if c.rope_style == "interleaved" else (i, i + c.head_dim // 2)
      out[a] = head[a] * np.cos(angle) - head[b] * np.sin(angle)
      out[b] = head[a] * np.sin(angle) + head[b] * np.cos(angle)
    return out

  x = p["embedding_VD"][tokens]
  for layer in range(c.num_layers):
    w = jax.tree.map(lambda leaf, layer=layer: leaf[layer], p["layers"])
    a = norm(x, w["attn_norm"]["scale_D"])
    q = np.einsum("td,dnh->tnh", a, w["attention"]["q_DNH"])
    k = np.einsum("td,dkh->tkh", a, w["attention"]["k_DKH"])
    v = np.einsum("td,dkh->tkh", a, w["attention"]["v_DKH"])
    mixed = np.zeros_like(q)
    for t, n in itertools.product(range(len(tokens)), range(c.num_heads)):
      kv = n // (c.num_heads // c.num_kv_heads)
      query = turn(q[t, n], t)
      score = np.array([query @ turn(k[s, kv], s) for s in range(t + 1)]) / np.sqrt(c.head_dim)
      weight = np.exp(score - score.max())
      mixed[t, n] = (weight / weight.sum()) @ v[: t + 1, kv]
    if c.sub_norm:
      scale_Y = w["attention"]["sub_norm"]["scale_D"].reshape(-1)
      mixed = norm(mixed.reshape(len(tokens), -1), scale_Y).reshape(q.shape)
    x = x + np.einsum("tnh,nhd->td", mixed, w["attention"]["o_NHD"])
    a = norm(x, w["ffn_norm"]["scale_D"])
    gate = a @ w["ffn"]["gate_DF"]
    inner = gate / (1 + np.exp(-gate)) * (a @ w["ffn"]["up_DF"])
    if c.sub_norm:
      inner = norm(inner, w["ffn"]["sub_norm"]["scale_D"])
    x = x + inner @ w["ffn"]["down_FD"]
  x = norm(x, p["final_norm"]["scale_D"])
  return x @ (p["embedding_VD"].T if c.tied_embedding else p["head_DV"])


@pytest.mark.parametrize("config", VARIANTS, ids=ids)
def test_logits_equal_a_float64_model(config: ModelConfig):
  net = model(config)
  tokens = np.random.default_rng(1).integers(0, config.vocab_size, 23)
  logits, _ = net(jnp.asarray(tokens)[None])
  wanted = float64_logits(net, tokens)
  assert np.abs(np.asarray(logits[0]) - wanted).max() < 2e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("config", VARIANTS, ids=ids)
@pytest.mark.parametrize("chunks", [(140,), (1, 139), (128, 12), (100, 39, 1), (7,) * 20])
def test_any_chunking_of_prefill_gives_the_whole_passes_logits(
  config: ModelConfig, chunks: tuple[int, ...]
):
  net = model(config)
  tokens = jnp.asarray(np.random.default_rng(2).integers(0, config.vocab_size, (1, 140)))
  whole, _ = net(tokens)
  cache, parts, start = net.new_cache(batch=1, capacity=256), [], 0
  run = nnx.jit(lambda net, t, cache, s: net(t, cache=cache, start_B=s))
  for length in chunks:
    part, cache = run(net, tokens[:, start : start + length], cache, jnp.array([start]))
    parts.append(part)
    start += length
  np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=2e-4, rtol=2e-4)


def test_decoded_tokens_stand_at_their_own_positions():
  """The seed's runner rotates every decoded token as position 0."""
  net = model(TINY)
  tokens = jnp.asarray(np.random.default_rng(3).integers(0, 61, (1, 20)))
  whole, _ = net(tokens)
  cache = net.new_cache(batch=1, capacity=128)
  for position in range(20):
    logits, cache = net(
      tokens[:, position : position + 1], cache=cache, start_B=jnp.array([position])
    )
    np.testing.assert_allclose(logits[:, 0], whole[:, position], atol=1e-4, rtol=1e-4)


def test_rows_of_a_batch_with_their_own_starts_do_not_touch_each_other():
  net = model(TINY)
  rng = np.random.default_rng(4)
  rows = [jnp.asarray(rng.integers(0, 61, (1, n))) for n in (5, 130, 31)]
  cache = net.new_cache(batch=3, capacity=256)
  next_token = jnp.asarray(rng.integers(0, 61, (3, 1)))
  for b, row in enumerate(rows):
    alone = net.new_cache(batch=1, capacity=256)
    _, alone = net(row, cache=alone, start_B=jnp.array([0]))
    cache = jax.tree.map(lambda all_, one, b=b: all_.at[:, b].set(one[:, 0]), cache, alone)
  start_B = jnp.array([row.shape[1] for row in rows])
  together, _ = net(next_token, cache=cache, start_B=start_B)
  for b, row in enumerate(rows):
    whole, _ = net(jnp.concatenate([row, next_token[b : b + 1]], 1))
    np.testing.assert_allclose(together[b, 0], whole[0, -1], atol=1e-4, rtol=1e-4)


def test_causality_by_gradients():
  """The seed's attention has no mask: every position saw the whole text."""
  net = model(TINY)
  tokens = jnp.asarray(np.random.default_rng(5).integers(0, 61, (1, 9)))
  x_BTD = net.embed(tokens)
  for position in (0, 4, 8):
    gradient_BTD = jax.grad(lambda x, t=position: net.run_layers(x)[0][0, t].sum())(x_BTD)
    moved_T = np.abs(np.asarray(gradient_BTD[0])).max(-1) > 0
    assert moved_T.tolist() == [t <= position for t in range(9)]


def test_what_lies_beyond_a_sequence_in_the_cache_is_never_read():
  net = model(TINY)
  tokens = jnp.asarray(np.random.default_rng(6).integers(0, 61, (1, 12)))
  clean = net.new_cache(batch=1, capacity=256)
  dirty = jax.tree.map(lambda x: jnp.full_like(x, 1e20), clean)
  a, _ = net(tokens, cache=clean, start_B=jnp.array([0]))
  b, _ = net(tokens, cache=dirty, start_B=jnp.array([0]))
  assert (a == b).all()


def test_the_cache_refuses_an_overflow():
  """The seed's cache drops the token and counts it all the same."""
  net = model(TINY)
  cache = net.new_cache(batch=1, capacity=128)
  k_BTKH = jnp.zeros((1, 2, 2, 6))
  for start in (127, -1, 200):
    with pytest.raises(ValueError, match=r"do not fit a cache of 128"):
      cache.write(jnp.int32(0), k_BTKH, k_BTKH, Rows(jnp.array([start])))
    with pytest.raises(ValueError, match="do not fit"):
      check_room(start, 2, 128)
  written = cache.write(jnp.int32(2), k_BTKH + 1, k_BTKH + 2, Rows(jnp.array([126])))
  assert written.k_LPKSH.sum() == 2 * 2 * 6 and written.k_LPKSH[2, 0, :, 126:].min() == 1
  with pytest.raises(ValueError, match="multiple of"):
    net.new_cache(batch=1, capacity=100)


def test_a_row_touches_no_slot_but_its_own():
  """The seed's cache writes one row into all of its batch."""
  net = model(TINY)
  tokens = jnp.asarray(np.random.default_rng(7).integers(0, 61, (1, 9)))
  marked = jax.tree.map(lambda leaf: jnp.full_like(leaf, 7), net.new_cache(batch=3, capacity=128))
  alone, own = net(tokens, cache=net.new_cache(batch=1, capacity=128), start_B=jnp.array([0]))
  found, cache = net(tokens, cache=marked, start_B=jnp.array([0]), slot_B=jnp.array([2]))
  np.testing.assert_array_equal(found, alone)
  for leaf, one in zip(jax.tree.leaves(cache), jax.tree.leaves(own), strict=True):
    assert (leaf[:, :2] == 7).all()
    np.testing.assert_array_equal(leaf[:, 2, :, :9], one[:, 0, :, :9])


@given(
  length=st.integers(1, 5),
  start=st.integers(0, 250),
  groups=st.integers(1, 3),
  kv=st.integers(1, 3),
)
@settings(max_examples=20, deadline=None)
def test_cached_attention_equals_attention_in_float64(
  length: int, start: int, groups: int, kv: int
):
  start = min(start, 256 - length)
  rng = np.random.default_rng(start)
  k, v = rng.standard_normal((2, start + length, kv, 4)).astype(np.float32)
  q = rng.standard_normal((length, kv * groups, 4)).astype(np.float32)
  empty = KVCache.zeros(
    num_layers=2, slots=1, num_kv_heads=kv, capacity=256, head_dim=4, dtype=jnp.float32
  )
  cache = empty.write(
    jnp.int32(1), jnp.asarray(k)[None], jnp.asarray(v)[None], Rows(jnp.array([0]))
  )
  out = attend_cache(jnp.asarray(q)[None], cache, jnp.int32(1), Rows(jnp.array([start])))
  for t, n in itertools.product(range(length), range(kv * groups)):
    seen = start + t + 1
    score = k[:seen, n // groups].astype(np.float64) @ q[t, n] / 2
    weight = np.exp(score - score.max())
    wanted = (weight / weight.sum()) @ v[:seen, n // groups]
    np.testing.assert_allclose(out[0, t, n], wanted, atol=2e-6, rtol=2e-5)


def test_attention_mixes_positions_not_heads():
  """The seed's page leaves heads where positions belong. Values tell position and head apart."""
  v_BTKH = jnp.asarray(np.array([[[[1.0], [100.0]], [[3.0], [300.0]]]], np.float32))
  q_BTNH = jnp.zeros((1, 2, 4, 1))
  out = attend(q_BTNH, jnp.zeros((1, 2, 2, 1)), v_BTKH)
  assert out[0, :, :, 0].tolist() == [[1, 1, 100, 100], [2, 2, 200, 200]]


def test_norm_is_float32_inside():
  """The seed squares in the dtype of x: float16 300 became 0."""
  norm = RMSNorm(4, eps=1e-6, dtype=jnp.float16)
  x = jnp.full((1, 1, 4), 300.0, jnp.float16)
  assert norm(x).dtype == jnp.float16
  np.testing.assert_allclose(norm(x), 1.0, rtol=1e-3)
  tiny = jnp.full((1, 1, 4), 1e-4, jnp.float32)
  np.testing.assert_allclose(
    RMSNorm(4, eps=1e-6, dtype=jnp.float32)(tiny), 1e-4 / np.sqrt(1e-8 + 1e-6), rtol=1e-5
  )


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_rotation_keeps_lengths_and_depends_on_distance_alone(style):
  rng = np.random.default_rng(7)
  q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 8)), jnp.float32) for _ in range(2))

  def at(x, position):
    return rotate(x, jnp.array([[position]]), frequencies(8, 100.0)[0], style=style)

  np.testing.assert_allclose(jnp.linalg.norm(at(q, 37)), jnp.linalg.norm(q), rtol=1e-6)
  np.testing.assert_allclose(at(q, 0), q, atol=0)
  near, far = (at(q, p + 5) * at(k, p) for p in (0, 900))
  np.testing.assert_allclose(near.sum(), far.sum(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rotation_takes_narrow_activations_at_any_position(style, dtype):
  """The seed's complex numbers refuse bfloat16, and its table starts at 0 for every call."""
  x = jnp.asarray(np.random.default_rng(12).standard_normal((2, 3, 2, 8)), dtype)
  position = jnp.array([[0, 1, 2], [100_000, 100_001, 100_002]])
  turned = rotate(x, position, frequencies(8, 1e4)[0], style=style)
  assert turned.dtype == dtype
  exact = rotate(x.astype(jnp.float32), position, frequencies(8, 1e4)[0], style=style)
  np.testing.assert_allclose(turned.astype(jnp.float32), exact, atol=0.02, rtol=0.01)


def test_the_styles_are_a_permutation_apart():
  x = jnp.asarray(np.random.default_rng(8).standard_normal((1, 3, 2, 8)), jnp.float32)
  position = jnp.array([[4, 9, 2]])
  order = np.array([0, 2, 4, 6, 1, 3, 5, 7])
  half = rotate(x[..., order], position, frequencies(8, 100.0)[0], style="half")
  interleaved = rotate(x, position, frequencies(8, 100.0)[0], style="interleaved")
  np.testing.assert_allclose(half, interleaved[..., order], rtol=1e-6)


@pytest.mark.parametrize("config", VARIANTS, ids=ids)
def test_any_cut_gives_the_whole_models_logits(config: ModelConfig):
  net = model(config)
  tokens = jnp.asarray(np.random.default_rng(9).integers(0, config.vocab_size, (1, 11)))
  whole, _ = net(tokens)
  layers = config.num_layers
  for size in range(1, layers + 1):
    for ends in itertools.combinations(range(1, layers), size - 1):
      bounds = (0, *ends, layers)
      x = tokens
      for first, after in itertools.pairwise(bounds):
        part = cut(net, Span(first_layer=first, last_layer=after - 1, num_layers=layers))
        x, _ = part(x)
      np.testing.assert_array_equal(x, whole, err_msg=str(bounds))


def test_a_part_is_not_cut_again():
  part = cut(model(TINY), Span(first_layer=0, last_layer=1, num_layers=3))
  with pytest.raises(ValueError, match="cut the whole model"):
    cut(part, Span(first_layer=0, last_layer=0, num_layers=3))
  with pytest.raises(ValueError, match="does not belong"):
    NeuroLLM(TINY, span=Span(first_layer=0, last_layer=0, num_layers=2), rngs=nnx.Rngs(0))


def test_bfloat16_holds_its_dtype_and_stays_near():
  config = TINY
  exact = model(config)
  graph, state = nnx.split(NeuroLLM(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
  values = jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.to_pure_dict(nnx.state(exact)))
  nnx.replace_by_pure_dict(state, values)
  net = nnx.merge(graph, state)
  tokens = jnp.asarray(np.random.default_rng(10).integers(0, 61, (1, 16)))
  x_BTD, _ = net.run_layers(net.embed(tokens))
  assert x_BTD.dtype == jnp.bfloat16
  logits, _ = net(tokens)
  wanted, _ = exact(tokens)
  assert logits.dtype == jnp.float32
  assert np.corrcoef(np.ravel(logits), np.ravel(wanted))[0, 1] > 0.99
