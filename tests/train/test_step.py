"""One step: gradients against a plain model, passes, what is not finite, causality."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from neurojax.layout import replicated, sharding
from neurojax.model import params
from neurojax.model.neurollm import NeuroLLM
from neurojax.train import parameters
from neurojax.train.config import Quantization
from neurojax.train.step import make_eval_step, make_layers, make_loss
from tests.train import tiny


def dense(config, values) -> NeuroLLM:
  """The plain model with these arrays, by canonical name."""
  graph, state = nnx.split(NeuroLLM.abstract(config.model))
  pure = {}
  for name, value in values.items():
    path = {**params.FIRST, **params.LAST, **params.LAYER}[name]
    params.put(pure, path, value)
  nnx.replace_by_pure_dict(state, pure)
  return nnx.merge(graph, state)


def plain_loss(config, values, tokens):
  logits, _ = dense(config, values)(tokens[:, :-1])
  picked = jax.nn.log_softmax(logits)
  return -jnp.take_along_axis(picked, tokens[:, 1:, None], -1).mean()


def values_of(seen):
  return {name: jax.tree.leaves(value)[0] for name, value in seen.items()}


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_of_a_plain_model_at_the_rounded_weights(tied: bool):
  """Straight-through: the gradient where products are, taken for the master weights'."""
  config = tiny.config(
    model=dataclasses.replace(tiny.MODEL, tied_embedding=tied, qk_norm=tied),
    quantization=Quantization(weights="ternary", group_size=64),
  )
  on = tiny.mesh(config)
  tokens = jnp.asarray(tiny.batch(config, 0))
  seen = tiny.seen(config)
  loss = make_loss(config, on)
  (value, _), found = tiny.jit(jax.value_and_grad(loss, has_aux=True))(seen, tokens)
  wanted, gradients = tiny.jit(jax.value_and_grad(lambda v: plain_loss(config, v, tokens)))(
    values_of(seen)
  )
  assert value == pytest.approx(float(wanted), rel=1e-6)
  assert set(found) == set(gradients) == set(parameters.names(config.model))
  for name, gradient in values_of(found).items():
    assert np.abs(gradient).max() > 0, name
    tolerance = 1e-4 * float(np.abs(gradients[name]).max())
    np.testing.assert_allclose(gradient, gradients[name], atol=tolerance, err_msg=name)


def test_a_seed_gives_every_matrix_the_same_initial_weights_for_good():
  numbers = {
    "embedding_VD": 0, "head_DV": 2, "q_DNH": 4, "k_DKH": 5, "v_DKH": 6, "o_NHD": 10, "gate_DF": 12,
    "up_DF": 13, "down_FD": 15,
  }  # fmt: skip
  model = dataclasses.replace(tiny.MODEL, tied_embedding=False)
  found = parameters.initial(model, 5)
  assert numbers.keys() == {name for name in found if params.is_matrix(name)}
  for name, number in numbers.items():
    std = 0.02 / (2 if name in ("o_NHD", "down_FD") else 1)
    key = jax.random.fold_in(jax.random.key(5), number)
    np.testing.assert_array_equal(found[name], std * jax.random.normal(key, found[name].shape))


def test_what_is_computed_anew_changes_no_number():
  losses = {}
  for remat, unroll in (("none", 1), ("dots", 2), ("full", 1)):
    config = tiny.config(remat=remat, unroll=unroll, quantization=tiny.TERNARY)
    seen = tiny.seen(config)
    loss = make_loss(config, tiny.mesh(config))
    tokens = jnp.asarray(tiny.batch(config, 0))
    losses[remat] = tiny.jit(jax.value_and_grad(loss, has_aux=True))(seen, tokens)
  for remat in ("dots", "full"):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
      losses[remat],
      losses["none"],
    )


def test_passes_add_up_to_the_whole_batch():
  whole = tiny.config(batch_size=8, quantization=tiny.TERNARY, z_loss=1e-3)
  parts = tiny.config(batch_size=2, accumulation=4, quantization=tiny.TERNARY, z_loss=1e-3)
  (metrics, state), (found, other) = tiny.run(whole), tiny.run(parts)
  for a, b in zip(metrics, found, strict=True):
    assert a == pytest.approx(b, rel=2e-4)
  for name, w in state.params.items():
    np.testing.assert_allclose(w, other.params[name], atol=2e-4, err_msg=name)


