"""The Triton kernels: against float64 in interpret mode, and what the assembler makes of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurojax.kernels.gemm import levels, shapes, triton, triton_dot
from neurojax.kernels.gemm.triton_dequantize import dequantize
from neurojax.weights.ternary import TernaryArray
from tests.kernels import aot

GROUPS = (None, 64, 128, 256)
# (m, n, k): one row; k not a power of two; n without a common factor with a tile; two tiles of m.
SHAPES = ((1, 32, 256), (3, 50, 320), (8, 37, 512), (17, 70, 704))


def weight(n: int, k: int, group_size: int | None, mode: str, seed: int = 0, dtype=jnp.float16):
  rng = np.random.default_rng(seed)
  width = 16 * -(-k // 64)
  codes = rng.integers(0, 3, (n, width, 4))
  codes.reshape(n, -1)[:, k:] = 1
  codes = (codes << np.arange(0, 8, 2)).sum(-1).astype(np.uint8)
  groups = -(-k // group_size) if group_size else 1
  scales = 0.01 + 0.02 * rng.random((n if group_size else 1, groups))
  return TernaryArray(jnp.asarray(codes), jnp.asarray(scales, dtype), (k, n), 1, group_size, mode)


def rows(m: int, k: int, seed: int = 1) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal((m, k)).astype(np.float32)


def oracle(x: np.ndarray, w: TernaryArray) -> np.ndarray:
  """In float64, on activations rounded as the mode says."""
  dense = np.asarray(w.dequantize(), np.float64)
  if w.mode == "w2a16":
    return np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32), np.float64) @ dense
  absmax = np.abs(x).max(-1, keepdims=True)
  q = np.rint(x * (np.float32(127) / absmax)).astype(np.float64)
  return q @ dense * (absmax.astype(np.float64) / 127)


def assert_close(y: jax.Array, expected: np.ndarray, tolerance: float = 4e-7) -> None:
  error = np.abs(np.asarray(y, np.float64) - expected).max() / np.abs(expected).max()
  assert error < tolerance


@pytest.mark.parametrize("mode", ["w2a8", "w2a16"])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_is_that_of_float64(mode, group_size, shape):
  m, n, k = shape
  x, w = rows(m, k), weight(n, k, group_size, mode)
  assert triton.why_not(m, n, k, w) is None
  assert_close(triton.matmul(jnp.asarray(x), w, interpret=True), oracle(x, w))


@pytest.mark.parametrize("split", [1, 2, 4])
def test_parts_of_rounded_rows_add_up_to_the_product(split: int):
  """Levels are the rows that the product would round itself; parts are left for the reader to add."""
  x, w = jnp.asarray(rows(5, 512)), weight(40, 512, 128, "w2a8")
  tiles = triton_dot.Tiles(n=16, m=8, y=32, split=split)
  run = functools.partial(triton.matmul, w=w, tiles=tiles, interpret=True)
  parts = run(levels.quantize(x, "planes"), parts=True)
  assert parts.shape == (split, 5, 40)
  np.testing.assert_array_equal(parts, run(x, parts=True))
  assert_close(parts.sum(0), oracle(x, w))
  share = 512 // split
  for i in range(split):
    kept = jnp.zeros_like(x).at[:, i * share : (i + 1) * share].set(1)
    planes = levels.quantize(x, "planes")
    alone = dataclasses.replace(
      planes, values=planes.values * levels.arrange(kept.astype(jnp.int8), "planes")
    )
    assert_close(parts[i], np.asarray(run(alone)))
  with pytest.raises(ValueError, match="Triton reads 'planes'"):
    run(levels.quantize(x, "blocks"))


def test_tiles_may_be_given_by_their_fields():
  x, w = jnp.asarray(rows(5, 640)), weight(40, 640, 128, "w2a8")
  fields = {"n": 32, "m": 16, "y": 64, "warps": 2}
  np.testing.assert_array_equal(
    triton.matmul(x, w, tiles=fields, interpret=True),
    triton.matmul(x, w, tiles=triton_dot.Tiles(**fields), interpret=True),
  )


@pytest.mark.parametrize("mode", ["w2a8", "w2a16"])
def test_any_tiles_give_the_same_product(mode):
  x, w = rows(5, 640), weight(40, 640, 128, mode)
  for tiles in (
    triton_dot.Tiles(n=16, m=8, y=32, split=2),
    triton_dot.Tiles(n=32, m=16, y=256),
    triton_dot.Tiles(n=64, m=8, y=64, split=4),
  ):
    y = triton.matmul(jnp.asarray(x), w, tiles=tiles, interpret=True)
    assert_close(y, oracle(x, w))


@pytest.mark.parametrize("group_size", [None, 128, 256])
def test_whole_sums_give_a_row_the_same_bits_in_any_number_of_rows(group_size):
  """The tiles of each number of rows: how many channels and rows a program has changes no sum."""
  x, w = jnp.asarray(rows(16, 1280)), weight(80, 1280, group_size, "w2a8")

  def product(which: list[int]) -> jax.Array:
    tiles = triton.tiles_for(len(which), 80, w.codes.shape[1], "w2a8", group_size, whole=True)
    return triton.matmul(x[jnp.asarray(which)], w, tiles=tiles, interpret=True)

  together = product(list(range(16)))
  assert_close(together, oracle(np.asarray(x), w))
  for which in ([0], [15], [3, 9, 1], list(range(8))):
    np.testing.assert_array_equal(product(which), together[jnp.asarray(which)])


def test_whole_tiles_take_all_of_a_channel():
  for m in (1, 2, 5, 8, 9, 33, 64, 200):
    for n in (64, 4096, 6144, 24576):
      tiles = triton.tiles_for(m, n, 1024, "w2a8", 128, whole=True)
      assert isinstance(tiles, triton_dot.Tiles) and tiles.split == 1
      assert tiles.n >= 16 and tiles.m >= min(m, 64)


@pytest.mark.parametrize("m", [2, 9])
@pytest.mark.parametrize("mode", ["w2a8", "w2a16"])
def test_a_layer_of_a_stack_is_that_layer(m, mode):
  x = rows(m, 256)
  layers = [weight(32, 256, 64, mode, seed) for seed in range(3)]
  stack = jax.tree.map(lambda *a: jnp.stack(a), *layers)
  y = triton.matmul(jnp.asarray(x), stack, layer=jnp.int32(2), interpret=True)
  assert_close(y, oracle(x, layers[2]))
  y = triton.prefill(jnp.asarray(x), stack, layer=jnp.int32(1), interpret=True)
  assert_close(y, oracle(x, layers[1]))


@pytest.mark.parametrize("mode", ["w2a8", "w2a16"])
@pytest.mark.parametrize("matrix", shapes.SHAPES, ids=str)
def test_every_benchmarked_product_is_that_of_float64(mode, matrix):
  """At the full contracted width; of the channels 64, since the interpreter is slow."""
  matrix = matrix.lower(64)
  w = weight(matrix.n, matrix.k, 128, mode)
  for m in (1, 8):
    x = rows(m, matrix.k)
    assert_close(triton.matmul(jnp.asarray(x), w, interpret=True), oracle(x, w), 1e-6)


@pytest.mark.parametrize("mode", ["w2a8", "w2a16"])
@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_prefill_is_exact_for_each_type_of_scale(mode, group_size, dtype):
  x, w = rows(20, 320), weight(40, 320, group_size, mode, dtype=dtype)
  # Rows of very different size: float16 has to be told.
  x *= np.float32(2.0) ** np.linspace(-40, 40, 20, dtype=np.float32).round()[:, None]
  y, expected = triton.prefill(jnp.asarray(x), w, interpret=True), oracle(x, w)
  size = np.abs(expected).max(-1, keepdims=True)
  two_products = group_size is not None and dtype == jnp.float32
  assert_close(np.asarray(y) / size, expected / size, 2.0**-16 if two_products else 4e-7)


def test_dequantize_rounds_only_the_scale():
  w = weight(50, 320, 64, "w2a16")
  dense = np.asarray(w.dequantize()).T
  np.testing.assert_array_equal(dequantize(w, jnp.float16, interpret=True), dense)
  error = np.abs(np.asarray(dequantize(w, jnp.bfloat16, interpret=True), np.float32) - dense)
  assert 0 < (error / np.abs(dense).clip(1e-9)).max() < 2**-8
  codes = np.asarray(dequantize(weight(50, 320, None, "w2a8"), jnp.int8, interpret=True))
  assert set(np.unique(codes)) == {-1, 0, 1}


@pytest.mark.parametrize("mode", ["w2a8", "w2a16"])
def test_many_rows_are_multiplied_by_the_weight_written_out(mode, monkeypatch):
  x, w = jnp.asarray(rows(triton.PREFILL_ROWS, 320)), weight(40, 320, 64, mode)
  expected = triton.prefill(x, w, interpret=True)
  monkeypatch.setattr(triton_dot, "dot", None)
  np.testing.assert_array_equal(triton.matmul(x, w, interpret=True), expected)


def test_unknown_forms_are_refused_with_the_reason():
  w = weight(32, 384, 192, "w2a8")
  assert "group_size = 192" in triton.why_not(1, 32, 384, w)
  with pytest.raises(ValueError, match="group_size = 192"):
    triton.matmul(jnp.ones((1, 384)), w, interpret=True)
  with pytest.raises(ValueError, match="both or neither"):
    triton.matmul(jnp.ones((1, 256)), weight(32, 256, 64, "w2a8"), layer=jnp.int32(0))


N, K = 6144, 4096

# Bounds are a tenth more than measured with jax 0.11.2.
COMPILED = {
  "dp4a": (1, "w2a8", "dp4a.s32.s32", 2.19),
  "dot, int8": (8, "w2a8", "mma.sync", 1.79),
  "dot, bfloat16": (8, "w2a16", "mma.sync", 2.96),
}
"""Rows, mode, product, and at most so many instructions for a weight."""


@functools.cache
def compiled(m: int, mode: str, whole: bool = False) -> str:
  w = TernaryArray(
    jax.ShapeDtypeStruct((2, N, K // 4), jnp.uint8),
    jax.ShapeDtypeStruct((2, N, K // 128), jnp.float16),
    (K, N), 1, 128, mode,
  )  # fmt: skip
  tiles = triton.tiles_for(m, N, K // 4, mode, 128, whole=whole)
  _, ptx = aot.compile_to_ptx(
    lambda x, w, i: triton.matmul(x, w, layer=i, tiles=tiles),
    jax.ShapeDtypeStruct((m, K), jnp.float32),
    w,
    jax.ShapeDtypeStruct((), jnp.int32),
    kernel="ternary_",
  )
  return ptx


REASON = aot.why_not()


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_for_an_h200_without_spills(name):
  m, mode, *_ = COMPILED[name]
  assert aot.spills(aot.assemble(compiled(m, mode))) == 0


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("name", COMPILED)
def test_instructions_per_weight_do_not_creep_up(name):
  m, mode, product, most = COMPILED[name]
  count = aot.instructions_per_weight(compiled(m, mode), product)
  assert count < most


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("m", [1, 8, 16, 32, 64])
def test_whole_sums_compile_without_spills(m):
  assert aot.spills(aot.assemble(compiled(m, "w2a8", whole=True))) == 0
