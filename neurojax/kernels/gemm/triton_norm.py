"""RMSNorm, rounding and splitting by field in one kernel: `Planes` that several products share."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from neurojax.kernels.gemm.triton_planes import FIELDS, Planes
from neurojax.ternary.array import Mode


@functools.partial(jax.jit, static_argnames=("width", "mode", "eps", "interpret"))
def norm(
  x: Float[Array, "M K"],
  weight: Float[Array, " K"] | None,
  *,
  width: int,
  mode: Mode,
  eps: float = 1e-6,
  interpret: bool = False,
) -> Planes:
  """`prepare(x * rsqrt(mean(x**2) + eps) * weight)`, in float32 until it is rounded.

  Args:
    weight: Of the norm; None: x as it is.
    width: Y, bytes of codes in a row of the weights to come.
  """
  m, k = x.shape
  quantized = mode == "w2a8"
  out = [jax.ShapeDtypeStruct((FIELDS, m, width), jnp.int8 if quantized else jnp.bfloat16)]
  out += [jax.ShapeDtypeStruct((m,), jnp.float32)] if quantized else []
  planes = pl.pallas_call(
    functools.partial(_kernel, has_weight=weight is not None, k=k, eps=eps, interpret=interpret),
    grid=(m,),
    out_shape=out,
    compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=1),
    interpret=interpret,
    name="ternary_norm",
  )(*([x] if weight is None else [x, weight]))
  return Planes(*planes)


def _kernel(x_ref: Any, *refs: Any, has_weight: bool, k: int, eps: float, interpret: bool) -> None:
  weight_ref = refs[0] if has_weight else None
  planes_ref, *scales_ref = refs[1:] if has_weight else refs
  row = pl.program_id(0)
  width = planes_ref.shape[2]
  ys = jnp.arange(pl.next_power_of_2(width))
  planes = []
  for j in range(FIELDS):
    mask = FIELDS * ys + j < k
    planes.append(_load(x_ref, (row, FIELDS * ys + j), mask))
  if weight_ref is not None:
    mean = sum((p * p).sum() for p in planes) / k
    inverse = jax.lax.rsqrt(mean + eps)
    for j in range(FIELDS):
      weight = _load(weight_ref, (FIELDS * ys + j,), FIELDS * ys + j < k)
      planes[j] = planes[j] * inverse * weight
  if scales_ref:
    absmax = functools.reduce(jnp.maximum, [jnp.abs(p).max() for p in planes])
    inverse = jnp.where(absmax > 0, 127 / jnp.where(absmax > 0, absmax, 1), 0)
    planes = [_round(p * inverse, interpret) for p in planes]
    scales_ref[0][row] = absmax / 127
  for j in range(FIELDS):
    plgpu.store(planes_ref.at[j, row, ys], planes[j].astype(planes_ref.dtype), mask=ys < width)


def _load(ref: Any, index: Any, mask: Array) -> Array:
  return plgpu.load(ref.at[index], mask=mask, other=0).astype(jnp.float32)


def _round(x: Array, interpret: bool) -> Array:
  """Half to even, for which this backend has no primitive."""
  if interpret:
    return jnp.round(x)
  return plgpu.elementwise_inline_asm(
    "cvt.rni.f32.f32 $0, $1;",
    args=[x],
    constraints="=f,f",
    pack=1,
    result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
  )[0]
