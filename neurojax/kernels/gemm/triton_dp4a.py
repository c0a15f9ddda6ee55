"""Multiplies a few int8 rows by ternary weights without tensor cores, in Pallas' Triton.

For 1 to 4 rows a tensor core would idle on padding. The instruction dp4a adds four products of int8
to an int32, for each row anew. A program computes `n` channels and walks along the contracted axis,
`y` bytes of codes a step; each thread loads 16 bytes, which lie within one scale group.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from neurojax.kernels.gemm.triton_planes import FIELDS, Planes, unpack

MAX_ROWS = 4

_CHUNK = 16
"""Bytes of codes that one thread loads at once; a scale group has a multiple of these."""


@dataclass(frozen=True)
class Tiles:
  """How the work is cut.

  Attributes:
    n: Channels of one program, a power of two.
    y: Bytes of codes of a channel that are read at once, a power of two.
    warps: Warps of 32 threads in a program.
  """

  n: int = 16
  y: int = 512
  warps: int = 4


def dp4a(
  x: Planes,
  codes: Array,
  scales: Array,
  group_size: int | None,
  layer: Array | None,
  tiles: Tiles,
  interpret: bool = False,
) -> Array:
  """Multiply at most MAX_ROWS int8 rows by one of stacked weights; arguments as for `triton_dot.dot`."""
  _, m, _ = x.values.shape
  n = codes.shape[1]
  operands = [codes, scales, x.values, x.row_scales]
  operands += [] if layer is None else [layer.reshape(1).astype(jnp.int32)]
  kernel = functools.partial(
    _kernel,
    group_y=None if group_size is None else group_size // FIELDS,
    tiles=tiles,
    interpret=interpret,
  )
  return pl.pallas_call(
    kernel,
    grid=(pl.cdiv(n, tiles.n),),
    out_shape=jax.ShapeDtypeStruct((m, n), jnp.float32),
    compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=1),
    interpret=interpret,
    name="ternary_dp4a",
  )(*operands)


def _kernel(
  codes_ref: Any,
  scales_ref: Any,
  x_ref: Any,
  row_scales_ref: Any,
  *refs: Any,
  group_y: int | None,
  tiles: Tiles,
  interpret: bool,
) -> None:
  *rest, o_ref = refs
  layer = rest[0][0] if rest else 0
  _, m, y = x_ref.shape
  n = codes_ref.shape[1]
  rows = pl.program_id(0) * tiles.n + jnp.arange(tiles.n)
  # Rows past the end repeat the last one: every program that writes it writes the same.
  rows = jnp.minimum(rows, n - 1) if n % tiles.n else rows
  chunks = tiles.y // _CHUNK

  def load(ref: Any, index: Any, mask: Array | None, **hints: Any) -> Array:
    return plgpu.load(ref.at[index], mask=mask, other=None if mask is None else 0, **hints)

  totals = [0 for _ in range(m)]
  for start in range(0, y, tiles.y):
    ys = start + jnp.arange(tiles.y)
    mask = None if start + tiles.y <= y else ys < y
    codes = load(
      codes_ref,
      (layer, rows[:, None], ys[None, :]),
      None if mask is None else mask[None, :],
      eviction_policy="evict_first",
    )
    planes = unpack(codes, jnp.int8, interpret)
    for i in range(m):
      xs = [
        jnp.broadcast_to(load(x_ref, (j, i, ys), mask)[None, :], (tiles.n, tiles.y))
        for j in range(FIELDS)
      ]
      sums = _dp4a(planes, xs, interpret).reshape(tiles.n, chunks, _CHUNK).sum(-1)
      if group_y is not None:
        group = lax.div(start + _CHUNK * jnp.arange(chunks), group_y)
        group = jnp.minimum(group, scales_ref.shape[2] - 1)
        scales = scales_ref[layer, rows[:, None], group[None, :]]
        sums = sums.astype(jnp.float32) * scales.astype(jnp.float32)
      totals[i] += sums
  for i in range(m):
    unit = row_scales_ref[i] * jnp.float32(1 / -64)
    total = totals[i].sum(-1).astype(jnp.float32)
    scale = 1 if group_y is not None else scales_ref[layer, 0, 0].astype(jnp.float32)
    o_ref[i, rows] = total * (scale * unit)


def _dp4a(planes: list[Array], xs: list[Array], interpret: bool) -> Array:
  """Products summed four at a time, int32 in the planes' shape; only sums over a whole chunk mean
  something, as a thread leaves its sum in the first of its four bytes."""
  if interpret:
    return sum(p.astype(jnp.int32) * x.astype(jnp.int32) for p, x in zip(planes, xs, strict=True))
  return plgpu.elementwise_inline_asm(
    "{ .reg .b32 t; dp4a.s32.s32 t, $4, $8, 0; dp4a.s32.s32 t, $5, $9, t;"
    " dp4a.s32.s32 t, $6, $10, t; dp4a.s32.s32 $0, $7, $11, t;"
    " mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; }",
    args=[*planes, *xs],
    constraints=",".join(["=r"] * 4 + ["r"] * 8),
    pack=4,
    result_shape_dtypes=[jax.ShapeDtypeStruct(planes[0].shape, jnp.int32)],
  )[0]