def test_metrics_say_what_was_done():
  config = tiny.config(batch_size=8, quantization=tiny.TERNARY, z_loss=1e-3)
  first = tiny.run(config, 1)[0][0]
  assert first["tokens"] == 8 * tiny.SEQ_LEN and first["finite"] == 1
  assert first["loss"] == pytest.approx(np.log(64), rel=0.02)
  assert first["objective"] == pytest.approx(first["loss"] + 1e-3 * np.log(64) ** 2, rel=1e-3)
  # Of a normal distribution, 31% lie within half the mean of its absolute values.
  assert first["zeros"] == pytest.approx(0.310, abs=0.01)
  assert first["learning_rate"] == pytest.approx(3e-3)
  assert first["weight_decay"] == pytest.approx(0.1)


def test_a_gradient_that_is_not_finite_changes_nothing_but_the_count():
  config = tiny.config(batch_size=8, quantization=tiny.TERNARY, z_loss=1e-3)
  on = tiny.mesh(config)
  state = tiny.start(config)
  weights = {**state.params, "final_norm_D": state.params["final_norm_D"].at[3].set(jnp.inf)}
  state = dataclasses.replace(state, params=weights)
  before = jax.tree.map(np.asarray, state)
  tokens = jax.device_put(tiny.batch(config, 0), sharding(on, "BT"))
  after, metrics = tiny.compiled(config)(state, tokens)
  assert metrics["finite"] == 0 and not np.isfinite(metrics["loss"])
  assert after.step == 1
  after = dataclasses.replace(after, step=before.step)
  jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.parametrize("quantization", [Quantization(), tiny.TERNARY], ids=["bf16", "ternary"])
def test_causality_by_gradients(quantization):
  """Tokens differ, so that each row of the embedding is one position."""
  config = tiny.config(quantization=quantization)
  layers = make_layers(config, tiny.mesh(config))
  seen = tiny.seen(config)
  tokens = jnp.asarray(np.random.default_rng(0).permutation(64)[None, :12], jnp.int32)

  @tiny.jit
  def gradient(position):
    def at(table_VD):
      return layers({**seen, "embedding_VD": table_VD}, tokens)[0, position].sum()

    return jax.grad(at)(seen["embedding_VD"])

  for position in (0, 5, 11):
    moved = np.abs(np.asarray(gradient(position)))[np.asarray(tokens[0])].max(-1) > 0
    assert moved.tolist() == [t <= position for t in range(12)]


def test_evaluation_sums_the_nats_of_all_targets():
  config = tiny.config(quantization=Quantization(weights="ternary"))
  on = tiny.mesh(config)
  weights = jax.device_put(tiny.weights(), replicated(on))
  tokens = tiny.batch(config, 4)
  nats, count = make_eval_step(config, on)(weights, jax.device_put(tokens, sharding(on, "BT")))
  assert count == 8 * tiny.SEQ_LEN
  values = values_of(tiny.seen(config))
  wanted = tiny.jit(lambda values: plain_loss(config, values, jnp.asarray(tokens)))(values)
  assert nats / count == pytest.approx(float(wanted), rel=1e-5)


def dots(jaxpr):
  """All products of a program, those of loops and of what is computed anew too."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      yield equation
    for inner in jaxprs_in_params(equation.params):
      yield from dots(inner)


@pytest.mark.parametrize("quantization", [Quantization(), tiny.TERNARY], ids=["bf16", "ternary"])
def test_in_bfloat16_no_product_but_the_plain_attentions_has_a_float32_factor(quantization):
  """One would be multiplied at a fraction of a GPU's speed."""
  config = tiny.config(compute_dtype="bfloat16", quantization=quantization)
  loss = make_loss(config, tiny.mesh(config))
  tokens = jnp.asarray(tiny.batch(config, 0))
  gradient = jax.make_jaxpr(jax.grad(loss, has_aux=True))(tiny.seen(config), tokens)
  found = [
    {factor.aval.dtype.name for factor in equation.invars}
    for equation in dots(gradient.jaxpr)
    # The heads of plain attention have five axes, as have its scores.
    if max(factor.aval.ndim for factor in equation.invars) < 5
  ]
  # Seven matrices and the head, once forward and twice backward.
  assert len(found) == 8 * 3 and all(kinds == {"bfloat16"} for kinds in found)
