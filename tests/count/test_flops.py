"""FLOPs against the products in the jaxpr of the real model."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from neurojax import count
from neurojax.config import ModelConfig, Span
from neurojax.model.neurollm import NeuroLLM
from tests.scaling.shapes import CONFIGS, configs


def dot_flops(jaxpr) -> int:
  """2 * m * n * k of every product in a jaxpr, loops unrolled."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      k = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
      total += 2 * math.prod(eqn.outvars[0].aval.shape) * k
    times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    for inner in jaxprs_in_params(eqn.params):
      total += times * dot_flops(inner)
  return total


def traced_flops(config: ModelConfig, batch: int, sequence: int, *, train: bool) -> int:
  graph, state = nnx.split(NeuroLLM.abstract(config))

  def loss(state, tokens):
    return nnx.merge(graph, state)(tokens)[0].sum()

  tokens = jax.ShapeDtypeStruct((batch, sequence), jnp.int32)
  run = jax.grad(loss) if train else loss
  return dot_flops(jax.make_jaxpr(run)(state, tokens).jaxpr)


def masked_flops(config: ModelConfig, sequence: int) -> int:
  """Scores and values that the model computes and masks, per token: keys after the query."""
  heads = config.num_layers * config.num_heads * config.head_dim
  return 2 * 2 * heads * sequence - 2 * heads * (sequence + 1)


@given(config=configs(), batch=st.integers(1, 3), sequence=st.integers(1, 50))
@settings(max_examples=7, deadline=None)
def test_forward_and_training_equal_the_products_of_the_traced_model(config, batch, sequence):
  tokens = batch * sequence
  masked = masked_flops(config, sequence)
  forward = count.flops_per_token(config, context=sequence, mode="prefill")
  forward += count.head_flops(config)
  assert tokens * (forward + masked) == traced_flops(config, batch, sequence, train=False)
  train = count.flops_per_token(config, context=sequence, mode="train")
  assert train == 3 * forward
  assert tokens * (train + 3 * masked) == traced_flops(config, batch, sequence, train=True)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_named_architecture(path):
  config = ModelConfig.load(path)
  prefill = count.flops_per_token(config, context=512, mode="prefill")
  whole = 512 * (prefill + count.head_flops(config) + masked_flops(config, 512))
  assert whole == traced_flops(config, 1, 512, train=False)


@given(config=configs(), context=st.integers(1, 10**6), cut=st.integers(0, 100))
@settings(max_examples=100, deadline=None)
def test_stages_add_up_to_the_model_and_prefill_to_the_decodes(config, context, cut):
  cut %= config.num_layers
  for mode in ("prefill", "decode", "train"):
    spans = [Span(first_layer=0, last_layer=cut, num_layers=config.num_layers)]
    if cut + 1 < config.num_layers:
      last = config.num_layers - 1
      spans.append(Span(first_layer=cut + 1, last_layer=last, num_layers=config.num_layers))
    parts = [count.flops_per_token(config, context=context, mode=mode, span=span) for span in spans]
    assert sum(parts) == count.flops_per_token(config, context=context, mode=mode)
  first, last = (
    count.flops_per_token(config, context=keys, mode="decode") for keys in (1, context)
  )
  prefill = count.flops_per_token(config, context=context, mode="prefill")
  # The mean of 1 .. context keys.
  assert 2 * (prefill + count.head_flops(config)) == first + last


def test_attention_is_what_is_left_of_two_per_parameter():
  config = ModelConfig.named("tinyllama-1.1b")
  vectors = (2 * config.num_layers + 1) * config.model_dim
  lookup = config.vocab_size * config.model_dim
  products = 2 * (count.parameters(config) - vectors - lookup)
  decode = count.flops_per_token(config, context=2048, mode="decode")
  assert decode - products == 4 * 22 * 2048 * 2048
  with pytest.raises(ValueError, match="context = 0"):
    count.flops_per_token(config, context=0, mode="decode")
  tied = dataclasses.replace(config, tied_embedding=True)
  assert count.flops_per_token(tied, context=2048, mode="decode") == decode
