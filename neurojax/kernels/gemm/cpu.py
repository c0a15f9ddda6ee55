"""Multiplies on a CPU by the C++ kernel in cpu.cc, which is compiled when first wanted."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from neurojax.kernels.gemm.layer import take_out
from neurojax.kernels.native import library
from neurojax.weights.ternary import TernaryArray, TernaryLayer


def why_not(m: int, n: int, k: int, w: TernaryArray) -> str | None:
  """Why x [m, k] cannot be multiplied by w here, or None if it can."""
  del m, n, k, w
  return library.unavailable()


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
    NotImplementedError: there is no compiled kernel, and `native.library.unavailable` says why.
    ValueError: x and the weights do not go together.
  """
  name = library.target("gemm")
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
