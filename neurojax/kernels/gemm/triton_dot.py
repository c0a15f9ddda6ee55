"""Multiplies rows by ternary weights on tensor cores, in Pallas' Triton.

A program computes `n` channels of `m` rows. It walks along the contracted axis, `y` bytes of codes a
step, unpacks the codes in registers into one operand of the tensor cores, and never writes them to
memory again. A byte holds four neighbouring elements, so a step is four small products: field j of
all bytes times every fourth element of the rows, from j on (`triton_planes`). With few channels,
`split` programs share the contracted axis, or there would be too few to keep the memory busy; whoever
reads their sums adds them.
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

from neurojax.kernels.gemm.triton_planes import FIELDS, Planes, unpack, unpacked_unit


@dataclass(frozen=True)
class Tiles:
  """How the work is cut.

  Attributes:
    n, m: Channels and rows of one program, powers of two, n >= 16 and m >= 8.
    y: Bytes of codes of a channel that one step of the loop reads, a power of two >= 32.
    split: Programs that share a channel; their sums are added afterwards.
    warps: Warps of 32 threads in a program.
    stages: Steps whose loads are in flight.
  """

  n: int = 64
  m: int = 8
  y: int = 128
  split: int = 1
  warps: int = 4
  stages: int = 4


def dot(
  x: Planes,
  codes: Array,
  scales: Array,
  group_size: int | None,
  layer: Array | None,
  tiles: Tiles,
  interpret: bool = False,
) -> Array:
  """Multiply rows by one of stacked weights.

  Args:
    x: Prepared rows.
    codes, scales: uint8 [L, N, Y], and [L, N, Q] or [L, 1, 1].
    layer: int32 scalar: which of the stack; None: the first.
  Returns: float32 [split, M, N], the sums of the programs that share a channel.
  """
  _, m, y = x.values.shape
  n = codes.shape[1]
  group_y = None if group_size is None else group_size // FIELDS
  values = x.values
  if _halves(group_y) == 2:
    even = (jnp.arange(y) // group_y % 2 == 0)[None, None, :]
    values = jnp.stack([jnp.where(even, values, 0), jnp.where(even, 0, values)], 2)
    values = values.reshape(FIELDS, 2 * m, y)
  operands = [codes, scales, values]
  operands += [] if x.row_scales is None else [x.row_scales]
  operands += [] if layer is None else [layer.reshape(1).astype(jnp.int32)]
  kernel = functools.partial(
    _kernel,
    has_row_scales=x.row_scales is not None,
    group_y=group_y,
    tiles=tiles,
    interpret=interpret,
  )
  return pl.pallas_call(
    kernel,
    grid=(pl.cdiv(n, tiles.n), tiles.split, pl.cdiv(m, tiles.m)),
    out_shape=jax.ShapeDtypeStruct((tiles.split, m, n), jnp.float32),
    compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
    interpret=interpret,
    name="ternary_dot",
  )(*operands)


def _kernel(
  codes_ref: Any,
  scales_ref: Any,
  x_ref: Any,
  *refs: Any,
  has_row_scales: bool,
  group_y: int | None,
  tiles: Tiles,
  interpret: bool,
) -> None:
  *rest, o_ref = refs
  row_scales_ref = rest.pop(0) if has_row_scales else None
  layer = rest[0][0] if rest else 0
  _, m, _ = o_ref.shape
  y = x_ref.shape[2]
  n = codes_ref.shape[1]
  dtype = x_ref.dtype
  # A dot takes 32 bytes of a row: two groups of 16, summed in two columns for each row of x.
  dot_y = tiles.y if group_y is None else max(min(group_y, tiles.y), 32)
  halves = _halves(group_y)
  columns = tiles.m * halves
  steps = pl.cdiv(pl.cdiv(y, tiles.y), tiles.split)
  ragged_y = steps * tiles.split * tiles.y > y

  rows = pl.program_id(0) * tiles.n + jnp.arange(tiles.n)
  # Rows past the end repeat the last one: every program that writes it writes the same.
  rows = jnp.minimum(rows, n - 1) if n % tiles.n else rows
  first = pl.program_id(1) * (steps * tiles.y)
  x_rows = pl.program_id(2) * columns + jnp.arange(columns)

  def add_dots(at: Any, sums: Array) -> Array:
    """Adds the sums over dot_y bytes from `at` on."""
    ys = at + jnp.arange(dot_y)
    codes = _load(
      codes_ref,
      (layer, rows[:, None], ys[None, :]),
      (ys < y)[None, :] if ragged_y else None,
      eviction_policy="evict_first",
    )
    mask = None
    if m % tiles.m:
      mask = (x_rows < m * halves)[:, None]
    if ragged_y:
      mask = _both(mask, (ys < y)[None, :])
    for j, plane in enumerate(unpack(codes, dtype, interpret)):
      x = _load(x_ref, (j, x_rows[:, None], ys[None, :]), mask)
      sums += jnp.dot(plane, x.T, preferred_element_type=sums.dtype)
    return sums

  zeros = jnp.zeros((tiles.n, columns), jnp.int32 if dtype == jnp.int8 else jnp.float32)

  def ungrouped() -> Array:
    step = lambda i, sums: add_dots(first + i * tiles.y, sums)  # noqa: E731
    total = lax.fori_loop(0, steps, step, zeros).astype(jnp.float32)
    return total * scales_ref[layer, 0, 0].astype(jnp.float32)

  def grouped() -> Array:
    per_step = tiles.y // dot_y
    last = scales_ref.shape[2] - 1

    def scales(i: Any) -> list[Array]:
      """Of the groups of a step: loaded a step ahead, because these loads are not pipelined."""
      group = _shift(first + i * tiles.y, group_y)
      return [
        scales_ref[layer, rows, jnp.minimum(group + g, last)]
        for g in range(max(1, tiles.y // group_y))
      ]

    def step(i: Any, carry: Any) -> Any:
      total, now = carry
      later = scales(jnp.minimum(i + 1, steps - 1))
      for d in range(per_step):
        sums = add_dots(first + i * tiles.y + d * dot_y, zeros).astype(jnp.float32)
        s = [v.astype(jnp.float32)[:, None] for v in now[d * halves : (d + 1) * halves]]
        s = s[0] if halves == 1 else jnp.where((jnp.arange(columns) & 1)[None, :] == 0, *s)
        total = _fma(sums, jnp.broadcast_to(s, sums.shape), total, interpret)
      return total, later

    total, _ = lax.fori_loop(0, steps, step, (jnp.zeros(zeros.shape, jnp.float32), scales(0)))
    return total.reshape(tiles.n, tiles.m, halves).sum(-1) if halves > 1 else total

  unit = jnp.float32(1 / float(unpacked_unit(dtype)))
  ms = pl.program_id(2) * tiles.m + jnp.arange(tiles.m)
  mask = ms < m if m % tiles.m else None
  if has_row_scales:
    unit = (_load(row_scales_ref, (ms,), mask) * unit)[None, :]
  out = (ungrouped if group_y is None else grouped)() * unit
  plgpu.store(
    o_ref.at[pl.program_id(1), ms[:, None], rows[None, :]],
    out.T,
    mask=None if mask is None else mask[:, None],
  )


def _both(a: Array | None, b: Array) -> Array:
  return b if a is None else a & b


def _load(ref: Any, index: Any, mask: Array | None, **hints: Any) -> Array:
  return plgpu.load(ref.at[index], mask=mask, other=None if mask is None else 0, **hints)


def _halves(group_y: int | None) -> int:
  """Columns for a row of x: of two, each sees every other group."""
  return 2 if group_y == 16 else 1


def _shift(a: Array, size: int) -> Array:
  """a // size for a power of two: Triton sees how long the quotient stays the same."""
  return a >> size.bit_length() - 1


def _fma(a: Array, b: Array, c: Array, interpret: bool) -> Array:
  """a * b + c, which Triton would leave as two instructions."""
  if interpret:
    return a * b + c
  return plgpu.elementwise_inline_asm(
    "fma.rn.f32 $0, $1, $2, $3;",
    args=[a, b, c],
    constraints="=f,f,f,f",
    pack=1,
    result_shape_dtypes=[jax.ShapeDtypeStruct(a.shape, a.dtype)],
  )[0]
