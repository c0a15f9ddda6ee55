"""What the GPU kernels need of JAX and of a card, and the card that their estimates are for."""

import re

import jax

OLDEST_JAX = (0, 11, 2)
"""The oldest JAX whose Pallas compiles these kernels."""

MULTIPROCESSORS = 132
"""Multiprocessors of an H100 or H200. Only estimates of a good cut use it, no result depends on it."""

CAPABILITIES = {"triton": (8.0, float("inf")), "mosaic": (9.0, 9.0)}
"""Least and greatest CUDA compute capability that each kind of kernel is written for."""


def why_not_jax() -> str | None:
  """Why this JAX cannot compile the kernels, or None if it can."""
  if jax.__version_info__ >= OLDEST_JAX:
    return None
  oldest = ".".join(map(str, OLDEST_JAX))
  return f"needs jax {oldest} or newer, which needs Python 3.12; this is jax {jax.__version__}"


def why_not_card(kind: str, device: jax.Device) -> str | None:
  """Why a device cannot run kernels of a kind ("triton" or "mosaic"), or None if it can."""
  least, greatest = CAPABILITIES[kind]
  capability = str(getattr(device, "compute_capability", None) or "unknown")
  if re.fullmatch(r"\d+\.\d+", capability) and least <= float(capability) <= greatest:
    return None
  wanted = f"{least} or newer" if greatest == float("inf") else f"{least}"
  return f"needs compute capability {wanted}, {device.device_kind}: {capability}"
