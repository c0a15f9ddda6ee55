"""Multiplies on a CPU by the C++ kernel in cpu.cc, which is compiled for this machine when first wanted.

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
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from neurojax.folders import cache_dir
from neurojax.kernels.gemm.layer import take_out
from neurojax.weights.ternary import TernaryArray, TernaryLayer

log = logging.getLogger(__name__)

SOURCES = tuple(Path(__file__).with_name(name) for name in ("cpu.cc", "cpu_vectors.h"))
# Without -ffast-math and contraction every instruction set gives the same bits.
_FLAGS = (
  *("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-w"),
  *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
# Flags for the instructions of this machine; not every compiler knows the first, or any.
_NATIVE = (("-march=native",), ("-mcpu=native",), ())
_TIMEOUT_S = 600
"""Seconds that the compiler may take: it needs about ten, and many times that on a busy machine."""
_LOCK = threading.Lock()


def unavailable() -> str | None:
  """Why this machine cannot have the kernel, or None; compiles it if need be."""
  return _kernel()[1]


def why_not(m: int, n: int, k: int, w: TernaryArray) -> str | None:
  """Why x [m, k] cannot be multiplied by w here, or None if it can."""
  del m, n, k, w
  return unavailable()


def matmul(
  x: Float[Array, "M K"], w: TernaryArray, *, layer: Int[Array, ""] | None = None
) -> Float32[Array, "M N"]:
  """`reference.matmul`; `matmul_all` with a single weight."""
  return matmul_all(x, [w if layer is None else TernaryLayer(w, layer)])[0]


def matmul_all(
  x: Float[Array, "M K"], weights: Sequence[TernaryArray | TernaryLayer]
) -> list[Float32[Array, "M N"]]:
  """`reference.matmul` with each weight, in one call: x is prepared and threads are woken once.

  Sums over scale groups go from the first group to the last; in "w2a16" a group is summed in
  pairs of neighbours, from the first to the last of each 256 elements. So the bits of a result do
  not depend on the instruction set, the number of threads or what else is computed in the call.

  Args:
    weights: All of one mode. A layer's stack is read in place.
  Raises:
    NotImplementedError: `unavailable` gives the reason.
    ValueError: x and the weights do not go together.
  """
  name, reason = _kernel()
  if name is None:
    raise NotImplementedError(f"{reason}: use the implementation 'xla'")
  if x.dtype not in (jnp.float32, jnp.bfloat16):
    raise ValueError(f"x is {x.dtype}: cast it to float32 or bfloat16")
  operands, results, group_sizes, modes = [x], [], [], set()
  for weight in weights:
    w, layer = (
      (weight.stacked, weight.index) if isinstance(weight, TernaryLayer) else (weight, None)
    )
    jax.eval_shape(lambda w=w, layer=layer: take_out(w, layer))
    n, y = w.codes.shape[-2:]
    if -(-x.shape[1] // 64) * 16 != y:
      raise ValueError(f"x of shape {x.shape} does not fit codes of shape {w.codes.shape}")
    operands += [w.codes, w.scales, jnp.asarray(0 if layer is None else layer, jnp.int32)]
    results.append(jax.ShapeDtypeStruct((x.shape[0], n), jnp.float32))
    group_sizes.append(w.group_size or 0)
    modes.add(w.mode)
  if len(modes) != 1:
    raise ValueError(f"weights of modes {sorted(modes)}: multiply by those of one at a time")
  call = jax.ffi.ffi_call(name, results)
  return call(*operands, mode=np.int64(modes == {"w2a8"}), group_sizes=np.int64(group_sizes))


def _kernel() -> tuple[str | None, str | None]:
  # Two threads must not both build it: XLA takes a name once.
  with _LOCK:
    return _build_once()


@functools.cache
def _build_once() -> tuple[str | None, str | None]:
  """The name under which XLA knows the kernel, or why there is none."""
  if sys.byteorder != "little":
    return None, f"the CPU kernel reads little-endian words, this machine is {sys.byteorder}-endian"
  try:
    command = _compiler()
    key = _key(command)
    with _folder() as folder:
      library = _whole(folder, key) or _compile(command, folder, key)
      handler = ctypes.CDLL(str(library)).NeurojaxGemm
  except subprocess.CalledProcessError as error:
    message = error.stderr.strip().splitlines() or [f"exit status {error.returncode}"]
    return None, f"{error.cmd[0]} cannot compile the CPU kernel: {message[0]}"
  except (OSError, ValueError, AttributeError, subprocess.SubprocessError) as error:
    return None, f"the CPU kernel cannot be built: {error}"
  name = f"neurojax_gemm_{key}"
  jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
  return name, None


def _compiler() -> list[str]:
  """The command and its flags. Raises: FileNotFoundError: there is no compiler."""
  compiler = shlex.split(os.environ.get("CXX") or "c++")
  if shutil.which(compiler[0]) is None:
    raise FileNotFoundError(f"no C++ compiler {compiler[0]!r}: install one, or name it in CXX")
  for native in _NATIVE:
    command = [*compiler, *_FLAGS, *native, f"-I{jax.ffi.include_dir()}"]
    if _run([*command, "-E", "-x", "c++", os.devnull], check=False).returncode == 0:
      return command
  raise ValueError(f"{shlex.join(compiler)} does not preprocess an empty file")


def _key(command: list[str]) -> str:
  """A hash of the sources, the command, XLA's interface and what the compiler makes of this CPU."""
  macros = _run([*command, "-dM", "-E", "-x", "c++", os.devnull]).stdout
  parts = [source.read_text(encoding="utf-8") for source in SOURCES]
  parts += [shlex.join(command), jaxlib.__version__, macros]
  return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _whole(folder: Path, key: str) -> Path | None:
  """The library of a key whose bytes are those that were written; damaged ones are removed."""
  for library in sorted(folder.glob(f"gemm-{key}*.so")):
    if library == _path(folder, key, library.read_bytes()):
      return library
    log.info("%s is damaged or of an older version: removed", library)
    library.unlink(missing_ok=True)
  return None


def _path(folder: Path, key: str, content: bytes) -> Path:
  return folder / f"gemm-{key}-{hashlib.sha256(content).hexdigest()[:16]}.so"


def _compile(command: list[str], folder: Path, key: str) -> Path:
  # Into a file of this process's own, moved to its place: others see all of it or nothing.
  handle, temporary = tempfile.mkstemp(dir=folder, suffix=".so")
  os.close(handle)
  try:
    _run([*command, str(SOURCES[0]), "-o", temporary])
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
