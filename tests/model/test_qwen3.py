"""Qwen3's normalised heads against its block written out in float64, and what must not change them."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from neurojax.config import ModelConfig, Span
from neurojax.model import params
from neurojax.model.neurollm import NeuroLLM
from neurojax.stage.cut import cut

CONFIG = ModelConfig(
  vocab_size=53, model_dim=20, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=8, ffn_dim=28,
  context_length=128, rope_base=1e6, rope_style="half", norm_eps=1e-6, tied_embedding=False,
  qk_norm=True,
)  # fmt: skip


def model(config: ModelConfig = CONFIG, seed: int = 0) -> NeuroLLM:
  graph, state = nnx.split(NeuroLLM(config, rngs=nnx.Rngs(seed)))
  rng = np.random.default_rng(seed)
  return nnx.merge(
    graph, jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape) * 0.4, x.dtype), state)
  )


def unit(vector: np.ndarray, scale: np.ndarray) -> np.ndarray:
  """RMSNorm of one vector."""
  return vector / np.sqrt(np.mean(vector**2) + CONFIG.norm_eps) * scale


def turned(head: np.ndarray, position: int) -> np.ndarray:
  """Pairs (i, i + H/2) as complex numbers."""
  half = len(head) // 2
  pairs = head[:half] + 1j * head[half:]
  pairs = pairs * np.exp(1j * position * CONFIG.rope_base ** (-np.arange(half) / half))
  return np.concatenate([pairs.real, pairs.imag])


def block(x: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
  """One layer of Qwen3 on the rows of x, a head and a position at a time."""
  c = CONFIG
  after = np.empty_like(x)
  normed = [unit(row, w["attn_norm_D"]) for row in x]
  keys = [
    [turned(unit(row @ w["k_DKH"][:, k], w["k_norm_H"]), s) for s, row in enumerate(normed)]
    for k in range(c.num_kv_heads)
  ]
  values = [[row @ w["v_DKH"][:, k] for row in normed] for k in range(c.num_kv_heads)]
  for t, row in enumerate(normed):
    out = x[t].copy()
    for n in range(c.num_heads):
      query = turned(unit(row @ w["q_DNH"][:, n], w["q_norm_H"]), t)
      k = n // c.group_size
      weight = np.exp([query @ keys[k][s] / np.sqrt(c.head_dim) for s in range(t + 1)])
      seen = np.einsum("s,sh->h", weight / weight.sum(), np.array(values[k][: t + 1]))
      out += seen @ w["o_NHD"][n]
    normed_t = unit(out, w["ffn_norm_D"])
    gate = normed_t @ w["gate_DF"]
    after[t] = out + (gate / (1 + np.exp(-gate)) * (normed_t @ w["up_DF"])) @ w["down_FD"]
  return after


def test_logits_equal_those_of_blocks_in_float64():
  net = model()
  tree = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(net)))
  tokens = np.random.default_rng(1).integers(0, CONFIG.vocab_size, 17)
  x = tree["embedding_VD"][tokens]
  for layer in range(CONFIG.num_layers):
    x = block(x, {n: params.get(tree, path)[layer] for n, path in params.layer_names(CONFIG)})
  wanted = np.stack([unit(row, tree["final_norm"]["scale_D"]) for row in x]) @ tree["head_DV"]
  logits, _ = net(jnp.asarray(tokens)[None])
  assert np.abs(logits[0] - wanted).max() < 2e-4 * np.abs(wanted).max()
  cache = net.new_cache(batch=1, capacity=128)
  for start, length in ((0, 9), (9, 1), (10, 7)):
    part = jnp.asarray(tokens)[None, start : start + length]
    cached, cache = net(part, cache=cache, start_B=jnp.array([start]))
    rows = wanted[start : start + length]
    assert np.abs(cached[0] - rows).max() < 2e-4 * np.abs(wanted).max()


def test_the_scale_of_queries_and_keys_does_not_matter():
  """Doubling a projection changes nothing but what eps adds: so it does reach the norm."""
  net = model(dataclasses.replace(CONFIG, norm_eps=1e-12))
  tokens = jnp.arange(11)[None]
  before, _ = net(tokens)
  for name in ("q_DNH", "k_DKH"):
    weight = getattr(net.layers.attention, name)
    weight.set_value(2 * weight.get_value())
  after, _ = net(tokens)
  np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["q_norm", "k_norm"])
def test_every_layer_has_norms_of_its_own(name: str):
  net = model()
  before, _ = net(jnp.arange(11)[None])
  scale = getattr(net.layers.attention, name).scale_D
  kept = scale.get_value()
  assert kept.shape == (CONFIG.num_layers, CONFIG.head_dim)
  for layer in range(CONFIG.num_layers):
    # All alike would only make the softmax sharper.
    scale.set_value(kept.at[layer].multiply(jnp.linspace(0.5, 2, CONFIG.head_dim)))
    changed, _ = net(jnp.arange(11)[None])
    assert np.abs(changed - before).max() > 1e-3


def test_any_cut_gives_the_whole_models_logits():
  net = model()
  tokens = jnp.arange(13)[None]
  whole, _ = net(tokens)
  for ends in ((1,), (2,), (1, 2)):
    x = tokens
    for first, after in itertools.pairwise((0, *ends, CONFIG.num_layers)):
      x, _ = cut(net, Span(first_layer=first, last_layer=after - 1, num_layers=3))(x)
    np.testing.assert_array_equal(x, whole)


def test_a_model_without_them_has_no_such_parameters():
  plain = nnx.to_pure_dict(nnx.state(model(dataclasses.replace(CONFIG, qk_norm=False))))
  assert set(plain["layers"]["attention"]) == {"q_DNH", "k_DKH", "v_DKH", "o_NHD"}
  normed = nnx.to_pure_dict(nnx.state(model()))
  assert set(normed["layers"]["attention"]) - set(plain["layers"]["attention"]) == {
    "q_norm", "k_norm",
  }  # fmt: skip
