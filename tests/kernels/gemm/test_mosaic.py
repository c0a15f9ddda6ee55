"""The ternary warpgroup product: its packing by emulation, its refusals, and what the assembler says of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurojax.kernels import gpus
from neurojax.kernels.gemm import shapes
from neurojax.kernels.gemm.mosaic import matmul, permute, why_not
from neurojax.kernels.gemm.mosaic_fragments import FRAGMENTS
from neurojax.kernels.gemm.reference import quantize_rows
from neurojax.weights.ternary import TernaryArray
from tests.kernels import aot


def pack(w_NxK: np.ndarray) -> np.ndarray:
  fields = (w_NxK + 1).astype(np.uint8).reshape(len(w_NxK), -1, 4)
  return (fields << np.arange(0, 8, 2, dtype=np.uint8)).sum(-1, dtype=np.uint8)


def abstract(n=4096, k=4096, group=128, mode="w2a16", lead=()) -> TernaryArray:
  codes = jax.ShapeDtypeStruct((*lead, n, k // 4), jnp.uint8)
  shape = (*lead, n, k // group) if group else (*lead, 1, 1)
  return TernaryArray(codes, jax.ShapeDtypeStruct(shape, jnp.float16), (k, n), 1, group, mode)


def operand(w_NxK: np.ndarray, itemsize: int) -> np.ndarray:
  """What the tensor cores see of 64 rows, register by register.

  Source: PTX ISA, wgmma fragments of A: a thread of warp v and lane l holds rows 16v + l // 4 and,
  8 further, of each tile of columns the 4 / itemsize that begin at (l % 4) * 4 / itemsize.
  """
  rows, k = w_NxK.shape
  words = pack(w_NxK).view("<u4")
  fragment, width = FRAGMENTS[itemsize], 4 // itemsize
  seen = np.zeros((rows, k), np.float32)
  for thread in range(128):
    warp, lane = divmod(thread, 32)
    for row in (16 * warp + lane // 4, 16 * warp + lane // 4 + 8):
      for block in range(k // 64):
        word = words[row, 4 * block + lane % 4]
        for tile, shift in enumerate(fragment.shifts):
          register = (word << np.uint32(shift)) & np.uint32(fragment.keep) ^ np.uint32(
            fragment.flip
          )
          lanes = np.asarray([register]).view(jnp.bfloat16 if itemsize == 2 else np.int8)
          column = 64 * block + 4 * width * tile + lane % 4 * width
          seen[row, column : column + width] = lanes.astype(np.float32)
  return seen


@pytest.mark.parametrize("itemsize", [2, 1])
def test_the_unpacked_operand_is_the_weight_in_the_order_of_the_permuted_columns(itemsize: int):
  w = np.random.default_rng(0).integers(-1, 2, (64, 256))
  expected = np.asarray(permute(jnp.asarray(w), itemsize)) * FRAGMENTS[itemsize].unit
  np.testing.assert_array_equal(operand(w, itemsize), expected)


@pytest.mark.parametrize("itemsize", [2, 1])
def test_columns_stay_in_their_block_of_64(itemsize: int):
  columns = np.asarray(permute(jnp.arange(192)[None], itemsize))[0].reshape(3, 64)
  for block, of_block in enumerate(columns):
    assert sorted(of_block) == list(range(64 * block, 64 * block + 64))


@pytest.mark.parametrize(
  ("m", "w", "named"),
  [
    (0, {}, "m = 0"),
    (8, {"n": 4160}, "n = 4160"),
    (8, {"k": 4160, "group": 64}, "k = 4160"),
    (8, {"k": 4608, "group": 192}, "group_size = 192"),
  ],
)
def test_what_it_cannot_multiply_is_named(m: int, w: dict, named: str):
  w = abstract(**w)
  k, n = w.weight_shape
  assert named in why_not(m, n, k, w)


@pytest.mark.parametrize("group", [None, 64, 128, 256, 512])
def test_shapes_of_models_are_supported(group: int | None):
  for n, k in ((m.n, m.k) for m in (*shapes.QWEN3_8B, *shapes.TINYLLAMA)):
    assert why_not(1, n, k, abstract(n, k, group)) is None
  assert why_not(1, 2560, 6656, abstract(2560, 6656, group)) is None


def test_a_stack_needs_a_layer_and_int8_needs_scales():
  x = jax.ShapeDtypeStruct((8, 4096), jnp.bfloat16)
  with pytest.raises(ValueError, match="a stack needs a layer"):
    matmul(x, abstract(lead=(2,)))
  with pytest.raises(ValueError, match="row_scales"):
    matmul(jax.ShapeDtypeStruct((8, 4096), jnp.int8), abstract(mode="w2a8"))


@pytest.mark.skipif(gpus.why_not_jax() is not None, reason=str(gpus.why_not_jax()))
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_floats_are_rounded_as_the_weights_mode_says(dtype, monkeypatch: pytest.MonkeyPatch):
  from neurojax.kernels.gemm import mosaic_kernel

  given = []

  def launch(m, group_size, cut, out_dtype):
    def kernel(x, codes, scales, at, rows):
      given.append((x, rows))
      return jnp.zeros((m, 128), out_dtype)

    return kernel

  monkeypatch.setattr(mosaic_kernel, "launch", launch)
  x = jax.random.normal(jax.random.key(0), (8, 256), dtype)
  codes, scales = jnp.zeros((128, 64), jnp.uint8), jnp.ones((128, 2), jnp.float16)
  for mode in ("w2a8", "w2a16"):
    matmul(x, TernaryArray(codes, scales, (256, 128), 1, 128, mode))
  (rounded, [steps, *_]), (same, none) = given
  levels, expected = quantize_rows(x)
  np.testing.assert_array_equal(rounded, permute(levels, 1))
  np.testing.assert_array_equal(steps, expected)
  assert same.dtype == jnp.bfloat16 and none == []
  np.testing.assert_array_equal(same, permute(x.astype(jnp.bfloat16), 2))


REASON = aot.why_not()

# A tenth more than measured with jax 0.11.2.
INSTRUCTIONS = {
  ("w2a8", 8): 1.50,
  ("w2a16", 8): 2.43,
  ("w2a8", 2048): 4.67,
  ("w2a16", 2048): 4.66,
}
"""By mode and rows, in groups of 128: at most so many for a weight."""


def assembled(m, group, mode, monkeypatch, capfd, n=4096, k=4096) -> tuple[str, str]:
  """PTX, and what ptxas says of it."""
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
  rows = jax.ShapeDtypeStruct((m,), jnp.float32) if mode == "w2a8" else None
  x = jax.ShapeDtypeStruct((m, k), jnp.int8 if mode == "w2a8" else jnp.bfloat16)
  layer = jax.ShapeDtypeStruct((), jnp.int32)
  aot.compile_for_h200(
    lambda x, w, layer, rows: matmul(x, w, layer, row_scales=rows),
    x, abstract(n, k, group=group, mode=mode, lead=(2,)), layer, rows,
  )  # fmt: skip
  said = capfd.readouterr()
  ptx, mark, report = said.out.partition("ptxas ")
  return ptx, mark + report + said.err


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("mode", ["w2a16", "w2a8"])
@pytest.mark.parametrize("group", [None, 64, 128, 256])
@pytest.mark.parametrize("m", [1, 8, 16, 64, 500, 2048])
def test_it_compiles_without_spills_and_the_products_overlap(m, group, mode, monkeypatch, capfd):
  _, report = assembled(m, group, mode, monkeypatch, capfd)
  assert aot.spills(report) == 0
  assert "serialized" not in report, report[-2000:]


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("m", [1, 64, 256, 2048])
def test_groups_are_added_up_by_fused_operations(m, monkeypatch, capfd):
  """Adds the sums of groups in the order of Triton's kernel, so that both have the same bits."""
  ptx, _ = assembled(m, 128, "w2a8", monkeypatch, capfd)
  fused, plain = ptx.count("fma.rn.f32"), ptx.count("add.f32") + ptx.count("add.rn.f32")
  # The only other additions make floats of the integer sums.
  assert fused == plain > 0


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("mode", ["w2a16", "w2a8"])
@pytest.mark.parametrize("matrix", shapes.QWEN3_8B, ids=str)
def test_every_benchmarked_product_compiles_without_spills(matrix, mode, monkeypatch, capfd):
  _, report = assembled(64, 128, mode, monkeypatch, capfd, n=matrix.n, k=matrix.k)
  assert aot.spills(report) == 0


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize(("mode", "m"), INSTRUCTIONS)
def test_instructions_per_weight_do_not_creep_up(mode, m, monkeypatch, capfd):
  ptx, _ = assembled(m, 128, mode, monkeypatch, capfd)
  count = aot.instructions_per_weight(ptx, "wgmma.mma_async")
  assert count < INSTRUCTIONS[mode, m]
