"""Multiplies activations by ternary weights in Pallas' Triton, on NVIDIA cards of sm_80 and newer.

There are three kernels, by the number of rows. Up to 4 int8 rows: `triton_dp4a`, without tensor
cores. More: `triton_dot`, whose tensor cores read weights that were unpacked in registers. From
PREFILL_ROWS on: `triton_dequantize` writes the weights out, and cuBLAS multiplies by them.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Float

from neurojax.kernels import gpus
from neurojax.kernels.gemm import triton_dequantize, triton_dot, triton_dp4a
from neurojax.kernels.gemm.levels import Levels
from neurojax.kernels.gemm.triton_planes import Planes, prepare
from neurojax.weights.ternary import TernaryArray

PREFILL_ROWS = 256
"""From this many rows on, writing the weight out and a dense product take less time."""


def why_not(m: int, n: int, k: int, w: TernaryArray) -> str | None:
  """Why x [m, k] cannot be multiplied by w here, or None if it can."""
  if w.group_size not in (None, 64, 128, 256):
    return f"group_size = {w.group_size}: the kernels know 64, 128, 256 and None"
  if w.codes.ndim not in (2, 3):
    return f"codes have {w.codes.ndim} axes: index all but one of those in front"
  if m < 1 or n < 1 or k < 1:
    return f"nothing to multiply in m = {m}, n = {n}, k = {k}"
  return None


def matmul(
  x: Float[Array, "M K"] | Planes | Levels,
  w: TernaryArray,
  *,
  layer: Array | None = None,
  tiles: Any = None,
  parts: bool = False,
  interpret: bool = False,
) -> Float[Array, "..."]:
  """Multiply rows by a weight in the weight's mode; float32 results.

  Args:
    x: Rows, or rows that `prepare` has split already, or levels in order "planes".
    w: One weight, or stacked ones with a leading layer axis.
    layer: int32 scalar: which of the stack, read in place. None for one weight.
    tiles: How to cut the work: `Tiles` of dp4a or dot, or the fields of a dot's; None: `tiles_for` the
      shape.
    parts: Leave the sums of the programs that share a channel apart, for the reader to add in order.
    interpret: Run on any backend, slowly.
  Returns: [M, N]; [split, M, N] if `parts`.
  Raises: ValueError: `why_not` has a reason, or the stack and the layer do not go together.
  """
  if isinstance(x, Levels):
    if x.order != "planes":
      raise ValueError(f"levels in order {x.order!r}: Triton reads 'planes'")
    x = Planes(x.values, x.steps)
  if isinstance(tiles, Mapping):
    tiles = triton_dot.Tiles(**tiles)
  if not isinstance(x, Planes) and tiles is None and x.shape[0] >= PREFILL_ROWS:
    if reason := why_not(x.shape[0], w.codes.shape[-2], x.shape[1], w):
      raise ValueError(reason)
    return prefill(x, w, layer=layer, interpret=interpret)
  return _product(x, w, layer, tiles, parts, interpret)


# jit, so that a program of many layers traces and lowers each form of product once.
@functools.partial(jax.jit, static_argnames=("tiles", "parts", "interpret"))
def _product(
  x: Array | Planes,
  w: TernaryArray,
  layer: Array | None,
  tiles: Any,
  parts: bool,
  interpret: bool,
) -> Array:
  if (w.codes.ndim == 3) != (layer is not None):
    raise ValueError(f"codes of shape {w.codes.shape} with layer = {layer}: give both or neither")
  *_, n, y = w.codes.shape
  if not isinstance(x, Planes):
    k = x.shape[1]
    if reason := why_not(x.shape[0], n, k, w):
      raise ValueError(reason)
    x = prepare(x, y, w.mode)
  m = x.values.shape[1]
  tiles = tiles or tiles_for(m, n, y, w.mode, w.group_size)
  codes, scales = (w.codes, w.scales) if layer is not None else (w.codes[None], w.scales[None])
  if isinstance(tiles, triton_dp4a.Tiles):
    y = triton_dp4a.dp4a(x, codes, scales, w.group_size, layer, tiles, interpret)
    return y[None] if parts else y
  y = triton_dot.dot(x, codes, scales, w.group_size, layer, tiles, interpret)
  if parts:
    return y
  return y[0] if tiles.split == 1 else y.sum(0)


def tiles_for(
  m: int, n: int, y: int, mode: str, group_size: int | None, *, whole: bool = False
) -> Any:
  """Cut a product of m rows, n channels and y bytes of codes a channel: `Tiles` of dp4a or dot.

  Estimates from counts of instructions, checked by a few timings on an H200.

  Args:
    whole: One program adds up all of a channel, group after group, for any m. A row's bits then do
      not follow m, and in "w2a8" with groups of 128 and more they are Mosaic's.
  """
  if whole:
    return _whole_tiles(m, n)
  if mode == "w2a8" and m <= triton_dp4a.MAX_ROWS:
    warps = 2 if y >= 1024 else 1
    rows = 8 if n >= 16384 and m == 1 else 4
    return triton_dp4a.Tiles(n=rows, y=512 * warps, warps=warps)
  if m <= 8:
    tiles_n, tiles_m, warps = 32, 8, 2
  else:
    tiles_m = min(64, max(16, 1 << (m - 1).bit_length()))
    tiles_n, warps = 128 if tiles_m == 64 else 64, 4
  if group_size == 64 and m > 8:
    # Every row is two columns here: larger tiles do not fit the shared memory.
    tiles_n, tiles_m = 64, min(tiles_m, 32)
  split = 1
  while split < 8 and -(-n // tiles_n) * split < 2 * gpus.MULTIPROCESSORS:
    split *= 2
  width = 64 if (tiles_m == 64 and mode == "w2a16") or (group_size == 64 and m > 8) else 128
  return triton_dot.Tiles(n=tiles_n, m=tiles_m, y=width, split=split, warps=warps)


def _whole_tiles(m: int, n: int) -> triton_dot.Tiles:
  """Cut by channels and rows alone: narrow where a matrix has few channels, or few would multiply."""
  if m <= 16:
    return triton_dot.Tiles(n=32, m=8 if m <= 8 else 16, y=128 if m <= 8 else 64, warps=2)
  tiles_n = 64 if -(-n // 64) >= gpus.MULTIPROCESSORS else 32
  return triton_dot.Tiles(n=tiles_n, m=32 if m <= 32 else 64, y=128, warps=4)


def prefill(
  x: Float[Array, "M K"], w: TernaryArray, *, layer: Array | None = None, interpret: bool = False
) -> Float[Array, "M N"]:
  """Multiply many rows by a weight that is written out first, see `triton_dequantize.prefill`."""
  return triton_dequantize.prefill(x, w, layer=layer, interpret=interpret)


__all__ = ["Planes", "matmul", "prefill", "prepare", "tiles_for", "why_not"]
