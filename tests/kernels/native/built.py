"""Kernels that are compiled for other instructions than this machine's."""

import platform
from pathlib import Path

import pytest

from neurojax.kernels.native import library

FLAGS = {"plain": (), "avx2": ("-mavx2", "-mf16c", "-mfma")}

# XLA takes the name of a kernel once.
_BUILT: dict[tuple[str, ...], tuple[str | None, str | None]] = {}


def build_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: tuple[str, ...]) -> None:
  """Makes `library` use kernels that are compiled with these flags in place of this machine's.

  Skips the test where the machine has no such instructions.
  """
  if flags and not (
    platform.machine() == "x86_64" and " avx2 " in Path("/proc/cpuinfo").read_text()
  ):
    pytest.skip("this machine has no AVX2")
  if flags not in _BUILT:
    with monkeypatch.context() as patch:
      patch.setenv("NEUROJAX_CACHE_DIR", str(tmp_path))
      patch.setattr(library, "NATIVE", (flags,))
      _BUILT[flags] = library._build_once.__wrapped__()
  built = _BUILT[flags]
  monkeypatch.setattr(library, "_build_once", lambda: built)
  assert built[1] is None
