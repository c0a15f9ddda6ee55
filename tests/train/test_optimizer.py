"""Schedules by their own words, and updates against optax or arithmetic by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from neurojax.train import optimizer, parameters
from neurojax.train.config import OptimizerConfig
from tests.train import tiny


def rates(**options) -> list[float]:
  config = tiny.config(optimizer=OptimizerConfig(**{"peak_lr": 1.0, **options}), steps=20)
  return [float(optimizer.learning_rate(config, jnp.int32(step))) for step in range(21)]


def test_warm_up_rises_and_the_decay_ends_one_step_past_the_last():
  found = rates(warmup_steps=4)
  np.testing.assert_allclose(found[:5], [0.25, 0.5, 0.75, 1, 1], rtol=1e-6)
  np.testing.assert_allclose(found[4:], 1 - np.arange(17) / 16, rtol=1e-6, atol=1e-7)
  assert rates()[0] == 1 and rates(decay="constant")[-1] == 1
  assert rates(decay="cosine", final_fraction=0.1)[-1] == pytest.approx(0.1)
  assert rates(decay="cosine")[10] == pytest.approx(0.5)


def test_the_second_stage_falls_at_once_to_a_lower_line():
  """1.5e-3 -> 1e-3 at half way in the published recipe: one decay, two peaks."""
  one, two = rates(warmup_steps=2), rates(warmup_steps=2, second_lr=2 / 3)
  assert two[:10] == one[:10]
  np.testing.assert_allclose(two[10:], np.multiply(one[10:], 2 / 3), rtol=1e-6)
  config = tiny.config(
    optimizer=OptimizerConfig(peak_lr=1.0, weight_decay=0.1, second_weight_decay=0.0), steps=20
  )
  decays = [float(optimizer.weight_decay(config, jnp.int32(step))) for step in range(20)]
  np.testing.assert_allclose(decays, [0.1] * 10 + [0.0] * 10, rtol=1e-6)


def gradients() -> dict[str, jax.Array]:
  rng = np.random.default_rng(0)
  return {
    n: jnp.asarray(rng.standard_normal(w.shape), jnp.float32) for n, w in tiny.weights().items()
  }


def test_the_steps_are_optax_adamws():
  config = OptimizerConfig(peak_lr=1e-2, weight_decay=0.3)
  theirs = optax.adamw(
    1e-2, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.3,
    mask={name: "_norm_" not in name for name in tiny.weights()},
  )  # fmt: skip
  ours = optimizer.transform(config)
  a = b = tiny.weights()
  state, wanted = ours.init(a), theirs.init(b)
  for _ in range(3):
    updates, state = ours.update(gradients(), state, a)
    a = optimizer.move(a, updates, jnp.float32(1e-2), jnp.float32(0.3))
    updates, wanted = theirs.update(gradients(), wanted, b)
    b = optax.apply_updates(b, updates)
  for name in a:
    np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_muon_orthogonalizes_each_layers_matrix_and_nothing_else():
  transform = optimizer.transform(OptimizerConfig(peak_lr=1.0, name="muon"))
  updates, _ = transform.update(gradients(), transform.init(tiny.weights()), tiny.weights())
  adam = optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-8, nesterov=True)
  wanted, _ = adam.update(gradients(), adam.init(tiny.weights()))
  for name, update in updates.items():
    if not parameters.is_projection(name):
      np.testing.assert_allclose(update, -wanted[name], rtol=1e-5, atol=1e-6, err_msg=name)
      continue
    for layer in np.asarray(update, np.float64):
      k = layer.shape[0] * (layer.shape[1] if name == "o_NHD" else 1)
      matrix = layer.reshape(k, -1)
      singular = np.linalg.svd(matrix, compute_uv=False) / (0.2 * max(matrix.shape) ** 0.5)
      # Newton-Schulz' five rounds bring them near 1, by design not to it, and the least ones less so.
      assert np.quantile(singular, 0.1) > 0.5 and singular.max() < 1.35, name


def test_a_gradient_is_clipped_as_a_whole():
  small = {"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}
  for limit, scale in ((2.5, 0.5), (5.0, 1.0), (None, 1.0), (50.0, 1.0)):
    clipped, norm = optimizer.clip(small, limit)
    assert norm == 5.0
    np.testing.assert_allclose(clipped["b"], [[4.0 * scale]], rtol=1e-6)


@pytest.mark.parametrize(("change", "message"), [
  ({"peak_lr": 0.0}, "peak_lr = 0.0"), ({"beta2": 1.0}, "beta2 = 1.0"),
  ({"second_stage": 0.0}, "second_stage = 0.0"), ({"weight_decay": -1.0}, "weight_decay"),
  ({"final_fraction": 2.0}, "final_fraction"), ({"warmup_steps": -1}, "warmup_steps"),
  ({"clip_norm": 0.0}, "clip_norm"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused_by_name(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(OptimizerConfig(peak_lr=1.0), **change)
