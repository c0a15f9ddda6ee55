"""Every implementation that runs on a CPU is the definition; and which of them is chosen."""

import json
import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from neurojax.kernels import gpus
from neurojax.kernels.gemm import api, tuned
from neurojax.kernels.gemm.shapes import ODD, SHAPES
from neurojax.kernels.native import library
from neurojax.model.project import project, project_all
from neurojax.weights.ternary import TernaryArray, TernaryLayer
from tests.kernels.gemm import problem

GROUPS = (None, 64, 128, 256)
MODES = ("w2a8", "w2a16")

matmul = jax.jit(api.matmul, static_argnames="implementation")
contract = jax.jit(api.contract, static_argnames=("spec", "implementation"))


@pytest.fixture(params=("reference", "xla", "cpu"))
def implementation(request) -> str:
  if request.param == "cpu" and (reason := library.unavailable()):
    pytest.skip(reason)
  return request.param


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
  ("shape", "group_size"),
  [(shape, GROUPS[(i + j) % 4]) for i, shape in enumerate(ODD) for j in (0, 1)],
  ids=str,
)
def test_products_are_those_of_float64(implementation, mode, group_size, shape):
  m, n, k = shape
  dtype = ("float16", "bfloat16", "float32")[(m + n + k) % 3]
  w = problem.weight(n, k, group_size, mode, dtype=dtype, seed=m)
  x = problem.rows(m, k)
  want, bound = problem.float64_product(x, w)
  if implementation == "xla" and mode == "w2a16":
    mass = np.abs(np.asarray(w.dequantize(), np.float64)).sum(0)
    bound = bound + 2.0**-28 * np.abs(x).max(1, keepdims=True) * mass
  got = matmul(x, w, implementation=implementation)
  assert got.dtype == jnp.float32 and got.shape == (m, n)
  assert (np.abs(np.asarray(got, np.float64) - want) <= bound).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("matrix", SHAPES, ids=str)
def test_every_benchmarked_product_is_that_of_float64(implementation, mode, matrix):
  """At the full contracted width; of the channels 100, or float64 would take minutes."""
  matrix = matrix.lower(100)
  w = problem.weight(matrix.n, matrix.k, 128, mode)
  x = problem.rows(3, matrix.k)
  want, bound = problem.float64_product(x, w)
  if implementation == "xla" and mode == "w2a16":
    mass = np.abs(np.asarray(w.dequantize(), np.float64)).sum(0)
    bound = bound + 2.0**-28 * np.abs(x).max(1, keepdims=True) * mass
  got = matmul(x, w, implementation=implementation)
  assert (np.abs(np.asarray(got, np.float64) - want) <= bound).all()


