"""Rounding to int8 together with what makes the rows: the levels and steps of the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurojax.kernels import rounding
from neurojax.kernels.decode.reference import normalise
from neurojax.kernels.gemm import levels
from neurojax.kernels.gemm.levels import Levels

EPS = 1e-5
ORDERS = ("planes", "blocks")


def array(*shape: int, seed: int = 0) -> jax.Array:
  """Rows of very different sizes."""
  rng = np.random.default_rng((*shape, seed))
  x = rng.standard_normal(shape) * 10.0 ** rng.integers(-2, 3, (*shape[:-1], 1))
  return jnp.asarray(x, jnp.float32)


def assert_same(a: Levels, b: Levels):
  assert (a.rows, a.order) == (b.rows, b.order)
  values, wanted = (v.values if v.order == "planes" else v.values[: v.rows] for v in (a, b))
  np.testing.assert_array_equal(values, wanted)
  np.testing.assert_array_equal(a.steps[: a.rows], b.steps[: b.rows])
  assert a.values.shape == b.values.shape and a.steps.shape == b.steps.shape


def test_orders_by_hand():
  rows = jnp.arange(128, dtype=jnp.int8)[None] + jnp.asarray([[0], [-128]], jnp.int8)
  planes, blocks = (np.asarray(levels.arrange(rows, order)) for order in ORDERS)
  assert planes.shape == (4, 2, 32) and blocks.shape == (8, 128)
  for j, y in ((0, 0), (3, 0), (2, 17), (1, 31)):
    assert planes[j, 0, y] == 4 * y + j
    assert blocks[0, 64 * (y // 16) + 16 * j + y % 16] == 4 * y + j
  np.testing.assert_array_equal(planes[:, 1] ^ -128, planes[:, 0])
  assert not blocks[2:].any()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(1, 64), (3, 192), (8, 256), (9, 4096)], ids=str)
def test_rows_are_rounded_as_the_definition_says(shape, order):
  for x in (array(*shape), array(*shape).astype(jnp.bfloat16)):
    assert_same(rounding.rounded(x, order=order, interpret=True), levels.quantize(x, order))


@pytest.mark.parametrize("order", ORDERS)
def test_rows_without_a_scale_or_a_number(order):
  x = array(6, 128)
  x = x.at[1].set(0).at[2, 5].set(jnp.nan).at[3, 7].set(-jnp.inf).at[4].set(1e-38)
  out = rounding.rounded(x, order=order, interpret=True)
  assert_same(out, levels.quantize(x, order))
  assert np.isnan(out.steps[2:4]).all() and (np.asarray(out.steps)[[1, 4]] == 0).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("parts", [None, 1, 3])
@pytest.mark.parametrize("shape", [(1, 64), (5, 192), (3, 4096)], ids=str)
def test_a_norm_is_added_to_and_rounded(shape, parts, order):
  x, scale, layer = array(*shape), array(3, shape[1], seed=1), jnp.int32(2)
  added = None if parts is None else array(parts, *shape, seed=2)
  out, found = rounding.normalised(x, added, scale, layer, eps=EPS, order=order, interpret=True)
  wanted = x
  if parts is not None:
    total = added[0]
    for part in added[1:]:
      total = total + part
    wanted = x + total
  np.testing.assert_array_equal(out, wanted)
  # Squares are added up in another order here: a level next to a half may go either way.
  exact = levels.quantize(normalise(wanted, scale[2], EPS), order)
  values, wanted = (
    np.asarray(v.values if order == "planes" else v.values[: v.rows], np.int32)
    for v in (found, exact)
  )
  difference = np.abs(values - wanted)
  assert difference.max() <= 1 and difference.mean() < 1e-3
  np.testing.assert_allclose(found.steps[: found.rows], exact.steps[: exact.rows], rtol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("m", "f"), [(1, 64), (5, 384), (2, 12288)])
def test_gate_and_up_are_rounded(m, f, dtype, order):
  both = (array(m, 2 * f) / 10).astype(dtype)
  gate, up = jnp.split(both.astype(jnp.float32), 2, axis=1)
  hidden = (jax.nn.silu(gate) * up).astype(dtype)
  found = rounding.gated(both, dtype=dtype, order=order, interpret=True)
  assert_same(found, levels.quantize(hidden, order))


@pytest.mark.parametrize("order", ORDERS)
def test_a_row_has_the_same_bits_in_any_number_of_rows(order):
  x, added, scale = array(20, 256), array(2, 20, 256), array(1, 256)

  def run(rows: slice) -> tuple[jax.Array, Levels, Levels]:
    out, found = rounding.normalised(
      x[rows], added[:, rows], scale, 0, eps=EPS, order=order, interpret=True
    )
    hidden = rounding.gated(x[rows], dtype=jnp.float32, order=order, interpret=True)
    return out, found, hidden

  together = run(slice(None))
  for rows in (slice(0, 1), slice(3, 10), slice(19, 20)):
    few = run(rows)
    np.testing.assert_array_equal(few[0], together[0][rows])
    for a, b in zip(few[1:], together[1:], strict=True):
      kept = b.values[:, rows] if order == "planes" else b.values[rows]
      mine = a.values if order == "planes" else a.values[: a.rows]
      np.testing.assert_array_equal(mine, kept)
      np.testing.assert_array_equal(a.steps[: a.rows], b.steps[rows])


def test_widths_that_no_order_has_are_refused():
  with pytest.raises(ValueError, match="rows of 100 elements"):
    rounding.rounded(array(2, 100), order="planes", interpret=True)
