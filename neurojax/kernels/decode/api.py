"""One token of one sequence through a span of layers, by the implementation that the machine allows.

    implementation    runs on                         the step is
    triton            CUDA GPUs of sm_80 and newer    one persistent kernel
    reference         anything                        some dozens of XLA's kernels a layer

Off a GPU the reference is taken. On a GPU it is a last resort, and the log says so, once for each
reason.
"""

import functools
import logging
from typing import Literal, get_args

import jax
from jaxtyping import Array, Float, Int

from neurojax.kernels import gpus
from neurojax.kernels.decode import reference
from neurojax.kernels.decode.weights import LayerWeights
from neurojax.weights.ternary import TernaryArray

Implementation = Literal["reference", "triton"]

log = logging.getLogger(__name__)


def decode(
  x_D: Float[Array, "D"],
  weights: LayerWeights,
  keys: Float[Array, "L P K S H"],
  values: Float[Array, "L P K S H"],
  rotation_B2H: Float[Array, "1 2 H"],
  position: Int[Array, ""],
  *,
  slot: Int[Array, ""] | None = None,
  final_norm: Float[Array, "D"] | None = None,
  head: TernaryArray | None = None,
  implementation: Implementation | None = None,
  programs: int | None = None,
  interpret: bool = False,
) -> tuple[Float[Array, "D"], Float[Array, "V"] | None, Array, Array]:
  """Run one token through the layers, and through final norm and head if they are given.

  Stores the token's key and value at `position` and attends over keys 0..position. Activations are
  rounded to int8, one scale for each vector, in front of every product ("w2a8"). The kernel has an
  order of sums of its own: its bits are not those of one row of a batch.

  Args:
    x_D: float32, the input of the first layer.
    keys, values: All layers' caches, of P slots; donate them, and they are written in place.
    rotation_B2H: `attention.api.rotation` of the position, style "half".
    position: int32, below S.
    slot: int32, 0 .. P-1: where the sequence's keys and values are. None: slot 0.
    final_norm: float32; given with the head.
    head: [D, V] or [V, D] as rows of V outputs.
    implementation: None: the kernel on a GPU that can run it, else the reference.
    programs: Programs of the kernel's grid, one for each multiprocessor; None: as many as the
      device has.
    interpret: Run the kernel on any device, slowly; `programs` is then 1.
  Returns: x float32 [D] after the last layer, logits float32 [V] or None, keys, values.
  Raises:
    ValueError: another implementation is named.
    NotImplementedError: the named implementation does not take these shapes or this machine.
  """
  if implementation not in (None, *get_args(Implementation)):
    raise ValueError(
      f"implementation = {implementation!r}: choose {', '.join(get_args(Implementation))} or None"
    )
  device = jax.devices()[0]
  programs = programs or (1 if interpret else getattr(device, "core_count", 1))
  if implementation is None:
    implementation = "reference"
    if device.platform == "gpu":
      reason = why_not(weights, keys.shape[3], programs, device=device)
      implementation = "reference" if reason else "triton"
      if reason:
        _warn(f"a token takes the slow reference in place of one kernel: {reason}")
  if implementation == "reference":
    return reference.decode(
      x_D, weights, keys, values, rotation_B2H, position,
      slot=slot, final_norm=final_norm, head=head,
    )  # fmt: skip
  h = weights.shape.h
  return _triton().decode(
    x_D, weights, keys, values,
    rotation_B2H[0, 0, : h // 2], rotation_B2H[0, 1, h // 2 :], position,
    slot=slot, final_norm=final_norm, head=head, programs=programs, interpret=interpret,
  )  # fmt: skip


def why_not(
  weights: LayerWeights, capacity: int, programs: int, *, device: jax.Device | None = None
) -> str | None:
  """Why the kernel cannot run these weights on so many programs, or None if it can.

  Args:
    capacity: Positions of a slot of the cache.
    device: The device to run on; None: only the shapes are asked about.
  """
  if device is not None and (reason := gpus.why_not_jax() or gpus.why_not_card("triton", device)):
    return reason
  return _triton().why_not(weights, capacity, programs)


_warn = functools.cache(log.warning)
"""Logs each message once."""


def _triton():
  # Imported when needed: it loads the GPU's compiler.
  from neurojax.kernels.decode import triton

  return triton