@pytest.mark.parametrize("group_size", (*GROUPS, 192, 320))
@pytest.mark.parametrize("m", (1, 7, 17))
def test_w2a8_is_exact_where_float32_is(implementation, group_size, m):
  n, k = 37, 700
  w = problem.weight(n, k, group_size, "w2a8", powers=True, seed=m)
  x = problem.rows(m, k)
  levels, steps = problem.quantized(x)
  # Scales are multiples of 1/8: the sum is an integer number of eighths, and less than 2**24.
  eighths = np.asarray(w.scales, np.float64) * 8
  assert (eighths == np.rint(eighths)).all()
  total = (problem.group_sums(levels, w) * eighths.astype(np.int64)[None]).sum(2)
  assert np.abs(total).max() < 2**24
  want = total.astype(np.float32) / np.float32(8) * steps[:, None]
  got = matmul(x, w, implementation=implementation)
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("mode", MODES)
def test_long_sums_are_still_exact_integers(implementation, mode):
  k = 150_000
  w = problem.weight(4, k, None, mode, powers=True)
  w = TernaryArray(jnp.full_like(w.codes, 0b10101010), w.scales, (k, 4), 1, None, mode)
  got = matmul(jnp.full((1, k), 127.0), w, implementation=implementation)
  want = np.float32(127 * k) * np.float32(w.scales[0, 0])
  if mode == "w2a8":
    np.testing.assert_array_equal(got, np.full((1, 4), want))
  else:
    np.testing.assert_allclose(got, np.full((1, 4), want), rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("m", (3, 20))
@pytest.mark.parametrize("bad", (np.nan, np.inf))
def test_a_row_that_is_not_finite_has_no_finite_result_and_harms_no_other(
  implementation, mode, m, bad
):
  w = problem.weight(20, 200, 128, mode)
  x = problem.rows(m, 200)
  clean = matmul(x, w, implementation=implementation)
  x[1, 70] = bad
  got = np.asarray(matmul(x, w, implementation=implementation))
  assert not np.isfinite(got[1]).any()
  np.testing.assert_array_equal(np.delete(got, 1, 0), np.delete(np.asarray(clean), 1, 0))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("group_size", (None, 64))
def test_a_row_of_zeros_stays_zeros(implementation, mode, group_size):
  x = problem.rows(3, 100)
  x[1] = 0
  got = np.asarray(
    matmul(x, problem.weight(9, 100, group_size, mode), implementation=implementation)
  )
  assert (got[1] == 0).all() and (got[[0, 2]] != 0).any(1).all()


@pytest.mark.parametrize("mode", MODES)
def test_no_rows_give_no_results(implementation, mode):
  got = matmul(jnp.zeros((0, 100)), problem.weight(9, 100, 64, mode), implementation=implementation)
  assert got.shape == (0, 9) and got.dtype == jnp.float32


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("group_size", (None, 128))
def test_a_layer_of_a_stack_is_the_matrix_by_itself(implementation, mode, group_size):
  layers = [problem.weight(33, 130, group_size, mode, seed=seed) for seed in range(3)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
  x = problem.rows(2, 130)

  for index in (0, 1, 2, 7):  # an index beyond the stack is clamped
    want = matmul(x, layers[min(index, 2)], implementation=implementation)
    got = matmul(x, TernaryLayer(stacked, index), implementation=implementation)
    # Where XLA fuses the slice it may round sums another way.
    tolerance = 0 if implementation == "cpu" else 1e-5 * np.abs(want).max(1, keepdims=True)
    assert (np.abs(got - want) <= tolerance).all()


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_rows_are_the_float32_they_are(implementation, mode):
  w = problem.weight(33, 130, 64, mode)
  x = jnp.asarray(problem.rows(3, 130), jnp.bfloat16)
  got = matmul(x, w, implementation=implementation)
  want = matmul(x.astype(jnp.float32), w, implementation=implementation)
  np.testing.assert_array_equal(got, want)


SPECS = (
  ("BTD,DNH->BTNH", (12, 3, 5), 1),
  ("BTNH,NHD->BTD", (3, 5, 7), 2),
  ("BTD,VD->BTV", (11, 9), -1),
)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("spec", "shape", "contracted_axes"), SPECS)
def test_contract_is_the_einsum(implementation, spec, shape, contracted_axes, mode):
  c = abs(contracted_axes)
  contracted = shape[:c] if contracted_axes > 0 else shape[-c:]
  k = int(np.prod(contracted))
  flat = problem.weight(int(np.prod(shape)) // k, k, 64, mode)
  w = TernaryArray(flat.codes, flat.scales, shape, contracted_axes, 64, mode)
  x = problem.rows(6, k).reshape(2, 3, *contracted)
  got = contract(spec, x, w, implementation=implementation)
  dense = np.asarray(w.dequantize(), np.float64)
  want = np.einsum(spec, x.astype(np.float64), dense)
  magnitude = np.einsum(spec, np.abs(x).astype(np.float64), np.abs(dense))
  axes = tuple(range(2, x.ndim))
  step = np.abs(x).max(axes) / 127
  step = step.reshape(*step.shape, *(1,) * (want.ndim - 2))
  rounding = step * np.einsum(spec, np.ones_like(x, np.float64), np.abs(dense)) / 2
  bound = 1e-5 * magnitude + (rounding if mode == "w2a8" else 0)
  assert got.shape == want.shape
  assert (np.abs(got - want) <= bound).all()


def test_several_products_are_each_product(implementation):
  forms = ((40, 64, "w2a8"), (8, None, "w2a16"), (3, None, "w2a8"), (70, 128, "w2a8"))
  ws = [problem.weight(n, 130, group_size, mode, seed=n) for n, group_size, mode in forms]
  x = problem.rows(5, 130)
  spec = "TD,DF->TF"

  @jax.jit
  def together(x, ws):
    return api.contract_all(x, *[(spec, w) for w in ws], implementation=implementation)

  for got, w in zip(together(x, ws), ws, strict=True):
    want = contract(spec, x, w, implementation=implementation)
    np.testing.assert_array_equal(got, want)


def test_what_does_not_fit_is_named():
  w = problem.weight(8, 100, 64, "w2a8")
  with pytest.raises(ValueError, match=r"\(2, 99\).*100"):
    api.matmul(jnp.ones((2, 99)), w)
  with pytest.raises(ValueError, match="int32: cast"):
    api.matmul(jnp.ones((2, 100), jnp.int32), w)
  with pytest.raises(ValueError, match="TernaryLayer"):
    api.matmul(jnp.ones((2, 100)), jax.tree.map(lambda leaf: leaf[None], w))
  with pytest.raises(ValueError, match="TernaryLayer"):
    api.matmul(jnp.ones((2, 100)), TernaryLayer(w, 0))
  with pytest.raises(ValueError, match="'cuda': one of reference"):
    api.matmul(jnp.ones((2, 100)), w, implementation="cuda")
  with pytest.raises(ValueError, match="name it"):
    api.matmul(jnp.ones((2, 100)), w, warps=2)
  with pytest.raises(ValueError, match="does not fit a weight"):
    api.contract("TD,FD->TF", jnp.ones((2, 100)), w)


@pytest.fixture
def fresh_choice(monkeypatch):
  monkeypatch.setattr(gpus, "OLDEST_JAX", (0, 0, 0))
  for cached in (api._module, api._warn_once, tuned.load):
    cached.cache_clear()
  return monkeypatch


def _gpu(capability: str = "9.0") -> SimpleNamespace:
  return SimpleNamespace(platform="gpu", device_kind="Some GPU (x1)", compute_capability=capability)


def _kernels(monkeypatch, **reasons):
  """Implementations that refuse for a reason, or do not."""
  modules = {
    name: SimpleNamespace(why_not=lambda m, n, k, w, reason=reason: reason)
    for name, reason in reasons.items()
  }

  def module(name):
    if name not in modules:
      raise ImportError(f"no {name} here")
    return modules[name]

  monkeypatch.setattr(api, "_module", module)


def test_a_cpu_gets_the_compiled_kernel_or_xla_and_is_told_once(fresh_choice, caplog):
  w = problem.weight(8, 100, 64, "w2a8")
  _kernels(fresh_choice, cpu=None, xla=None)
  assert api.choice_for(1, w).implementation == "cpu"
  assert not caplog.records
  _kernels(fresh_choice, cpu="no compiler", xla=None)
  with caplog.at_level(logging.WARNING):
    assert [api.choice_for(1, w).implementation for _ in range(3)] == ["xla"] * 3
  assert len(caplog.records) == 1 and "no compiler" in caplog.text
  _kernels(fresh_choice, cpu="no compiler", xla="too many rows")
  assert api.choice_for(1, w).implementation == "reference"


def test_a_gpu_gets_a_kernel_and_never_silently_none(fresh_choice, caplog):
  w = problem.weight(8, 100, 64, "w2a8")
  _kernels(fresh_choice, triton=None, mosaic=None)
  assert api.choice_for(8, w, device=_gpu()).implementation == "triton"
  assert api.choice_for(512, w, device=_gpu()).implementation == "mosaic"
  assert api.choice_for(512, w, device=_gpu("8.0")).implementation == "triton"
  _kernels(fresh_choice, triton="n is odd")
  with caplog.at_level(logging.WARNING):
    assert api.choice_for(8, w, device=_gpu()).implementation == "reference"
    assert api.choice_for(9, w, device=_gpu()).implementation == "reference"
  assert len(caplog.records) == 1
  assert "n is odd" in caplog.text and "no mosaic here" in caplog.text
  _kernels(fresh_choice, triton=None, mosaic=None)
  with caplog.at_level(logging.WARNING):
    assert api.choice_for(8, w, device=_gpu("7.5")).implementation == "reference"
    fresh_choice.setattr(gpus, "OLDEST_JAX", (99, 0))
    assert api.choice_for(8, w, device=_gpu()).implementation == "reference"
  assert "7.5" in caplog.text and "needs jax 99.0 or newer" in caplog.text


def test_what_was_measured_is_chosen(fresh_choice, tmp_path):
  common = {"mode": "w2a8", "k": 4096}
  entries = [
    {**common, "m": 1, "n": 4096, "implementation": "triton", "parameters": {"warps": 1}},
    {**common, "m": 64, "n": 4096, "implementation": "mosaic", "parameters": {"warps": 2}},
    {**common, "m": 64, "n": 512, "implementation": "triton", "parameters": {"warps": 4}},
  ]
  (tmp_path / "some-gpu-x1.json").write_text(json.dumps({"device": "x", "entries": entries}))
  fresh_choice.setattr(tuned, "load", lambda kind, load=tuned.load: load(kind, tmp_path))
  _kernels(fresh_choice, triton=None, mosaic=None)

  def chosen(m, n, mode="w2a8"):
    w = problem.weight(n, 4096, 64, mode)
    return api.choice_for(m, w, device=_gpu())

  assert chosen(1, 4096) == ("triton", {"warps": 1})
  assert chosen(2, 4096) == chosen(64, 3000) == chosen(999, 4096) == ("mosaic", {"warps": 2})
  assert chosen(64, 600) == ("triton", {"warps": 4})
  assert chosen(64, 600, "w2a16") == ("triton", {})
  _kernels(fresh_choice, triton=None, mosaic="n is odd")
  assert chosen(64, 4096) == ("triton", {})


@pytest.mark.parametrize(
  "wrong", [{"m": "8"}, {"n": 0}, {"k": True}, {"mode": "w3"}, {"parameters": None}, {"extra": 1}]
)
def test_a_table_that_is_none_is_named(tmp_path, wrong):
  entry = {"mode": "w2a8", "m": 1, "n": 8, "k": 8, "implementation": "triton", "parameters": {}}
  (tmp_path / "gpu.json").write_text(json.dumps({"entries": [entry | wrong]}))
  tuned.load.cache_clear()
  with pytest.raises(ValueError, match=r"gpu\.json: not a table"):
    tuned.load("GPU", tmp_path)


def test_a_table_is_written_whole_or_not_at_all(tmp_path):
  path = tuned.path_for("Some GPU-x1", tmp_path)
  entries = [tuned.Entry("w2a8", 1, 8, 8, "triton", {})]
  tuned.write(path, "Some GPU-x1", "a test", entries)
  assert tuned.load("Some GPU-x1", tmp_path) == tuple(entries)
  with pytest.raises(ValueError, match="stays as it is"):
    tuned.write(path, "Some GPU-x1", "a test", [])
  assert tuned.load("Some GPU-x1", tmp_path) == tuple(entries)
  assert list(tmp_path.iterdir()) == [path]


def test_tables_that_are_shipped_can_be_read():
  for path in tuned.FOLDER.glob("*.json"):
    device = json.loads(path.read_text())["device"]
    assert tuned.load(device)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_project_returns_the_dtype_of_x_or_another(dtype):
  w = problem.weight(6, 100, 64, "w2a8")
  x = jnp.asarray(problem.rows(3, 100), dtype)
  want = api.contract("TD,DF->TF", x, w)
  got = project("TD,DF->TF", x, nnx.Param(w))
  assert got.dtype == dtype
  np.testing.assert_array_equal(got, want.astype(dtype))
  assert project("TD,DF->TF", x, nnx.Param(w), dtype=jnp.float32).dtype == jnp.float32
  dense = nnx.Param(jnp.ones((100, 4), dtype))
  mixed = project_all(x, ("TD,DF->TF", nnx.Param(w)), ("TD,DF->TF", dense))
  np.testing.assert_array_equal(mixed[0], got)
  np.testing.assert_array_equal(mixed[1], project("TD,DF->TF", x, dense))
