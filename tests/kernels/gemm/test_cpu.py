"""The compiled CPU kernel: its bits, its stacks left in place, and machines that cannot have it."""

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from neurojax.kernels.gemm import api, cpu
from neurojax.kernels.gemm.shapes import SHAPES
from neurojax.weights.ternary import TernaryArray, TernaryLayer
from tests.kernels.gemm import problem

needs_kernel = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
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


def _built_with(monkeypatch, tmp_path, flags: tuple[str, ...]) -> None:
  """Make `cpu` use a kernel that is compiled with these flags in place of this machine's."""
  monkeypatch.setenv("NEUROJAX_CACHE_DIR", str(tmp_path))
  monkeypatch.setattr(cpu, "_NATIVE", (flags,))
  built = cpu._build_once.__wrapped__()
  monkeypatch.setattr(cpu, "_build_once", lambda: built)
  assert built[1] is None


@needs_kernel
@pytest.mark.parametrize("flags", ((), ("-mavx2", "-mf16c", "-mfma")), ids=("plain", "avx2"))
def test_every_instruction_set_gives_the_same_bits(monkeypatch, tmp_path, flags):
  if flags and not (
    platform.machine() == "x86_64" and " avx2 " in Path("/proc/cpuinfo").read_text()
  ):
    pytest.skip("this machine has no AVX2")
  cases = [
    (jnp.asarray(problem.rows(5, 1000)), problem.weight(75, 1000, group_size, mode))
    for mode in MODES
    for group_size in (None, 64, 192)
  ]
  want = [np.asarray(cpu.matmul(x, w)) for x, w in cases]
  _built_with(monkeypatch, tmp_path, flags)
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


@pytest.mark.parametrize(
  ("compiler", "reason"),
  (
    ("no-such-compiler", "no C\\+\\+ compiler 'no-such-compiler'"),
    ("false", "false does not preprocess"),
    ("true", "cannot be built"),
  ),
)
def test_without_a_compiler_the_reason_is_given_and_nothing_breaks(
  monkeypatch, tmp_path, caplog, compiler, reason
):
  monkeypatch.setenv("CXX", compiler)
  monkeypatch.setenv("NEUROJAX_CACHE_DIR", str(tmp_path))
  built = cpu._build_once.__wrapped__()
  monkeypatch.setattr(cpu, "_build_once", lambda: built)
  api._warn_once.cache_clear()
  w = problem.weight(8, 100, 64, "w2a8")
  x = jnp.asarray(problem.rows(2, 100))
  with pytest.raises(NotImplementedError, match=reason):
    cpu.matmul(x, w)
  for _ in range(2):
    np.testing.assert_array_equal(api.matmul(x, w), api.matmul(x, w, implementation="xla"))
  assert len(caplog.records) == 1
  assert cpu.unavailable() in caplog.text


@needs_kernel
def test_a_source_that_does_not_compile_is_named(monkeypatch, tmp_path):
  source = tmp_path / "cpu.cc"
  source.write_text("#error no good\n")
  monkeypatch.setenv("NEUROJAX_CACHE_DIR", str(tmp_path))
  monkeypatch.setattr(cpu, "SOURCES", (source,))
  name, reason = cpu._build_once.__wrapped__()
  assert name is None and "cannot compile" in reason and "no good" in reason
  assert not list((tmp_path / "kernels").iterdir())


CHILD = """
import jax.numpy as jnp, numpy as np
from neurojax.kernels.gemm import cpu
from neurojax.weights.ternary import TernaryArray
w = TernaryArray(jnp.full((3, 16), 0b10101010, jnp.uint8), jnp.ones((1, 1)), (64, 3), 1, None)
assert cpu.unavailable() is None, cpu.unavailable()
np.testing.assert_array_equal(cpu.matmul(jnp.ones((2, 64)), w), np.full((2, 3), 64))
"""


@needs_kernel
def test_processes_at_once_share_one_library(tmp_path):
  env = {**os.environ, "NEUROJAX_CACHE_DIR": str(tmp_path)}
  run = [sys.executable, "-c", CHILD]
  children = [subprocess.Popen(run, env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)]
  for child in children:
    _, errors = child.communicate(timeout=240)
    assert child.returncode == 0, errors
  (library,) = (tmp_path / "kernels").iterdir()
  assert (tmp_path / "kernels").stat().st_mode & 0o777 == 0o700
  before = library.stat().st_mtime_ns
  subprocess.run(run, env=env, check=True)
  assert library.stat().st_mtime_ns == before


@needs_kernel
@pytest.mark.parametrize("damage", ["cut", "emptied", "changed"])
def test_a_damaged_library_is_built_anew_once(tmp_path, damage):
  env = {**os.environ, "NEUROJAX_CACHE_DIR": str(tmp_path)}
  run = [sys.executable, "-c", CHILD]
  subprocess.run(run, env=env, check=True)
  (library,) = (tmp_path / "kernels").iterdir()
  content = library.read_bytes()
  changed = bytearray(content)
  changed[len(content) // 2] ^= 1
  library.write_bytes(
    {"cut": content[: len(content) // 2], "emptied": b"", "changed": bytes(changed)}[damage]
  )
  subprocess.run(run, env=env, check=True)
  (library,) = (tmp_path / "kernels").iterdir()
  healed = library.stat().st_mtime_ns
  subprocess.run(run, env=env, check=True)
  assert library.stat().st_mtime_ns == healed


@needs_kernel
def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path):
  (tmp_path / "file").write_text("")
  env = {**os.environ, "NEUROJAX_CACHE_DIR": str(tmp_path / "file"), "TMPDIR": str(tmp_path)}
  subprocess.run([sys.executable, "-c", CHILD], env=env, check=True)
  assert [path.name for path in tmp_path.iterdir()] == ["file"]
