"""Writes packed weights out for a dense product, which pays when many rows share the cost."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from neurojax.kernels.gemm.reference import quantize_rows
from neurojax.kernels.gemm.triton_planes import FIELDS, unpack, unpacked_unit
from neurojax.weights.ternary import TernaryArray

_N = 32
_Y = 128
_WARPS = 4


def dequantize(
  w: TernaryArray, dtype: Any = jnp.bfloat16, *, layer: Array | None = None, interpret: bool = False
) -> Array:
  """Write a weight out as [N, 4Y], padding included: code times the scale rounded to `dtype`.

  Exact where the scales are `dtype` already; a float16 scale becomes bfloat16 with a relative
  error of up to 2**-8.

  Args:
    dtype: bfloat16 or float16; int8 for codes without their scale.
    layer: int32 scalar: index into a stack of weights.
  """
  codes, scales = _stacked(w.codes), _stacked(w.scales)
  return _write(
    codes,
    None if dtype == jnp.int8 else scales.astype(dtype),
    group_size=w.group_size,
    dtype=dtype,
    layer=layer,
    interpret=interpret,
  )


def prefill(
  x: Float[Array, "M K"], w: TernaryArray, *, layer: Array | None = None, interpret: bool = False
) -> Float[Array, "M N"]:
  """Multiply by the whole weight written out: float32 sums of exact products.

  One scale for the tensor: int8 ("w2a8") or bfloat16 ("w2a16") codes, and the scale afterwards.
  Groups: operands in the type of the scales, so that code times scale is exact. bfloat16 x fits
  float16 when a power of two brings each row's largest element to 2**14 .. 2**15: what is then
  too small for float16 is less than 2**-39 of that element. float32 scales take two bfloat16
  products, good to 2**-16 of each scale.
  """
  if w.mode == "w2a8":
    x, row_scales = quantize_rows(x)
  else:
    x, row_scales = x.astype(jnp.bfloat16), None
  pad = FIELDS * w.codes.shape[-1] - x.shape[1]
  x = jnp.pad(x, ((0, 0), (0, pad))) if pad else x
  codes, scales = _stacked(w.codes), _stacked(w.scales)
  write = functools.partial(
    _write, codes, group_size=w.group_size, layer=layer, interpret=interpret
  )
  if w.group_size is None:
    y = _contract(x, write(None, dtype=x.dtype)).astype(jnp.float32)
    y *= scales[0 if layer is None else layer, 0, 0].astype(jnp.float32)
  elif scales.dtype == jnp.float16:
    if row_scales is None:
      _, exponent = jnp.frexp(jnp.abs(x.astype(jnp.float32)).max(-1))
      row_scales = jnp.ldexp(jnp.float32(1), exponent - 15)
      x = x.astype(jnp.float32) / row_scales[:, None]
    y = _contract(x.astype(jnp.float16), write(scales, dtype=jnp.float16))
  else:
    high = scales.astype(jnp.bfloat16)
    y = _contract(x.astype(jnp.bfloat16), write(high, dtype=jnp.bfloat16))
    if scales.dtype == jnp.float32:
      low = (scales - high.astype(jnp.float32)).astype(jnp.bfloat16)
      y += _contract(x.astype(jnp.bfloat16), write(low, dtype=jnp.bfloat16))
  return y if row_scales is None else y * row_scales[:, None]


def _contract(x: Array, w: Array) -> Array:
  wide = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
  return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=wide)


def _stacked(a: Array) -> Array:
  return a if a.ndim == 3 else a[None]


@functools.partial(jax.jit, static_argnames=("group_size", "dtype", "interpret"))
def _write(
  codes: Array,
  scales: Array | None,
  *,
  group_size: int | None,
  dtype: Any,
  layer: Array | None,
  interpret: bool,
) -> Array:
  """Write [N, 4Y] of code * scale, or of codes alone if there are no scales."""
  _, n, y = codes.shape
  operands = [codes]
  operands += [] if scales is None else [scales]
  operands += [] if layer is None else [layer.reshape(1).astype(jnp.int32)]
  return pl.pallas_call(
    functools.partial(
      _kernel,
      has_scales=scales is not None,
      group_y=None if group_size is None else group_size // FIELDS,
      interpret=interpret,
    ),
    grid=(pl.cdiv(n, _N), pl.cdiv(y, _Y)),
    out_shape=jax.ShapeDtypeStruct((n, FIELDS * y), dtype),
    compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
    interpret=interpret,
    name="ternary_dequantize",
  )(*operands)


def _kernel(
  codes_ref: Any, *refs: Any, has_scales: bool, group_y: int | None, interpret: bool
) -> None:
  *rest, o_ref = refs
  scales_ref = rest.pop(0) if has_scales else None
  layer = rest[0][0] if rest else 0
  _, n, y = codes_ref.shape
  rows = pl.program_id(0) * _N + jnp.arange(_N)
  rows = jnp.minimum(rows, n - 1) if n % _N else rows
  start = pl.program_id(1) * _Y
  ys = start + jnp.arange(_Y)
  ragged = y % _Y
  codes = plgpu.load(
    codes_ref.at[layer, rows[:, None], ys[None, :]],
    mask=(ys < y)[None, :] if ragged else None,
    other=0 if ragged else None,
    eviction_policy="evict_first",
  )
  dtype = o_ref.dtype
  planes = unpack(codes, dtype, interpret)
  if has_scales:
    run = _Y if group_y is None else min(group_y, _Y)
    group = lax.div(start + run * jnp.arange(_Y // run), jnp.int32(group_y or y))
    group = jnp.minimum(group, scales_ref.shape[2] - 1)
    scale_rows = rows[:, None] if group_y is not None else rows[:, None] * 0
    s = scales_ref[layer, scale_rows, group[None, :]] * (1 / unpacked_unit(dtype))
    s = jnp.broadcast_to(s[:, :, None], (_N, _Y // run, run)).reshape(_N, _Y)
  else:
    s = 1 / unpacked_unit(dtype) if dtype != jnp.int8 else None
  planes = [-(p >> 6) if s is None else p * s for p in planes]
  out = jnp.stack(
    [jnp.stack([planes[0], planes[2]], -1), jnp.stack([planes[1], planes[3]], -1)], -1
  ).reshape(_N, FIELDS * _Y)
  ks = FIELDS * start + jnp.arange(FIELDS * _Y)
  plgpu.store(
    o_ref.at[rows[:, None], ks[None, :]], out, mask=(ks < FIELDS * y)[None, :] if ragged else None
  )
