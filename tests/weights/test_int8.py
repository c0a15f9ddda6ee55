"""Int8Array against float64 products, and the promises its docstrings make."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurojax.weights.int8 import MAX_INTEGER_ROWS, Int8Array

pytestmark = pytest.mark.optimized

SPECS = (
  ("BTD,DNH->BTNH", (12, 3, 5), 1),
  ("BTNH,NHD->BTD", (3, 5, 7), 2),
  ("BTD,DF->BTF", (33, 18), 1),
  ("BTD,VD->BTV", (11, 9), -1),
  ("TD,DF->TF", (1, 1), 1),
)


def _normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _x(spec: str, array: Int8Array, batch: tuple[int, ...], seed: int = 1) -> np.ndarray:
  c = array.contracted_axes
  contracted = array.weight_shape[:c] if c > 0 else array.weight_shape[c:]
  return _normal((*batch, *contracted)[-len(spec.split(",")[0]) :], seed)


@settings(max_examples=15, deadline=None)
@given(
  shape=st.lists(st.integers(1, 9), min_size=2, max_size=4).map(tuple),
  data=st.data(),
  exponent=st.integers(-30, 30),
)
def test_dequantized_is_within_half_a_step(shape, data, exponent):
  c = data.draw(st.integers(1, len(shape) - 1)) * data.draw(st.sampled_from((1, -1)))
  w = _normal(shape, data.draw(st.integers(0, 99))) * np.float32(2.0**exponent)
  array = Int8Array.quantize(w, c)
  contracted = tuple(range(c)) if c > 0 else tuple(range(len(shape) + c, len(shape)))
  step = np.abs(w).max(contracted, keepdims=True) / 127
  error = np.abs(np.asarray(array.dequantize()) - w)
  assert array.shape == shape
  assert (error <= step * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("rows", (5, MAX_INTEGER_ROWS + 1))
@pytest.mark.parametrize(("spec", "shape", "contracted_axes"), SPECS)
def test_contract_is_within_its_stated_bound(spec, shape, contracted_axes, rows):
  array = Int8Array.quantize(_normal(shape), contracted_axes)
  x = _x(spec, array, (1, rows))
  w64 = np.asarray(array.dequantize(), np.float64)
  want = np.einsum(spec, x.astype(np.float64), w64)
  got = np.asarray(jax.jit(lambda a, x: a.contract(spec, x))(array, x))
  batch = x.shape[: x.ndim - abs(contracted_axes)]
  absmax = np.abs(x).reshape(math.prod(batch), -1).max(1)
  absmax = absmax.reshape(*batch, *(1,) * (want.ndim - len(batch)))
  mass = np.einsum(spec, np.ones_like(x, np.float64), np.abs(w64))
  magnitude = np.einsum(spec, np.abs(x).astype(np.float64), np.abs(w64))
  bound = absmax / float(array.levels) / 2 * mass + 4e-6 * magnitude
  assert got.dtype == np.float32
  assert got.shape == want.shape
  assert (np.abs(got - want) <= bound).all()


def test_error_of_a_model_sized_product_is_that_of_float32():
  array = Int8Array.quantize(_normal((576, 256)), 1)
  x = _normal((1, 1, 576), 2)
  want = np.einsum("BTD,DF->BTF", x.astype(np.float64), np.asarray(array.dequantize(), np.float64))
  got = np.asarray(array.contract("BTD,DF->BTF", x))
  assert np.linalg.norm(got - want) < 3e-5 * np.linalg.norm(want)


def test_levels_keep_the_worst_row_inside_int32():
  k = 4096
  array = Int8Array.quantize(np.ones((k, 2), np.float32), 1)
  got = np.asarray(array.contract("TD,DF->TF", np.full((1, k), 3.0, np.float32)))
  np.testing.assert_allclose(got, 3.0 * k, rtol=1e-6)


@pytest.mark.parametrize("spec_index", (0, 3))
def test_a_row_alone_is_bitwise_the_row_in_a_batch(spec_index):
  spec, shape, contracted_axes = SPECS[spec_index]
  array = Int8Array.quantize(_normal(shape), contracted_axes)
  contract = jax.jit(lambda a, x: a.contract(spec, x))
  x = _x(spec, array, (1, MAX_INTEGER_ROWS)) * np.logspace(-3, 3, MAX_INTEGER_ROWS).astype(
    np.float32
  ).reshape(1, -1, *(1,) * (len(spec.split(",")[0]) - 2))
  together = np.asarray(contract(array, x))
  for rows in (1, 5):
    for start in range(0, MAX_INTEGER_ROWS - rows + 1, rows):
      alone = np.asarray(contract(array, x[:, start : start + rows]))
      np.testing.assert_array_equal(alone, together[:, start : start + rows])


@pytest.mark.parametrize("rows", (1, 5, MAX_INTEGER_ROWS + 1))
def test_several_products_are_each_product_with_the_least_levels(rows):
  heights = (30, 12, 12, 7)
  arrays = [Int8Array.quantize(_normal((33, n), seed), 1) for seed, n in enumerate(heights)]
  least = min(array.levels for array in arrays)
  x = _normal((rows, 33), 9)
  together = jax.jit(lambda x, *w: Int8Array.contract_all(x, *(("TD,DF->TF", a) for a in w)))
  for array, got in zip(arrays, together(x, *arrays), strict=True):
    alone = dataclasses.replace(array, levels=least)
    want = jax.jit(lambda a, x: a.contract("TD,DF->TF", x))(alone, x)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("rows", (4, MAX_INTEGER_ROWS + 4))
def test_what_other_rows_hold_does_not_matter(rows):
  array = Int8Array.quantize(_normal((64, 20)), 1)
  contract = jax.jit(lambda a, x: a.contract("TD,DF->TF", x))
  x = _normal((rows, 64), 3)
  other = np.concatenate([x[:1], 1e6 * _normal((rows - 1, 64), 4)])
  np.testing.assert_array_equal(contract(array, x)[0], contract(array, other)[0])


def test_zeros_stay_zeros():
  w = _normal((8, 6))
  w[:, 2] = 0
  array = Int8Array.quantize(w, 1)
  y = np.asarray(array.contract("TD,DF->TF", _normal((2, 8))))
  assert (y[:, 2] == 0).all() and (y[:, 3] != 0).all()
  x = _normal((2, 8))
  x[0] = 0
  y = np.asarray(array.contract("TD,DF->TF", x))
  assert (y[0] == 0).all() and (y[1, 3:] != 0).all()
  assert (np.asarray(array.contract("TD,DF->TF", np.zeros((2, 8), np.float32))) == 0).all()
  assert (np.asarray(Int8Array.quantize(np.zeros((4, 4), np.float32), 1).dequantize()) == 0).all()


@pytest.mark.parametrize("bad", (np.nan, np.inf))
def test_not_a_number_is_not_hidden(bad):
  array = Int8Array.quantize(_normal((8, 6)), 1)
  x = _normal((2, 8))
  x[0, 3] = bad
  y = np.asarray(array.contract("TD,DF->TF", x))
  assert np.isnan(y[0]).all() and np.isfinite(y[1]).all()


def test_scan_over_stacked_layers_is_each_layer_in_turn():
  layers = [Int8Array.quantize(_normal((10, 10), seed) / 3, 1) for seed in range(4)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
  assert stacked.shape == (4, 10, 10)
  assert stacked.nbytes == 4 * layers[0].nbytes
  np.testing.assert_array_equal(stacked.dequantize()[2], layers[2].dequantize())
  x = _normal((3, 10), 9)

  def step(x, layer):
    return layer.contract("TD,DF->TF", x), None

  scanned, _ = jax.jit(lambda x, s: jax.lax.scan(step, x, s))(x, stacked)
  want = x
  for index in range(4):
    want = jax.tree.map(lambda leaf, index=index: leaf[index], stacked).contract("TD,DF->TF", want)
  np.testing.assert_array_equal(scanned, want)


def test_take_is_rows_of_the_dequantized_table():
  array = Int8Array.quantize(_normal((11, 9)), -1)
  ids = jnp.asarray([[0, 10, 3], [99, -5, 7]])
  want = np.asarray(array.dequantize())[np.clip(np.asarray(ids), 0, 10)]
  np.testing.assert_array_equal(jax.jit(lambda a, i: a.take(i))(array, ids), want)


@pytest.mark.parametrize("rows", (1, MAX_INTEGER_ROWS + 1))
def test_bfloat16_is_the_rounded_float32_result(rows):
  array = Int8Array.quantize(_normal((16, 6)), 1)
  x = jnp.asarray(_normal((rows, 16)), jnp.bfloat16)
  got = array.contract("TD,DF->TF", x)
  assert got.dtype == jnp.bfloat16
  want = array.contract("TD,DF->TF", x.astype(jnp.float32)).astype(jnp.bfloat16)
  np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


def test_bytes_are_one_per_weight_and_four_per_channel():
  assert Int8Array.quantize(_normal((64, 16)), 1).nbytes == 64 * 16 + 4 * 16 + 4


@pytest.mark.parametrize(
  "spec",
  (
    "BTD,DF->BFT",
    "BTD,FD->BTF",
    "BTF,DF->BTD",
    "BTD,DF",
    "BTD->BTD",
    "BDD,DF->BDF",
    "BTD,DFG->BTFG",
    "BTD,DB->BTB",
  ),
)
def test_an_unsupported_spec_is_named(spec):
  array = Int8Array.quantize(_normal((8, 6)), 1)
  with pytest.raises(ValueError, match="does not fit a weight"):
    array.contract(spec, np.ones((1, 2, 8), np.float32))


@pytest.mark.parametrize("shape", ((1, 2, 6), (2, 8), (8,)))
def test_a_wrong_x_is_named(shape):
  array = Int8Array.quantize(_normal((8, 6)), 1)
  with pytest.raises(ValueError, match="x has shape"):
    array.contract("BTD,DF->BTF", np.ones(shape, np.float32))


@pytest.mark.parametrize("contracted_axes", (0, 2, -2, 5))
def test_quantize_rejects_axes_that_do_not_split(contracted_axes):
  with pytest.raises(ValueError, match="contracted_axes"):
    Int8Array.quantize(_normal((8, 6)), contracted_axes)


def test_quantize_rejects_what_is_not_finite():
  with pytest.raises(ValueError, match="not finite"):
    Int8Array.quantize(np.array([[1.0, np.nan], [1, 2]], np.float32), 1)


def test_stacked_layers_cannot_be_contracted_at_once():
  one = Int8Array.quantize(_normal((8, 6)), 1)
  stacked = jax.tree.map(lambda leaf: leaf[None], one)
  with pytest.raises(ValueError, match="scan"):
    stacked.contract("TD,DF->TF", np.ones((1, 8), np.float32))
  with pytest.raises(ValueError, match="take needs"):
    one.take(jnp.zeros((1,), jnp.int32))
