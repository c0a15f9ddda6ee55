"""What is exported is what was trained: codes, scales and the loss."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from neurojax.layout import Layout
from neurojax.train import parameters
from neurojax.train.config import Quantization
from neurojax.train.deploy import deploy
from neurojax.weights import quantize
from neurojax.weights.ternary import TernaryArray
from tests.train import tiny
from tests.train.test_step import dense, plain_loss, values_of

MATRICES = ("q_DNH", "k_DKH", "v_DKH", "o_NHD", "gate_DF", "up_DF", "down_FD")


@pytest.mark.parametrize("group_size", [64, None])
def test_the_deployed_model_has_the_trained_models_numbers(group_size: int | None):
  config = tiny.config(quantization=Quantization(weights="ternary", group_size=group_size))
  master, seen = tiny.weights(), values_of(tiny.seen(config))
  found = deploy(master, config)
  assert set(found) == set(parameters.names(config.model))
  for name, array in found.items():
    if name not in MATRICES:
      assert not isinstance(array, TernaryArray)
      np.testing.assert_array_equal(np.asarray(array, np.float32), seen[name], err_msg=name)
      continue
    assert array.scales.dtype == np.float16 and array.mode == "w2a16"
    values = jax.tree.map(jnp.asarray, array).dequantize()
    np.testing.assert_array_equal(values, seen[name], err_msg=name)
    for layer, w in enumerate(np.asarray(master[name])):
      wanted = quantize.absmean(
        w, array.contracted_axes, group_size=group_size, scale_dtype="bfloat16"
      )
      np.testing.assert_array_equal(array.codes[layer], wanted.codes)
      np.testing.assert_array_equal(np.float32(array.scales[layer]), np.float32(wanted.scales))
  assert found["embedding_VD"].dtype == ml_dtypes.bfloat16


def test_the_deployed_model_has_the_trained_models_loss():
  """Through the programs that run files: products of packed weights."""
  config = tiny.config(quantization=Quantization(weights="ternary", group_size=64))
  tokens = jnp.asarray(tiny.batch(config, 5))
  wanted = tiny.jit(lambda v: plain_loss(config, v, tokens))(values_of(tiny.seen(config)))
  packed = {
    name: jax.tree.map(jnp.asarray, array) if isinstance(array, TernaryArray) else array
    for name, array in deploy(tiny.weights(), config).items()
  }
  outer = {n: jnp.asarray(a, jnp.float32) for n, a in packed.items() if n not in MATRICES}
  model = dense(config, {**packed, **outer})
  # With a cache, as a run has it: layers by index, packed weights in place.
  cache = model.new_cache(batch=8, capacity=128)
  logits, _ = model(tokens[:, :-1], cache=cache, start_B=jnp.zeros(8, jnp.int32))
  picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1)
  assert -picked.mean() == pytest.approx(float(wanted), rel=1e-5)


def test_without_ternary_weights_it_is_the_compute_dtype():
  found = deploy(tiny.weights(), tiny.config(compute_dtype="bfloat16"))
  assert {found[name].dtype for name in MATRICES} == {np.dtype(ml_dtypes.bfloat16)}
  exact = deploy(tiny.weights(), tiny.config(quantization=Quantization(outer="float32")))
  for name, w in tiny.weights().items():
    np.testing.assert_array_equal(exact[name], w)


def test_weights_spread_over_a_mesh_give_the_same_bits():
  one = tiny.config(quantization=tiny.TERNARY)
  many = dataclasses.replace(one, layout=Layout(data=2, fsdp=2, tensor=2))
  on = tiny.mesh(many)
  spread = {
    name: jax.device_put(w, parameters.where(on, name)) for name, w in tiny.weights().items()
  }
  for a, b in zip(
    jax.tree.leaves(deploy(spread, many)), jax.tree.leaves(deploy(tiny.weights(), one)), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def test_damaged_weights_are_named():
  weights = dict(tiny.weights())
  weights["up_DF"] = weights["up_DF"].at[0, 1, 2].set(jnp.nan)
  with pytest.raises(ValueError, match="up_DF holds NaN"):
    deploy(weights, tiny.config())
  weights["up_DF"] = tiny.weights()["up_DF"] * 1e8
  with pytest.raises(ValueError, match="up_DF: a scale is beyond float16"):
    deploy(weights, tiny.config(quantization=tiny.TERNARY))
