"""Rounding to int8 by kernels on a GPU: the levels of the definition, and one order of sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurojax.kernels import rounding
from neurojax.kernels.attention import triton as attention
from neurojax.kernels.decode.reference import normalise
from neurojax.kernels.gemm import bench, levels, mosaic, shapes, triton
from neurojax.kernels.gemm.levels import Levels, Order
from neurojax.stage import rounded
from neurojax.weights.ternary import TernaryArray
from tests.kernels import hopper

pytestmark = hopper.needed

EPS, MOST = 1e-6, 256
ROWS = (1, 7, 8, 64, MOST)
ORDERS = ("planes", "blocks")


def normal(seed: int, *shape: int) -> jax.Array:
  return jax.random.normal(jax.random.key(seed), shape)


def rows_of(x: Levels, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Levels and steps of the first rows, rows first."""
  values = np.asarray(x.values, np.int32)
  values = values.swapaxes(0, 1) if x.order == "planes" else values
  return values[:count], np.asarray(x.steps)[:count]


def on_cpu(x: jax.Array, order: Order) -> Levels:
  """The definition, by a platform whose division is IEEE's."""
  cpu = jax.devices("cpu")[0]
  with jax.default_device(cpu):
    return levels.quantize(jax.device_put(x, cpu), order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("m", ROWS)
def test_rows_have_the_definitions_levels(m: int, order: Order):
  x = normal(m, m, 4096) * 10.0 ** jax.random.randint(jax.random.key(1), (m, 1), -3, 3)
  x = x.at[0, 3].set(jnp.nan) if m > 1 else x
  found = rounding.rounded(x, order=order)
  for a, b in zip(rows_of(found, m), rows_of(on_cpu(x, order), m), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("parts", [None, 1, 4])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("m", ROWS)
def test_a_norm_is_rounded_and_a_row_has_one_order_of_sums(m: int, order: Order, parts):
  x, scale = normal(0, MOST, 4096), 1 + normal(1, 3, 4096) / 4
  added = None if parts is None else normal(2, parts, MOST, 4096)

  def run(m: int):
    few = None if added is None else added[:, :m]
    return rounding.normalised(x[:m], few, scale, jnp.int32(2), eps=EPS, order=order)

  (out, found), (wide_out, wide) = run(m), run(MOST)
  np.testing.assert_array_equal(out, wide_out[:m])
  for a, b in zip(rows_of(found, m), rows_of(wide, m), strict=True):
    np.testing.assert_array_equal(a, b)
  (values, steps), (wanted, wanted_steps) = (
    rows_of(found, m),
    rows_of(levels.quantize(normalise(out, scale[2], EPS), order), m),
  )
  assert np.abs(values - wanted).max() <= 1 and (values != wanted).mean() < 1e-3
  np.testing.assert_allclose(steps, wanted_steps, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("m", ROWS)
def test_gate_and_up_are_rounded(m: int, order: Order, dtype):
  both = normal(3, MOST, 2 * 12288).astype(dtype)
  found = rounding.gated(both[:m], dtype=dtype, order=order)
  wide = rounding.gated(both, dtype=dtype, order=order)
  for a, b in zip(rows_of(found, m), rows_of(wide, m), strict=True):
    np.testing.assert_array_equal(a, b)
  gate, up = jnp.split(both[:m].astype(jnp.float32), 2, axis=1)
  wanted, steps = rows_of(levels.quantize((jax.nn.silu(gate) * up).astype(dtype), order), m)
  assert np.abs(rows_of(found, m)[0] - wanted).max() <= 1
  assert (rows_of(found, m)[0] != wanted).mean() < 1e-2
  np.testing.assert_allclose(rows_of(found, m)[1], steps, rtol=1e-2)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("m", [1, 7, 64])
def test_attention_is_merged_and_rounded(m: int, order: Order):
  shape = (2, 64, 8, 2304, 128)
  keys, values = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in (4, 5))
  qkv, position = normal(6, 64, 6144), jax.random.randint(jax.random.key(7), (64,), 0, 2303)
  norms = 1 + normal(8, 2, 128) / 4, 1 + normal(9, 2, 128) / 4

  def run(m: int, order: Order | None, norms):
    args = qkv[:m], keys, values, jnp.int32(1), position[:m]
    return attention.decode(*args, norms=norms, order=order)[0]

  found = run(m, order, norms)
  for a, b in zip(rows_of(found, m), rows_of(run(64, order, norms), m), strict=True):
    np.testing.assert_array_equal(a, b)
  plain = run(m, None, (norms[0][1], norms[1][1]))
  for (a, b), limit in zip(
    zip(rows_of(found, m), rows_of(levels.quantize(plain, order), m), strict=True),
    (1, 1e-5),
    strict=True,
  ):
    assert np.abs(a - b).max() <= limit


@pytest.mark.parametrize("matrix", shapes.QWEN3_8B[:4], ids=str)
@pytest.mark.parametrize("m", [1, 8, 20, 64])
def test_products_of_levels_have_one_order_of_sums(matrix: shapes.Matrix, m: int):
  """Triton's and Mosaic's parts are the same, in any number of rows, and add up to the product."""
  n, k = matrix.n, matrix.k
  w = TernaryArray(
    *bench.random_rows(jax.random.key(1, impl="rbg"), 2, n, k), (k, n), 1, 128, "w2a8"
  )
  layer, parts = jnp.int32(1), rounded.parts_for(n, k)
  x = normal(7, 64, k)
  cut = mosaic.tiling_for(m, n, k, w)
  cut = rounded._cut(vars(cut), m, parts=parts)
  whole = rounded.whole_tiles(m, w)
  wide = rounded._cut(vars(mosaic.tiling_for(64, n, k, w)), 64, parts=parts)
  a = mosaic.matmul(rounding.rounded(x[:m], order="blocks"), w, layer, cut=cut, parts=True)
  if whole is not None:
    tiles = rounded._tiles(whole._asdict(), m, parts=parts)
    planes = rounding.rounded(x[:m], order="planes")
    b = triton.matmul(planes, w, layer=layer, tiles=tiles, parts=True)
    np.testing.assert_array_equal(a, b)
  c = mosaic.matmul(rounding.rounded(x, order="blocks"), w, layer, cut=wide, parts=True)
  assert a.shape == (parts, m, n)
  np.testing.assert_array_equal(a, c[:, :m])
  wanted = mosaic.matmul(x[:m], w, layer)
  assert float(jnp.abs(a.sum(0) - wanted).max() / jnp.abs(wanted).max()) < 1e-4
