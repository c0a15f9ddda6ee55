"""The library of CPU kernels: built once, kept whole, and machines that cannot have it."""

import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from neurojax.kernels.gemm import api, cpu
from neurojax.kernels.native import library
from tests.kernels.gemm import problem

needs_kernel = pytest.mark.skipif(
  library.unavailable() is not None, reason=str(library.unavailable())
)


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
  built = library._build_once.__wrapped__()
  monkeypatch.setattr(library, "_build_once", lambda: built)
  api._warn_once.cache_clear()
  w = problem.weight(8, 100, 64, "w2a8")
  x = jnp.asarray(problem.rows(2, 100))
  with pytest.raises(NotImplementedError, match=reason):
    cpu.matmul(x, w)
  for _ in range(2):
    np.testing.assert_array_equal(api.matmul(x, w), api.matmul(x, w, implementation="xla"))
  assert len(caplog.records) == 1
  assert library.unavailable() in caplog.text


@needs_kernel
def test_a_source_that_does_not_compile_is_named(monkeypatch, tmp_path):
  source = tmp_path / "cpu.cc"
  source.write_text("#error no good\n")
  monkeypatch.setenv("NEUROJAX_CACHE_DIR", str(tmp_path))
  monkeypatch.setattr(library, "SOURCES", (source,))
  name, reason = library._build_once.__wrapped__()
  assert name is None and "cannot compile" in reason and "no good" in reason
  assert not list((tmp_path / "kernels").iterdir())


CHILD = """
import jax.numpy as jnp, numpy as np
from neurojax.kernels.gemm import cpu
from neurojax.kernels.native import library
from neurojax.weights.ternary import TernaryArray
# One source and its kernel, and no optimization: a fifth of the time.
library.SOURCES, library._SYMBOLS = library.SOURCES[:1], {"gemm": "NeurojaxGemm"}
library._FLAGS = ("-O0", *library._FLAGS[1:])
w = TernaryArray(jnp.full((3, 16), 0b10101010, jnp.uint8), jnp.ones((1, 1)), (64, 3), 1, None)
assert library.unavailable() is None, library.unavailable()
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
