"""Every test: 8 fake CPU devices, no rank promotion, shapes checked, nothing but loopback."""

import atexit
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Programs compiled by tests, and digests, are kept apart from the user's own; servers that tests start inherit it.
if "NEUROJAX_CACHE_DIR" not in os.environ:
  os.environ["NEUROJAX_CACHE_DIR"] = tempfile.mkdtemp(prefix="neurojax-tests-")
  atexit.register(shutil.rmtree, os.environ["NEUROJAX_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# One store of programs for the workers of a session and what they start: many tests compile the same.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.environ["NEUROJAX_CACHE_DIR"] + "/xla")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

from tests import skips, typecheck

install_import_hook(
  [
    f"neurojax.{room}"
    for room in ("model", "weights", "train", "kernels.attention", "kernels.decode", "stage.fused")
  ],
  f"{typecheck.__name__}.check",
)
# No deadlines: on a busy machine they say nothing.
hypothesis.settings.register_profile("neurojax", deadline=None)
hypothesis.settings.load_profile("neurojax")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
  config.addinivalue_line(
    "markers", "optimized: programs of this module are compiled as users have them"
  )
  if not hasattr(config, "workerinput"):  # xdist's workers report to the process that has the list
    config.pluginmanager.register(skips.Skips())


@pytest.fixture(autouse=True, scope="module")
def _programs(request: pytest.FixtureRequest) -> Iterator[None]:
  """Compiled in a half of the time, also by processes that tests start, unless a module is marked
  `optimized`: its bits are compared between programs, or it computes long."""
  quick = os.environ["JAX_PLATFORMS"] == "cpu" and not request.node.get_closest_marker("optimized")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(quick)))
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
  # A worker that keeps every program it ever compiled grows to several GB.
  jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A GGUF file of a model with six small layers and a tokenizer."""
  # Imported here: shapes are checked only in what is imported after the hook above.
  from tests import tinymodel

  return tinymodel.write(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module")
def nothing_ahead() -> Iterator[None]:
  """The kernel for a token reads no weights ahead. That changes no result, and without it every unit of a
  small matrix is written out, which takes long to compile where kernels are interpreted."""
  from neurojax.kernels.decode import tuned

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(tuned, "AHEAD_BYTES", 0)
    patch.setattr(tuned, "AHEAD_QKV_BYTES", 0)
    yield


_LOOPBACK = ("127.", "::1", "localhost")


@pytest.fixture(autouse=True)
def _loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
  connect = socket.socket.connect

  def guarded(self: socket.socket, address: object) -> None:
    if isinstance(address, tuple) and not str(address[0]).startswith(_LOOPBACK):
      raise AssertionError(f"a test tried to reach {address[0]}")
    return connect(self, address)

  monkeypatch.setattr(socket.socket, "connect", guarded)
