"""The compiled CPU kernel: its bits, and its stacks left in place."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from neurojax.kernels.gemm import api, cpu
from neurojax.kernels.gemm.shapes import SHAPES
from neurojax.kernels.native import library
from neurojax.weights.ternary import TernaryArray, TernaryLayer
from tests.kernels.gemm import problem
from tests.kernels.native.built import FLAGS, build_with

needs_kernel = pytest.mark.skipif(
  library.unavailable() is not None, reason=str(library.unavailable())
)
MODES = ("w2a8", "w2a16")
GROUPS = (None, 64, 128, 192, 256, 1088)


def in_documented_order(x: np.ndarray, w: TernaryArray) -> np.ndarray:
  """What the docstring of `matmul_all` says, one float32 operation after the other."""
  scales = np.broadcast_to(np.asarray(w.scales, np.float32), (w.codes.shape[0], w.scales.shape[1]))
  total = np.zeros((x.shape[0], w.codes.shape[0]), np.float32)
  if w.mode == "w2a8":
    levels, steps = problem.quantized(x)
    for q, sums in enumerate(np.moveaxis(problem.group_sums(levels, w), 2, 0)):
      total = total + sums.astype(np.float32) * scales[:, q]
    return total * steps[:, None]
  t = problem.trits(w).astype(np.float32)
  x = np.pad(x, ((0, 0), (0, t.shape[1] - x.shape[1])))
  size = w.group_size or t.shape[1]
  for q in range(scales.shape[1]):
    end = min((q + 1) * size, t.shape[1])
    for start in range(q * size, end, 256):
      part = np.zeros_like(total)
      for i in range(start, min(start + 256, end), 2):
        first, second = x[:, i, None] * t[:, i], x[:, i + 1, None] * t[:, i + 1]
        part = part + (first + second)
      total = total + part * scales[:, q]
  return total


@needs_kernel
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize(("m", "n", "k"), ((1, 3, 2300), (6, 70, 700), (67, 9, 65)))
def test_sums_are_in_the_documented_order(mode, group_size, m, n, k):
  dtype = ("float16", "bfloat16", "float32")[n % 3]
  w = problem.weight(n, k, group_size, mode, dtype=dtype)
  x = problem.rows(m, k)
  np.testing.assert_array_equal(cpu.matmul(jnp.asarray(x), w), in_documented_order(x, w))


@needs_kernel
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("group_size", (None, 128))
def test_a_row_alone_is_bitwise_the_row_among_others(mode, group_size):
  w = problem.weight(150, 400, group_size, mode)
  other = problem.weight(70, 400, None, mode)
  x = jnp.asarray(problem.rows(131, 400))
  together = np.asarray(cpu.matmul(x, w))
  for m in (1, 2, 3, 7, 17, 64):
    for start in range(0, 131 - m, 61):
      some = x[start : start + m]
      np.testing.assert_array_equal(cpu.matmul(some, w), together[start : start + m])
      np.testing.assert_array_equal(
        cpu.matmul_all(some, [other, w])[1], together[start : start + m]
      )


@needs_kernel
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("matrix", SHAPES, ids=str)
def test_products_of_models_are_those_of_float64(matrix, mode):
  # Of a head, which has 32,000 channels and more, as many as float64 multiplies in a moment.
  matrix = matrix.lower(500)
  w = problem.weight(matrix.n, matrix.k, 128, mode)
  x = problem.rows(2, matrix.k)
  want, bound = problem.float64_product(x, w)
  assert (np.abs(cpu.matmul(jnp.asarray(x), w) - want) <= bound).all()


@needs_kernel
def test_every_float16_scale_is_the_float32_it_is():
  bits = np.arange(2**16, dtype=np.uint16)
  scales = bits[np.isfinite(bits.view(np.float16))].view(np.float16)
  # One group whose sum is 127, of a row whose step is 1.
  codes = np.full((len(scales), 16), 0b01010101, np.uint8)
  codes[:, 0] = 0b01010110
  w = TernaryArray(
    jnp.asarray(codes), jnp.asarray(scales[:, None]), (64, len(scales)), 1, 64, "w2a8"
  )
  x = np.zeros((1, 64), np.float32)
  x[0, 0] = 127
  assert problem.quantized(x)[1] == 1
  want = np.float32(127) * scales.astype(np.float32)
  np.testing.assert_array_equal(cpu.matmul(jnp.asarray(x), w)[0], want)


@needs_kernel
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_every_instruction_set_gives_the_same_bits(monkeypatch, tmp_path, flags):
  cases = [
    (jnp.asarray(problem.rows(5, 1000)), problem.weight(75, 1000, group_size, mode))
    for mode in MODES
    for group_size in (None, 64, 192)
  ]
  want = [np.asarray(cpu.matmul(x, w)) for x, w in cases]
  build_with(monkeypatch, tmp_path, flags)
  for (x, w), y in zip(cases, want, strict=True):
    np.testing.assert_array_equal(cpu.matmul(x, w), y)


@needs_kernel
def test_many_callers_at_once_get_their_own_results():
  w = problem.weight(700, 512, 128, "w2a8")
  call = jax.jit(cpu.matmul)
  xs = [jnp.asarray(problem.rows(m, 512, seed=m)) for m in range(1, 9)]
  want = [np.asarray(call(x, w)) for x in xs]
  with ThreadPoolExecutor(8) as pool:
    for _ in range(10):
      for got, y in zip(pool.map(lambda x: np.asarray(call(x, w)), xs), want, strict=True):
        np.testing.assert_array_equal(got, y)


@needs_kernel
def test_layers_in_a_loop_are_not_copied():
  layers = [problem.weight(96, 96, 64, "w2a8", seed=seed) for seed in range(5)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)

  def run(x, stacked):
    def layer(index, x):
      return jnp.tanh(api.matmul(x, TernaryLayer(stacked, index), implementation="cpu"))

    return lax.fori_loop(0, 5, layer, x)

  x = jnp.asarray(problem.rows(1, 96))
  compiled = jax.jit(run).lower(x, stacked).compile()
  lines = compiled.as_text().splitlines()
  calls = [line for line in lines if "custom-call(" in line and "neurojax_gemm" in line]
  assert len(calls) == 1 and "u8[5,96,32]" in calls[0]
  made = [line for line in lines if " u8[" in line.split("=", 1)[-1].split("(")[0]]
  assert all("parameter(" in line or "get-tuple-element(" in line for line in made), made
  assert compiled.memory_analysis().temp_size_in_bytes < layers[0].codes.nbytes
  want = x
  for w in layers:
    want = jnp.tanh(cpu.matmul(want, w))
  np.testing.assert_array_equal(compiled(x, stacked), want)


@needs_kernel
def test_what_does_not_fit_is_named():
  w = problem.weight(8, 100, 64, "w2a8")
  with pytest.raises(ValueError, match="does not fit codes"):
    cpu.matmul(jnp.ones((2, 200)), w)
  with pytest.raises(ValueError, match="float16"):
    cpu.matmul(jnp.ones((2, 100), jnp.float16), w)
  with pytest.raises(ValueError, match="one at a time"):
    cpu.matmul_all(jnp.ones((2, 100)), [w, problem.weight(8, 100, 64, "w2a16")])
  with pytest.raises(ValueError, match="stacked"):
    cpu.matmul(jnp.ones((2, 100)), w, layer=jnp.int32(0))
