"""The definition: rounding of rows, and its own bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurojax.kernels.gemm import reference
from neurojax.kernels.gemm.reference import quantize_rows
from neurojax.weights.ternary import SMALLEST_ABSMAX
from tests.kernels.gemm import problem


def test_rows_are_rounded_half_to_even_in_these_very_operations():
  x = problem.rows(40, 300)
  x[0, :5] = (127, 0.5, 1.5, 2.5, -0.5)
  x[0, 5:] = 0
  levels, steps = problem.quantized(x)
  for f in (quantize_rows, jax.jit(quantize_rows)):
    got_levels, got_steps = f(x)
    assert got_levels.dtype == jnp.int8 and got_steps.dtype == jnp.float32
    np.testing.assert_array_equal(got_levels, levels)
    np.testing.assert_array_equal(got_steps, steps)
  assert got_levels[0, :5].tolist() == [127, 0, 2, 2, 0]


def test_a_level_is_within_half_a_step():
  x = problem.rows(30, 257, seed=3)
  levels, steps = (np.asarray(a, np.float64) for a in quantize_rows(x))
  assert (np.abs(levels * steps[:, None] - x) <= steps[:, None] * (0.5 + 1e-5)).all()
  assert (np.abs(levels).max(1) == 127).all()


def test_bfloat16_rows_are_rounded_as_the_float32_they_are():
  x = jnp.asarray(problem.rows(4, 64), jnp.bfloat16)
  for narrow, wide in zip(quantize_rows(x), quantize_rows(x.astype(jnp.float32)), strict=True):
    np.testing.assert_array_equal(narrow, wide)


def test_rows_that_have_no_levels():
  x = np.ones((5, 8), np.float32)
  x[0] = 0
  x[1] = SMALLEST_ABSMAX / 2
  x[2, 3] = np.nan
  x[3, 3] = -np.inf
  levels, steps = jax.jit(quantize_rows)(x)
  assert (levels[:4] == 0).all() and (levels[4] == 127).all()
  np.testing.assert_array_equal(steps[:4], [0, 0, np.nan, np.nan])


@pytest.mark.parametrize("mode", ("w2a8", "w2a16"))
@pytest.mark.parametrize("group_size", (None, 64, 192, 256))
def test_little_is_unpacked_at_once(mode, group_size):
  n, k = 512, 4096
  w = problem.weight(n, k, group_size, mode)
  compiled = jax.jit(reference.matmul).lower(jnp.ones((2, k)), w).compile()
  # Codes once in order of chunks, and a chunk's weights: never all of them.
  assert compiled.memory_analysis().temp_size_in_bytes < n * k * 4 // 2
