"""Compile for an H200 on a machine without a GPU, and read the assembly and what the assembler says of it."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding

from neurojax.kernels import gpus

TARGET = Path(__file__).with_name("h200.pbtxt")
"""What XLA knew of the device: --xla_dump_to on an H200 writes *.gpu_target_config.pbtxt."""


def why_not() -> str | None:
  """Why this machine cannot compile for the GPU, or None if it can."""
  if reason := gpus.why_not_jax():
    return reason
  if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
    return "the CUDA packages are not installed: pip install -e '.[cuda13]'"
  if os.environ.get("JAX_SKIP_CUDA_CONSTRAINTS_CHECK") != "1":
    return "JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 is not set"
  if not _assembler():
    return "ptxas was not found: it is one of the CUDA packages"
  return None


@functools.cache
def _assembler() -> str | None:
  found = (str(tool) for base in sys.path for tool in Path(base).glob("nvidia/cu*/bin/ptxas"))
  return next(found, None) or shutil.which("ptxas")


def compile_for_h200(
  f: Callable[..., Any],
  *args: Any,
  donate: tuple[int, ...] = (),
  options: dict[str, str | bool] | None = None,
) -> Any:
  """`jax.jit(f)` compiled for an H200.

  Args:
    args: Arrays or ShapeDtypeStructs, or trees of them.
    options: Of XLA, for this program alone.
  """
  device = topologies.get_topology_desc(
    platform="cuda", topology_name="gpu", topology="1x1x1", target_config=TARGET.read_text()
  ).devices[0]
  sharding = SingleDeviceSharding(device)
  args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
  kind = AbstractDevice(device_kind=device.device_kind, num_cores=None, platform="gpu")
  mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=kind)
  # As users have it, where other tests compile without most optimizations (`conftest`).
  full = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.jit(f, out_shardings=sharding, donate_argnums=donate).trace(*args)
    return traced.lower(lowering_platforms=("cuda",)).compile(
      compiler_options=full | (options or {})
    )


def compile_to_ptx(
  f: Callable[..., Any], *args: Any, kernel: str, donate: tuple[int, ...] = ()
) -> tuple[Any, str]:
  """`compile_for_h200`, and the PTX of the one Triton kernel whose name begins with `kernel`."""
  with tempfile.TemporaryDirectory() as folder:
    options = {"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"}
    compiled = compile_for_h200(f, *args, donate=donate, options=options)
    modules = [path.read_text() for path in Path(folder).glob("*.ptx")]
  [ptx] = [module for module in modules if f".entry {kernel}" in module]
  return compiled, ptx


def assemble(ptx: str) -> str:
  """What ptxas reports of each kernel for sm_90a."""
  with tempfile.TemporaryDirectory() as folder:
    source = Path(folder, "kernel.ptx")
    source.write_text(ptx)
    command = [_assembler(), "-arch=sm_90a", "-v", "-o", str(Path(folder, "kernel")), str(source)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def spills(report: str) -> int:
  """Bytes stored and loaded for want of registers, by all kernels of a ptxas report."""
  found = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
  assert found, f"nothing of spills in {report!r}"
  return sum(int(count) for pair in found for count in pair)


def instructions_per_weight(ptx: str, product: str) -> float:
  """PTX instructions for each weight that a thread multiplies.

  Counted are the basic blocks in which there is a product: loops over weights, and what stands
  beside a product that is not in a loop. What ptxas makes of them is not known without a
  disassembler.

  Args:
    ptx: Of one kernel.
    product: How the name of the instruction begins: "dp4a.u32.s32", "mma.sync", "wgmma.mma_async".
  """
  blocks = [block for block in _blocks(ptx) if any(name.startswith(product) for name in block)]
  weights = sum(_share(name) for block in blocks for name in block if name.startswith(product))
  assert weights, f"no {product} in a kernel of {len(ptx)} bytes"
  return sum(map(len, blocks)) / weights


def _share(product: str) -> int:
  """Weights that a thread gives to one instruction; matrix instructions have them as operand A."""
  if product.startswith("dp4a"):
    return 4
  m, k = map(int, re.search(r"\.m(\d+)n\d+k(\d+)\.", product).groups())
  return m * k // (128 if product.startswith("wgmma") else 32)


def _blocks(ptx: str) -> list[list[str]]:
  """Names of the instructions of each basic block of the only kernel."""
  ptx = re.sub(r"//.*|^\s*\.loc\s.*", "", ptx, flags=re.MULTILINE)
  _, kernel = ptx.split(".entry")
  blocks: list[list[str]] = [[]]
  for statement in kernel[kernel.index("{") :].split(";"):
    # Labels, unlike "::" within a name, begin blocks.
    *labels, instruction = re.split(r"[\w$%.]+:(?!:)", statement)
    if labels:
      blocks.append([])
    words = instruction.strip("{} \t\n").split()
    if words and words[0].startswith("@"):
      words.pop(0)
    if not words or words[0].startswith("."):
      continue
    blocks[-1].append(words[0])
    if words[0].split(".")[0] in ("bra", "brx", "ret", "exit", "trap"):
      blocks.append([])
  return blocks
