"""Tests that run kernels where they are meant to run: on a Hopper GPU, beside a CPU.

JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false python -m pytest -k on_gpu
"""

import jax
import pytest


def why_not() -> str | None:
  """Why this process cannot run the kernels, or None if it can."""
  device = jax.devices()[0]
  if device.platform != "gpu":
    return f"JAX runs on {device.platform} here: set JAX_PLATFORMS=cuda,cpu on a machine with a GPU"
  if device.compute_capability != "9.0":
    return f"needs compute capability 9.0, {device.device_kind} has {device.compute_capability}"
  return None


needed = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
