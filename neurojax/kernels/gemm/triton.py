"""x W for a `TernaryArray` on Pallas' Triton backend: NVIDIA sm_80 and newer, jax 0.11.2 and newer."""

import functools
from typing import Any

import jax
from jaxtyping import Array, Float

from neurojax.kernels.gemm import triton_dequantize, triton_dot, triton_dp4a
from neurojax.kernels.gemm.triton_planes import Planes, prepare
from neurojax.weights.ternary import TernaryArray

PREFILL_ROWS = 256
"""From this many rows on, writing the weight out and a dense product take less time."""

_MULTIPROCESSORS = 132


def supports(m: int, n: int, k: int, w: TernaryArray) -> str | None:
  """Why x [m, k] cannot be multiplied by w here, or None if it can."""
  if w.group_size not in (None, 64, 128, 256):
    return f"group_size = {w.group_size}: the kernels know 64, 128, 256 and None"
  if w.codes.ndim not in (2, 3):
    return f"codes have {w.codes.ndim} axes: index all but one of those in front"
  if m < 1 or n < 1 or k < 1:
    return f"nothing to multiply in m = {m}, n = {n}, k = {k}"
  return None


def matmul(
  x: Float[Array, "M K"] | Planes,
  w: TernaryArray,
  *,
  layer: Array | None = None,
  tiles: Any = None,
  interpret: bool = False,
) -> Float[Array, "M N"]:
  """x W in the weight's mode, float32.

  Args:
    x: Rows, or rows that `prepare` has split already.
    w: [..]; with one axis in front (layers) if `layer` is given: that slice is read in place.
    layer: int32 scalar.
    tiles: How to cut the work; None: a choice for the shape.
    interpret: Run on any backend, slowly.
  Raises: ValueError: the weight is of a form `supports` rejects.
  """
  if not isinstance(x, Planes) and tiles is None and x.shape[0] >= PREFILL_ROWS:
    if reason := supports(x.shape[0], w.codes.shape[-2], x.shape[1], w):
      raise ValueError(reason)
    return prefill(x, w, layer=layer, interpret=interpret)
  return _product(x, (w,), layer, tiles, interpret)


def matmul_swiglu(
  x: Float[Array, "M K"] | Planes,
  gate: TernaryArray,
  up: TernaryArray,
  *,
  layer: Array | None = None,
  tiles: Any = None,
  interpret: bool = False,
) -> Float[Array, "M N"]:
  """silu(x W_gate) * (x W_up), neither factor written to memory. Otherwise as `matmul`."""
  if (gate.codes.shape, gate.scales.shape, gate.group_size, gate.mode) != (
    up.codes.shape,
    up.scales.shape,
    up.group_size,
    up.mode,
  ):
    raise ValueError(
      f"gate {gate.codes.shape}, {gate.group_size}, {gate.mode} and up {up.codes.shape},"
      f" {up.group_size}, {up.mode} differ: call matmul for each"
    )
  return _product(x, (gate, up), layer, tiles, interpret)


# jit, so that a program of many layers traces and lowers each form of product once.
@functools.partial(jax.jit, static_argnames=("tiles", "interpret"))
def _product(
  x: Array | Planes,
  ws: tuple[TernaryArray, ...],
  layer: Array | None,
  tiles: Any,
  interpret: bool,
) -> Array:
  w = ws[0]
  if (w.codes.ndim == 3) != (layer is not None):
    raise ValueError(f"codes of shape {w.codes.shape} with layer = {layer}: give both or neither")
  *_, n, y = w.codes.shape
  if not isinstance(x, Planes):
    k = x.shape[1]
    if reason := supports(x.shape[0], n, k, w):
      raise ValueError(reason)
    x = prepare(x, y, w.mode)
  m = x.values.shape[1]
  tiles = tiles or choose(m, n, y, w.mode, w.group_size, len(ws))
  f = triton_dp4a.dp4a if isinstance(tiles, triton_dp4a.Tiles) else triton_dot.dot
  pairs = tuple(
    (a.codes, a.scales) if layer is not None else (a.codes[None], a.scales[None]) for a in ws
  )
  return f(x, pairs, w.group_size, layer, tiles, interpret)


def choose(m: int, n: int, y: int, mode: str, group_size: int | None, weights: int = 1) -> Any:
  """Tiles for a shape: estimates from instruction counts, and few timings on an H200."""
  if mode == "w2a8" and m <= triton_dp4a.MAX_ROWS:
    warps = 2 if y >= 1024 else 1
    rows = 8 if n * weights >= 16384 and m == 1 else 4
    return triton_dp4a.Tiles(n=rows // weights, y=512 * warps, warps=warps)
  if m <= 8:
    tiles_n, tiles_m, warps = 32, 8, 2
  else:
    tiles_m = min(64, max(16, 1 << (m - 1).bit_length()))
    tiles_n, warps = 128 if tiles_m == 64 else 64, 4
  if group_size == 64 and m > 8:
    # Every row is two columns here: larger tiles do not fit the shared memory.
    tiles_n, tiles_m = 64, min(tiles_m, 32)
  split = 1
  while weights == 1 and split < 8 and -(-n // tiles_n) * split < 2 * _MULTIPROCESSORS:
    split *= 2
  width = 64 if (tiles_m == 64 and mode == "w2a16") or (group_size == 64 and m > 8) else 128
  return triton_dot.Tiles(n=tiles_n, m=tiles_m, y=width, split=split, warps=warps)


def prefill(
  x: Float[Array, "M K"], w: TernaryArray, *, layer: Array | None = None, interpret: bool = False
) -> Float[Array, "M N"]:
  """x W by writing W out: see `triton_dequantize.prefill`."""
  return triton_dequantize.prefill(x, w, layer=layer, interpret=interpret)


__all__ = ["Planes", "choose", "matmul", "matmul_swiglu", "prefill", "prepare", "supports"]
