"""The norm whose sums have one order: against float64, and the same bits in any number of rows."""

import jax.numpy as jnp
import numpy as np
import pytest

from neurojax.kernels import norm

EPS = 1e-5


def arrays(*shape: int) -> tuple[np.ndarray, np.ndarray]:
  rng = np.random.default_rng(shape[-1])
  x = rng.standard_normal(shape) * 10.0 ** rng.integers(-2, 3, (*shape[:-1], 1))
  return x.astype(np.float32), rng.normal(1, 0.2, shape[-1]).astype(np.float32)


@pytest.mark.parametrize("shape", [(1, 64), (3, 100), (5, 7, 32), (2, 4096), (3, 4160)], ids=str)
def test_it_is_the_norm_of_float64(shape):
  x, scale = arrays(*shape)
  out = norm.normalise(jnp.asarray(x), jnp.asarray(scale), EPS, interpret=True)
  wide = x.astype(np.float64)
  wanted = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + EPS) * scale
  assert out.shape == shape and out.dtype == jnp.float32
  np.testing.assert_allclose(out, wanted, rtol=2e-6)


@pytest.mark.parametrize("width", [96, 128, 4096])
def test_a_row_has_the_same_bits_in_any_number_of_rows(width: int):
  x, scale = (jnp.asarray(a) for a in arrays(70, width))
  together = norm.normalise(x, scale, EPS, interpret=True)
  for rows in ([0], [69], [3, 68, 7], list(range(33, 70))):
    few = norm.normalise(x[jnp.asarray(rows)], scale, EPS, interpret=True)
    np.testing.assert_array_equal(few, together[jnp.asarray(rows)])


def test_a_nan_stays_in_its_row():
  x, scale = arrays(4, 64)
  x[2, 5] = np.nan
  out = np.asarray(norm.normalise(jnp.asarray(x), jnp.asarray(scale), EPS, interpret=True))
  assert np.isnan(out[2]).all() and np.isfinite(out[[0, 1, 3]]).all()
