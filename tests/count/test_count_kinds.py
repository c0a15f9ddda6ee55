"""Counts of architectures beyond the plain decoder, against the trees that they become."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from neurojax import count, forms
from neurojax.config import LayerKind, ModelConfig, Span
from neurojax.measure.random_model import random_model
from neurojax.model.neurollm import NeuroLLM
from tests.scaling.shapes import CONFIGS, EVERY, configs


@st.composite
def beyond_plain(draw) -> ModelConfig:
  """Kinds of layers, experts, biases and all norms, in any valid combination."""
  config = draw(configs())
  attention = [
    LayerKind(
      head_dim=draw(st.sampled_from([None, 4, 18])),
      num_kv_heads=draw(st.sampled_from([None, config.num_heads, 1])),
      shared_kv=draw(st.booleans()),
      sliding_window=draw(st.sampled_from([None, 3])),
    )
    for _ in range(draw(st.integers(1, 3)))
  ]
  kinds = attention + [LayerKind(mixer="convolution")] * draw(st.integers(0, 1))
  kinds = kinds[: config.num_layers]
  pattern = draw(st.permutations(range(len(kinds))))
  has_conv = any(kind.mixer == "convolution" for kind in kinds)
  experts = 0 if config.sub_norm else draw(st.sampled_from([0, 3]))
  return dataclasses.replace(
    config,
    layer_kinds=tuple(kinds),
    layer_pattern=tuple(pattern),
    conv_width=draw(st.integers(2, 4)) if has_conv else 0,
    num_experts=experts,
    experts_per_token=min(experts, 2),
    qkv_bias=draw(st.booleans()),
    post_norm=draw(st.booleans()),
    layer_scale=draw(st.booleans()),
  )


def nbytes(tree) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@given(config=beyond_plain(), first=st.integers(0, 5), length=st.integers(1, 6))
@settings(max_examples=8, deadline=None)
def test_any_span_of_any_kinds(config: ModelConfig, first: int, length: int):
  first %= config.num_layers
  last = min(first + length, config.num_layers) - 1
  span = Span(first_layer=first, last_layer=last, num_layers=config.num_layers)
  part = NeuroLLM.abstract(config, span=span, dtype=jnp.bfloat16)
  assert nbytes(nnx.state(part)) == 2 * count.span_parameters(config, span)
  cache = jax.eval_shape(lambda: part.new_cache(batch=1, capacity=256))
  held = nbytes(cache)
  assert held == count.span_cache_bytes(config, span, capacity=256, dtype="bfloat16")
  assert held <= count.cache_bytes(config, len(span), capacity=256, dtype="bfloat16")
  assert count.parameters(config) == count.span_parameters(config, Span.whole(config))
  # What is said of any layer has room for each.
  layers = [
    count.layer_bytes(config, dtype="float32", weights="int8", layer=i) for i in range(last)
  ]
  assert max(layers, default=0) <= count.layer_bytes(config, dtype="float32", weights="dense")


@pytest.mark.parametrize("path", sorted({*EVERY} - {*CONFIGS}), ids=lambda path: path.stem)
def test_configurations_kept_here(path: Path):
  config = ModelConfig.load(path)
  whole = NeuroLLM.abstract(config, dtype=jnp.bfloat16)
  assert nbytes(nnx.state(whole)) == 2 * count.parameters(config)
  cache = jax.eval_shape(lambda: whole.new_cache(batch=1, capacity=1024))
  held = count.cache_bytes(config, config.num_layers, capacity=1024, dtype="bfloat16")
  assert nbytes(cache) == held


def test_parameters_of_published_models():
  """As their pages and papers say."""
  said = {"llama-3.1-8b": 8.03e9, "mistral-7b": 7.24e9, "qwen2.5-7b": 7.62e9, "lfm2-1.2b": 1.17e9}
  said |= {"gemma-3-27b": 27.0e9, "gemma-4-31b": 30.7e9, "bitnet-2b": 2.41e9}
  for name, number in said.items():
    assert count.parameters(ModelConfig.named(name)) == pytest.approx(number, rel=5e-3), name


@given(config=beyond_plain(), weights=st.sampled_from(["int8", "w2a8"]))
@settings(max_examples=4, deadline=None)
def test_narrow_matrices_of_any_kinds(config: ModelConfig, weights: forms.Weights):
  """Random models hold what a file of ternary matrices, groups of 128, becomes."""
  # Whole bytes of codes.
  config = dataclasses.replace(config, model_dim=8, ffn_dim=12, head_dim=4, vocab_size=6)
  config = dataclasses.replace(
    config, layer_kinds=tuple(dataclasses.replace(k, head_dim=None) for k in config.layer_kinds)
  )
  ternary = count.uniform_ternary(config, forms.Scales(128, 2))
  span = Span.whole(config)
  state = nnx.state(random_model(config, span, weights=weights))
  counted = count.span_bytes(config, span, dtype="float32", weights=weights, forms=ternary)
  assert nbytes(state) == counted


PLAIN = ModelConfig(
  vocab_size=10, model_dim=4, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=2, ffn_dim=5
)


def test_flops_of_a_window():
  """Two heads of 2: a seen key costs 2 x 2 x 2 x 2 operations."""
  slid = dataclasses.replace(PLAIN, sliding_window=3)
  for mode, keys in (("decode", (8, 3)), ("prefill", ((1 + 8) / 2, (1 + 2 + 6 * 3) / 8))):
    without, within = (count.flops_per_token(c, context=8, mode=mode) for c in (PLAIN, slid))
    assert without - within == 2 * 16 * (keys[0] - keys[1]), mode


def test_flops_of_experts_are_of_the_chosen():
  mixed = dataclasses.replace(PLAIN, num_experts=7, experts_per_token=3)
  ffn = 2 * 3 * 4 * 5
  plain, chosen = (count.flops_per_token(c, context=1, mode="prefill") for c in (PLAIN, mixed))
  assert chosen - plain == 2 * (2 * ffn + 2 * 4 * 7)


def test_flops_of_a_convolution():
  kinds = (LayerKind(mixer="convolution"), LayerKind())
  mixed = dataclasses.replace(PLAIN, layer_kinds=kinds, layer_pattern=(0, 1), conv_width=3)
  span = Span(first_layer=0, last_layer=0, num_layers=2)
  flops = count.flops_per_token(mixed, context=9, mode="prefill", span=span)
  assert flops == 2 * (4 * 12 + 4 * 4 + 3 * 4 * 5 + 3 * 4)
  assert count.span_cache_bytes(mixed, span, capacity=128, dtype="float32") == 2 * 4 * 4


def test_a_layer_of_no_number_is_one_that_takes_most():
  kinds = (LayerKind(), LayerKind(head_dim=8))
  mixed = dataclasses.replace(PLAIN, layer_kinds=kinds, layer_pattern=(0, 1))
  assert count.layer_matrices(mixed) == count.layer_matrices(mixed, 1)
  assert count.layer_matrices(mixed, 0)["q_DNH"] == (4, 4)
