"""Every implementation against the reference, on every product that is benchmarked, on a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurojax.kernels.gemm import bench, mosaic, reference, shapes, triton
from neurojax.weights.ternary import TernaryArray
from tests.kernels import hopper

pytestmark = hopper.needed

ROWS = (1, 8, 16, 64, 2048)


@pytest.fixture(scope="module", params=shapes.QWEN3_8B, ids=str)
def stack(request) -> TernaryArray:
  n, k = request.param.n, request.param.k
  rows = bench.random_rows(jax.random.key(1, impl="rbg"), 2, n, k)
  return TernaryArray(*rows, (k, n), 1, bench.GROUP)


def relative(y: jax.Array, wanted: jax.Array) -> float:
  """The largest difference, as a share of the largest value."""
  return float(jnp.abs(y - wanted).max() / jnp.abs(wanted).max())


@pytest.mark.parametrize("mode", ["w2a8", "w2a16"])
@pytest.mark.parametrize("m", ROWS)
def test_products_are_the_references(stack: TernaryArray, m: int, mode: str):
  w = dataclasses.replace(stack, mode=mode)
  x = jax.random.normal(jax.random.key(m), (m, w.weight_shape[0]), jnp.bfloat16)
  layer = jnp.int32(1)
  wanted = jax.jit(lambda x, w: reference.matmul(x, w, layer=layer))(x, w)
  assert float(jnp.abs(wanted).max()) > 1
  y = jax.jit(lambda x, w: mosaic.matmul(x, w, layer))(x, w)
  # Sums of a scale group are exact integers in int8, and the groups are added in the same order.
  assert relative(y, wanted) < 2e-6
  y = jax.jit(lambda x, w: triton.matmul(x, w, layer=layer))(x, w)
  # Weights written out are bfloat16: 8 bits of each, errors of either sign.
  assert relative(y, wanted) < (2e-6 if m < triton.PREFILL_ROWS else 1e-2)


WIDTHS = (1, 8, 64, 256, 2048)


@pytest.fixture(scope="module")
def widest(stack: TernaryArray) -> tuple[jax.Array, jax.Array]:
  """2048 rows, and Mosaic's product of them."""
  w = dataclasses.replace(stack, mode="w2a8")
  x = jax.random.normal(jax.random.key(5), (max(WIDTHS), w.weight_shape[0]))
  return x, jax.jit(lambda x, w: mosaic.matmul(x, w, jnp.int32(0)))(x, w)


@pytest.mark.parametrize("m", WIDTHS)
def test_mosaics_rows_have_the_same_bits_in_any_number_of_rows(stack, widest, m: int):
  w, (x, wanted) = dataclasses.replace(stack, mode="w2a8"), widest
  y = jax.jit(lambda x, w: mosaic.matmul(x, w, jnp.int32(0)))(x[:m], w)
  assert int((y != wanted[:m]).sum()) == 0


@pytest.mark.parametrize("m", [1, 3, 8, 9, 16, 32, 64])
def test_tritons_whole_sums_have_mosaics_bits(stack, widest, m: int):
  w, (x, wanted) = dataclasses.replace(stack, mode="w2a8"), widest
  n, k = w.contraction.n, w.contraction.k
  tiles = triton.tiles_for(m, n, k // 4, "w2a8", bench.GROUP, whole=True)
  y = jax.jit(lambda x, w: triton.matmul(x, w, layer=jnp.int32(0), tiles=tiles))(x[:m], w)
  assert int((y != wanted[:m]).sum()) == 0


@pytest.mark.parametrize("m", WIDTHS)
def test_rounding_has_the_same_bits_in_any_number_of_rows(m: int):
  x = jax.random.normal(jax.random.key(6), (max(WIDTHS), 4096))
  levels, steps = jax.jit(reference.quantize_rows)(x)
  few, few_steps = jax.jit(reference.quantize_rows)(x[:m])
  assert int((few != levels[:m]).sum()) == int((few_steps != steps[:m]).sum()) == 0


def test_rows_alone_and_together_are_the_same_rows(stack: TernaryArray):
  w = dataclasses.replace(stack, mode="w2a8")
  x = jax.random.normal(jax.random.key(9), (64, w.weight_shape[0]))
  multiply = jax.jit(lambda x, w: mosaic.matmul(x, w, jnp.int32(0)))
  np.testing.assert_array_equal(multiply(x, w)[40:41], multiply(x[40:41], w))
