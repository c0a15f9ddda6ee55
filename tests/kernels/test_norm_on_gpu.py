"""The norm whose sums have one order, on a GPU: the same bits in any number of rows."""

import jax
import jax.numpy as jnp
import pytest

from neurojax.kernels import norm
from neurojax.kernels.decode import reference
from tests.kernels import hopper

pytestmark = hopper.needed

MOST, EPS = 2048, 1e-6


@pytest.mark.parametrize("width", [128, 4096])
@pytest.mark.parametrize("m", [1, 8, 64, 256, MOST])
def test_a_row_has_the_same_bits_in_any_number_of_rows(m: int, width: int):
  x = jax.random.normal(jax.random.key(0), (MOST, width))
  scale = 1 + jax.random.normal(jax.random.key(1), (width,)) / 4
  run = jax.jit(lambda x: norm.normalise(x, scale, EPS))
  together, few = run(x), run(x[:m])
  assert int((few != together[:m]).sum()) == 0
  wanted = reference.normalise(x[:m], scale, EPS)
  assert float(jnp.abs(few - wanted).max() / jnp.abs(wanted).max()) < 1e-6
