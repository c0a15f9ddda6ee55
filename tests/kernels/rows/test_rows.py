"""Products of few rows with matrices left in place: their numbers, and bits that rows do not change."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from neurojax.forms import Grouped
from neurojax.kernels.gemm import cpu as gemm
from neurojax.kernels.native import library
from neurojax.kernels.rows import api, cpu, reference
from neurojax.model.project import project, project_all, rows_agree
from neurojax.weights.contraction import Contraction
from neurojax.weights.grouped import GroupedArray
from neurojax.weights.int8 import Int8Array
from neurojax.weights.matrix import InPlace, StackedLayer, in_place
from tests.kernels.gemm import problem
from tests.kernels.native.built import FLAGS, build_with
from tests.weights.test_grouped import FORMS
from tests.weights.test_grouped import rows as grouped_rows

pytestmark = pytest.mark.optimized
needs_kernel = pytest.mark.skipif(
  library.unavailable() is not None, reason=str(library.unavailable())
)
FLOAT8 = {
  kind: Grouped(bits=8, offset=0, group_size=32, scale="float32", float8=kind)
  for kind in ("e4m3", "e5m2")
}
GROUPED = FORMS | FLOAT8
PLAIN = ("float32", "bfloat16", "float16")
HELD = (*PLAIN, "int8", *GROUPED)
SHAPES = ((1, 512), (70, 512), (131, 1024))
ROWS = (1, 2, 3, 8, 16, 64)


def matrix(held: str, n: int, k: int, contracted_axes: int, seed: int = 0):
  """A matrix of n outputs, with its contraction."""
  shape = (k, n) if contracted_axes > 0 else (n, k)
  numbers = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
  c = Contraction(shape, contracted_axes)
  if held in PLAIN:
    return jnp.asarray(numbers, held), c
  if held == "int8":
    return Int8Array.quantize(numbers, contracted_axes), c
  rows = grouped_rows(GROUPED[held], n, k, seed)
  if held in FLOAT8:  # without infinities and NaN
    rows = dataclasses.replace(rows, codes=rows.codes & 0xBB)
  w = GroupedArray.from_rows(rows, shape, contracted_axes)
  return jax.tree.map(jnp.asarray, w), c


def values(w, c: Contraction) -> np.ndarray:
  """float64 [n, k]."""
  w = np.asarray(w if isinstance(w, jax.Array) else w.dequantize(), np.float64)
  return w.T if c.contracted_axes > 0 else w


def x_of(m: int, k: int, dtype: str = "float32", seed: int = 1) -> jax.Array:
  return jnp.asarray(problem.rows(m, k, seed), dtype)


@needs_kernel
@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("contracted_axes", (1, -1))
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_the_bits_of_a_row_do_not_depend_on_the_number_of_rows(held, contracted_axes, n, k):
  w, c = matrix(held, n, k, contracted_axes)
  x = x_of(64, k, "bfloat16" if held == "bfloat16" else "float32")
  together = np.asarray(cpu.matmul_all(x, [(w, c, None)])[0])
  assert together.shape == (64, n)
  for m in ROWS:
    for start in {0, 64 - m}:
      (alone,) = cpu.matmul_all(x[start : start + m], [(w, c, None)])
      np.testing.assert_array_equal(alone, together[start : start + m])


@needs_kernel
@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("contracted_axes", (1, -1))
def test_products_are_those_of_float64(held, contracted_axes):
  w, c = matrix(held, 70, 1024, contracted_axes)
  x = x_of(5, 1024)
  (y,) = cpu.matmul_all(x, [(w, c, None)])
  dense = values(w, c)
  magnitude = np.abs(np.asarray(x, np.float64)) @ np.abs(dense).T
  # Rounding of the numbers that a group stands for, sums of at most 80 parts, and int8's levels.
  bound = 84 * 2.0**-24 * magnitude
  if held == "int8":
    absmax = np.abs(np.asarray(x, np.float64)).max(1, keepdims=True)
    bound += absmax / float(w.levels) / 2 * np.abs(dense).sum(1)[None]
  assert (np.abs(y - np.asarray(x, np.float64) @ dense.T) <= bound).all()
  (other,) = reference.matmul_all(x, [(w, c)])
  assert (np.abs(np.asarray(other, np.float64) - y) <= 1e3 * 2.0**-24 * magnitude).all()


@needs_kernel
@pytest.mark.parametrize(("n", "k"), ((3, 7), (5, 65), (17, 63), (66, 129), (130, 576)))
@pytest.mark.parametrize("contracted_axes", (1, -1))
@pytest.mark.parametrize("held", ("int8", *PLAIN))
def test_odd_shapes(held, contracted_axes, n, k):
  w, c = matrix(held, n, k, contracted_axes)
  x = x_of(19, k)
  (y,) = cpu.matmul_all(x, [(w, c, None)])
  (want,) = reference.matmul_all(x, [(w, c)])
  if held == "int8":
    np.testing.assert_array_equal(y, want)
  else:
    magnitude = np.abs(np.asarray(x, np.float64)) @ np.abs(values(w, c)).T
    assert (np.abs(np.asarray(y, np.float64) - want) <= 1e3 * 2.0**-24 * magnitude).all()
  np.testing.assert_array_equal(cpu.matmul_all(x[7:8], [(w, c, None)])[0], y[7:8])


@needs_kernel
def test_int8_is_what_a_prompt_of_few_rows_gets():
  ws = [Int8Array.quantize(np.asarray(problem.rows(n, 320)).T, 1) for n in (33, 8)]
  x = x_of(9, 320)
  got = cpu.matmul_all(x, [(w, w.contraction, None) for w in ws])
  want = jax.jit(lambda x: Int8Array.contract_all(x, *(("TD,DF->TF", w) for w in ws)))(x)
  for y, z in zip(got, want, strict=True):
    np.testing.assert_array_equal(y, z)


@needs_kernel
@pytest.mark.parametrize("held", ("int8", "float32", "4 bits"))
@pytest.mark.parametrize("bad", (np.nan, np.inf))
def test_not_a_number_is_not_hidden_and_stays_in_its_row(held, bad):
  w, c = matrix(held, 9, 512, 1)
  x = np.asarray(x_of(3, 512)).copy()
  (want,) = cpu.matmul_all(jnp.asarray(x), [(w, c, None)])
  x[1, 5] = bad
  (y,) = cpu.matmul_all(jnp.asarray(x), [(w, c, None)])
  assert not np.isfinite(y[1]).any()
  np.testing.assert_array_equal(np.delete(y, 1, 0), np.delete(want, 1, 0))
  x[:] = 0
  assert (np.asarray(cpu.matmul_all(jnp.asarray(x), [(w, c, None)])[0]) == 0).all()


@needs_kernel
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_every_instruction_set_gives_the_same_bits(monkeypatch, tmp_path, flags):
  cases = [
    (x_of(5, k), [(*matrix(held, 75, k, axes), None)])
    for held in HELD
    for axes in (1, -1)
    for k in ((512, 1000) if held in (*PLAIN, "int8") else (512,))
  ]
  want = [np.asarray(cpu.matmul_all(x, w)[0]) for x, w in cases]
  build_with(monkeypatch, tmp_path, flags)
  for (x, w), y in zip(cases, want, strict=True):
    np.testing.assert_array_equal(cpu.matmul_all(x, w)[0], y)


@needs_kernel
@pytest.mark.parametrize("held", ("float32", "int8", "4 bits"))
def test_layers_and_experts_in_a_loop_are_read_in_place(held):
  parts = [matrix(held, 256, 256, 1, seed)[0] for seed in range(6)]
  parts = [
    jax.tree.map(lambda leaf: leaf / 16 if leaf.dtype == "float32" else leaf, w) for w in parts
  ]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)

  def run(x, stacked):
    def layer(index, x):
      return jnp.tanh(project("TD,DF->TF", x, in_place(stacked, index)))

    return lax.fori_loop(0, 6, layer, x)

  x = x_of(2, 256)
  compiled = jax.jit(run).lower(x, stacked).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < jax.tree.leaves(parts[0])[0].nbytes
  want = x
  for w in parts:
    want = jnp.tanh(project("TD,DF->TF", want, InPlace(w)))
  np.testing.assert_array_equal(compiled(x, stacked), want)
  experts = jax.tree.map(lambda leaf: leaf.reshape(2, 3, *leaf.shape[1:]), stacked)
  found = StackedLayer(experts, jnp.int32(1)).layer(jnp.int32(2))
  np.testing.assert_array_equal(
    project("TD,DF->TF", x, found), project("TD,DF->TF", x, InPlace(parts[5]))
  )


@needs_kernel
@pytest.mark.parametrize("held", HELD)
def test_rows_agree_says_what_project_does(held):
  w, _ = matrix(held, 40, 512, -1)
  stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), w)
  assert rows_agree(w, "cpu") and rows_agree(InPlace(stacked, jnp.int32(1)), "cpu")
  assert not rows_agree(w, "gpu")
  call = jax.jit(lambda x, w: project("BTD,VD->BTV", x, in_place(w, jnp.int32(1))))
  x = x_of(64, 512).reshape(64, 1, 512)
  together = np.asarray(call(x, stacked))
  for m in ROWS:
    np.testing.assert_array_equal(call(x[:m], stacked), together[:m])
    np.testing.assert_array_equal(
      call(x[:m].reshape(1, m, 512), stacked)[0], together[:m].reshape(m, -1)
    )


@needs_kernel
@pytest.mark.parametrize("mode", ("w2a8", "w2a16"))
def test_rows_of_ternary_products_agree(mode):
  w = problem.weight(70, 512, 128, mode)
  assert rows_agree(w, "cpu") and not rows_agree(w, "gpu")
  x = x_of(64, 512)
  together = np.asarray(gemm.matmul(x, w))
  for m in ROWS:
    np.testing.assert_array_equal(project("TD,DF->TF", x[:m], w), together[:m])


def test_without_a_compiler_rows_do_not_agree_and_products_are_those_of_xla(monkeypatch):
  monkeypatch.setattr(library, "_build_once", lambda: (None, "no C++ compiler"))
  ternary = problem.weight(8, 64, 64, "w2a8")
  assert not rows_agree(ternary, "cpu")
  for held in ("float32", "int8", "4 bits"):
    w, _ = matrix(held, 12, 512, 1)
    x = x_of(3, 512)
    assert not rows_agree(w, "cpu")
    np.testing.assert_array_equal(project("TD,DF->TF", x, InPlace(w)), project("TD,DF->TF", x, w))
    with pytest.raises(NotImplementedError, match="no C\\+\\+ compiler"):
      cpu.matmul_all(x, [(w, Contraction((512, 12), 1), None)])


@needs_kernel
def test_more_rows_than_decoding_has_are_left_to_the_matrix():
  w, _ = matrix("float32", 12, 512, 1)
  x = x_of(api.MAX_ROWS + 1, 512)
  assert api.suits(x[:-1], [("TD,DF->TF", InPlace(w))], "cpu")
  assert not api.suits(x, [("TD,DF->TF", InPlace(w))], "cpu")
  np.testing.assert_array_equal(project("TD,DF->TF", x, InPlace(w)), project("TD,DF->TF", x, w))


@needs_kernel
@pytest.mark.parametrize(
  ("spec", "shape"),
  (("BTD,DNH->BTNH", (64, 3, 5)), ("BTNH,NHD->BTD", (4, 16, 9)), ("BTD,VD->BTV", (11, 64))),
)
def test_several_axes_and_several_products(spec, shape):
  rng = np.random.default_rng(0)
  ws = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2)]
  x_shape = (2, 3, *((4, 16) if "TNH," in spec else (64,)))
  x = jnp.asarray(rng.standard_normal(x_shape), jnp.float32)
  ys = project_all(x, *((spec, InPlace(w)) for w in ws))
  for y, w in zip(ys, ws, strict=True):
    np.testing.assert_allclose(y, jnp.einsum(spec, x, w), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(y, project(spec, x, InPlace(w)))
