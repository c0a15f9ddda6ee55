"""Products in C++, compiled for this machine when first wanted: one library of all that CPUs have here.

The library lies in the cache folder. Its name has a hash of all that it was made from and a digest
of its own bytes: a file that was cut short or damaged since is not loaded, which would end the
process by SIGBUS, but built anew. Without a compiler, or where it fails, `unavailable` gives the
reason and nothing else happens.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import jaxlib

from neurojax.folders import cache_dir

log = logging.getLogger(__name__)

_KERNELS = Path(__file__).parents[1]
SOURCES = tuple(_KERNELS / name for name in ("gemm/cpu.cc", "rows/cpu.cc", "rows/attend.cc"))
"""Files that are compiled, each by itself."""
HEADERS = tuple(sorted(_KERNELS.glob("*/*.h")))
_SYMBOLS = {"gemm": "NeurojaxGemm", "rows": "NeurojaxRows", "attend": "NeurojaxAttend"}
# Without -ffast-math and contraction every instruction set gives the same bits.
_FLAGS = (
  *("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-w"),
  *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
# Flags for the instructions of this machine; not every compiler knows the first, or any.
NATIVE = (("-march=native",), ("-mcpu=native",), ())
_TIMEOUT_S = 600
"""Seconds that the compiler may take: it needs about twenty, and many times that on a busy machine."""
_LOCK = threading.Lock()


def unavailable() -> str | None:
  """Why this machine cannot have the kernels, or None; compiles them if need be."""
  return _kernels()[1]


def target(kernel: str) -> str:
  """The name under which XLA knows a kernel.

  Raises: NotImplementedError: `unavailable` gives the reason.
  """
  key, reason = _kernels()
  if key is None:
    raise NotImplementedError(f"{reason}: use the implementation 'xla'")
  return f"neurojax_{kernel}_{key}"


def _kernels() -> tuple[str | None, str | None]:
  # Two threads must not both build it: XLA takes a name once.
  with _LOCK:
    return _build_once()


@functools.cache
def _build_once() -> tuple[str | None, str | None]:
  """The key in the names under which XLA knows the kernels, or why there are none."""
  if sys.byteorder != "little":
    return None, f"CPU kernels read little-endian words, this machine is {sys.byteorder}-endian"
  try:
    command = _compiler()
    key = _key(command)
    with _folder() as folder:
      library = _whole(folder, key) or _compile(command, folder, key)
      loaded = ctypes.CDLL(str(library))
    handlers = {kernel: getattr(loaded, symbol) for kernel, symbol in _SYMBOLS.items()}
  except subprocess.CalledProcessError as error:
    message = error.stderr.strip().splitlines() or [f"exit status {error.returncode}"]
    return None, f"{error.cmd[0]} cannot compile the CPU kernels: {message[0]}"
  except (OSError, ValueError, AttributeError, subprocess.SubprocessError) as error:
    return None, f"the CPU kernels cannot be built: {error}"
  for kernel, handler in handlers.items():
    name = f"neurojax_{kernel}_{key}"
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
  return key, None


def _compiler() -> list[str]:
  """The command and its flags. Raises: FileNotFoundError: there is no compiler."""
  compiler = shlex.split(os.environ.get("CXX") or "c++")
  if shutil.which(compiler[0]) is None:
    raise FileNotFoundError(f"no C++ compiler {compiler[0]!r}: install one, or name it in CXX")
  for native in NATIVE:
    command = [*compiler, *_FLAGS, *native, f"-I{jax.ffi.include_dir()}"]
    if _run([*command, "-E", "-x", "c++", os.devnull], check=False).returncode == 0:
      return command
  raise ValueError(f"{shlex.join(compiler)} does not preprocess an empty file")


def _key(command: list[str]) -> str:
  """A hash of the sources, the command, XLA's interface and what the compiler makes of this CPU."""
  macros = _run([*command, "-dM", "-E", "-x", "c++", os.devnull]).stdout
  parts = [source.read_text(encoding="utf-8") for source in (*SOURCES, *HEADERS)]
  parts += [shlex.join(command), jaxlib.__version__, macros]
  return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _whole(folder: Path, key: str) -> Path | None:
  """The library of a key whose bytes are those that were written; damaged ones are removed."""
  for library in sorted(folder.glob(f"kernels-{key}*.so")):
    if library == _path(folder, key, library.read_bytes()):
      return library
    log.info("%s is damaged or of an older version: removed", library)
    library.unlink(missing_ok=True)
  return None


def _path(folder: Path, key: str, content: bytes) -> Path:
  return folder / f"kernels-{key}-{hashlib.sha256(content).hexdigest()[:16]}.so"


def _compile(command: list[str], folder: Path, key: str) -> Path:
  # Into a file of this process's own, moved to its place: others see all of it or nothing.
  handle, temporary = tempfile.mkstemp(dir=folder, suffix=".so")
  os.close(handle)
  try:
    _run([*command, *map(str, SOURCES), "-o", temporary])
    library = _path(folder, key, Path(temporary).read_bytes())
    os.replace(temporary, library)
    return library
  finally:
    Path(temporary).unlink(missing_ok=True)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
  """Where libraries are kept, or a temporary folder where none can be."""
  kept = cache_dir() / "kernels"
  try:
    kept.mkdir(parents=True, exist_ok=True)
    # Whoever can write there can run code here. Fails if the folder is another user's.
    kept.chmod(0o700)
    writable = os.access(kept, os.W_OK)
  except OSError:
    writable = False
  if writable:
    yield kept
  else:
    with tempfile.TemporaryDirectory(prefix="neurojax-") as temporary:
      yield Path(temporary)


def _run(command: list[str], *, check: bool = True) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    command,
    check=check,
    capture_output=True,
    text=True,
    timeout=_TIMEOUT_S,
    stdin=subprocess.DEVNULL,
  )
