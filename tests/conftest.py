"""Every test: 8 fake CPU devices, no rank promotion, shapes checked, nothing but loopback."""

import os
import socket
import tempfile
from collections.abc import Iterator

# Programs compiled by tests, and digests, are kept apart from the user's own; servers that tests start inherit it.
os.environ.setdefault("NEUROJAX_CACHE_DIR", tempfile.mkdtemp(prefix="neurojax-tests-"))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook(["neurojax.model", "neurojax.quant", "neurojax.ternary"], "beartype.beartype")
# No deadlines: on a busy machine they say nothing.
hypothesis.settings.register_profile("neurojax", deadline=None)
hypothesis.settings.load_profile("neurojax")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def _programs_end_with_their_module() -> Iterator[None]:
  """A worker that keeps every program it ever compiled grows to several GB."""
  yield
  jax.clear_caches()


_LOOPBACK = ("127.", "::1", "localhost")


@pytest.fixture(autouse=True)
def _loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
  connect = socket.socket.connect

  def guarded(self: socket.socket, address: object) -> None:
    if isinstance(address, tuple) and not str(address[0]).startswith(_LOOPBACK):
      raise AssertionError(f"a test tried to reach {address[0]}")
    return connect(self, address)

  monkeypatch.setattr(socket.socket, "connect", guarded)
