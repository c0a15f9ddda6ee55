"""Norms: their definition, and rows that do not depend on each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurojax.model.norm import normalised, rms_norm

pytestmark = pytest.mark.optimized


@pytest.mark.parametrize("width", [1, 5, 96, 128, 576, 768])
@pytest.mark.parametrize("length", [1, 3])
def test_norms_are_what_they_are_called(width: int, length: int):
  rng = np.random.default_rng(width)
  x_BTD, scale_D = rng.standard_normal((2, length, width)), rng.standard_normal(width)
  wanted = x_BTD / np.sqrt((x_BTD**2).mean(-1, keepdims=True) + 1e-5)
  x32_BTD = jnp.asarray(x_BTD, jnp.float32)
  np.testing.assert_allclose(normalised(x32_BTD, 1e-5), wanted, rtol=2e-5, atol=1e-6)
  found = rms_norm(x32_BTD, jnp.asarray(scale_D, jnp.float32), 1e-5)
  np.testing.assert_allclose(found, wanted * scale_D, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("width", [64, 96, 128, 576, 768, 960])
def test_a_row_of_a_step_has_the_same_bits_beside_any_others(width: int):
  rng = np.random.default_rng(width)
  x_BTD = jnp.asarray(rng.standard_normal((64, 1, width)), jnp.float32)
  scale_D = jnp.asarray(rng.standard_normal(width), jnp.float32)
  norm = jax.jit(lambda x_BTD: rms_norm(x_BTD, scale_D, 1e-5))
  together = np.asarray(norm(x_BTD))
  for rows in (1, 2, 3, 4, 7, 8, 16, 33):
    np.testing.assert_array_equal(norm(x_BTD[:rows]), together[:rows])


def test_so_it_has_where_the_norm_is_over_two_axes():
  rng = np.random.default_rng(0)
  x_BTNH = jnp.asarray(rng.standard_normal((64, 1, 8, 64)), jnp.float32)
  scale_NH = jnp.asarray(rng.standard_normal((8, 64)), jnp.float32)
  norm = jax.jit(lambda x_BTNH: rms_norm(x_BTNH, scale_NH, 1e-5))
  together = np.asarray(norm(x_BTNH))
  x_BNH = np.asarray(x_BTNH)[:, 0]
  wanted_BNH = x_BNH / np.sqrt(np.mean(x_BNH**2, (1, 2), keepdims=True) + 1e-5)
  np.testing.assert_allclose(
    together[:, 0], wanted_BNH * np.asarray(scale_NH), rtol=2e-5, atol=1e-6
  )
  for rows in (1, 2, 4, 8, 16):
    np.testing.assert_array_equal(norm(x_BTNH[:rows]), together[:rows])
