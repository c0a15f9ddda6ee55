"""Compile for an H200 on a machine without a GPU, and read what the assembler says of each kernel."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding

TARGET = Path(__file__).with_name("h200.pbtxt")
"""What XLA knew of the device: --xla_dump_to on an H200 writes *.gpu_target_config.pbtxt."""


def why_not() -> str | None:
  """Why this machine cannot compile for the GPU, or None if it can."""
  if tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11):
    return f"the GPU kernels need jax 0.11.2 or newer (Python 3.12), this is {jax.__version__}"
  if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
    return "the CUDA packages are not installed: pip install -e '.[cuda13]'"
  if os.environ.get("JAX_SKIP_CUDA_CONSTRAINTS_CHECK") != "1":
    return "JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 is not set"
  return None


def compile_for_h200(f: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Any:
  """`jax.jit(f)` compiled for an H200. Arguments are arrays or ShapeDtypeStructs, or trees of them."""
  device = topologies.get_topology_desc(
    platform="cuda", topology_name="gpu", topology="1x1x1", target_config=TARGET.read_text()
  ).devices[0]
  sharding = SingleDeviceSharding(device)
  args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
  kind = AbstractDevice(device_kind=device.device_kind, num_cores=None, platform="gpu")
  mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=kind)
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.jit(f, out_shardings=sharding, donate_argnums=donate).trace(*args)
    return traced.lower(lowering_platforms=("cuda",)).compile()
