"""Multiplies by ternary weights on Hopper: warpgroup matrix instructions, weights unpacked in registers.

Output channels are the rows of the hardware's tile and tokens its columns ("swap AB"), so that few
tokens waste nothing and the two-bit codes, unpacked in registers, are the operand that may come
from registers. Activations and codes arrive in shared memory through a multistage pipeline that one
warpgroup feeds. Needs jax 0.11.2 or newer and compute capability 9.0.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int8

from neurojax.kernels import gpus
from neurojax.kernels.gemm.levels import Levels
from neurojax.kernels.gemm.reference import quantize_rows
from neurojax.weights.ternary import BLOCK, TernaryArray


@dataclass(frozen=True)
class Tiling:
  """How one product is cut up.

  Attributes:
    n: Output channels of a block, 64 per warpgroup and row of fragments.
    m: Tokens of a block, a multiple of 8, at most 256.
    k: Contracted elements of a pipeline step: 128, 256 or 512.
    warpgroups: Warpgroups that multiply.
    stages: Pipeline steps in flight.
    split: Blocks that share a contraction; their partial sums are added afterwards.
    copier: Whether one more warpgroup copies and leaves its registers to the others; without it a
      multiprocessor has room for several blocks.
  """

  n: int
  m: int
  k: int
  warpgroups: int
  stages: int
  split: int = 1
  copier: bool = True


def permute(x: Array, itemsize: int) -> Array:
  """Put columns of x in the order in which unpacking finds the weights, within each block of 64.

  A thread of column c (of 4) holds the bytes 4c .. 4c+3 of a block's 16 as one word. Field j of byte
  b is element k = 16c + 4b + j. It becomes column 16j + 8(b & 1) + 2c + (b >> 1) of a bfloat16
  operand (two bytes of a word, 16 bits apart, per register) and column 16j + 4c + b of an int8
  operand (four bytes per register).
  """
  blocks = (*x.shape[:-1], x.shape[-1] // BLOCK)
  lead = tuple(range(len(blocks)))
  if itemsize == 1:
    cols = x.reshape(*blocks, 16, 4)
    order = (1, 0)
  else:
    cols = x.reshape(*blocks, 4, 2, 2, 4)  # c, b >> 1, b & 1, j
    order = (3, 2, 0, 1)
  return cols.transpose(*lead, *(len(lead) + axis for axis in order)).reshape(x.shape)


def why_not(m: int, n: int, k: int, w: TernaryArray) -> str | None:
  """Why `matmul` cannot multiply [m, k] by w into [m, n], or None if it can."""
  bytes_k = 4 * w.codes.shape[-1]
  if n % 128:
    return f"n = {n} output channels: not a multiple of 128"
  if bytes_k != k or k % 256:
    return f"k = {k} contracted elements: not a multiple of 256"
  if w.group_size is not None and (512 % w.group_size or k % w.group_size):
    return f"group_size = {w.group_size}: not a divisor of 512 and of k = {k}"
  if m < 1:
    return f"m = {m} rows: none"
  return None


def tiling_for(m: int, n: int, k: int, w: TernaryArray) -> Tiling:
  """Cut a product of a shape: an estimate, until a table for the device says more."""
  if m <= 64:
    return Tiling(128, 8 * math.ceil(m / 8), 256 if m > 32 or k % 512 else 512, 2, 4)
  # More steps of int8 with a fold after every 64 would not fit the registers.
  return Tiling(128, 128, 256 if w.mode == "w2a8" and w.group_size != BLOCK else 128, 2, 5)


def matmul(
  x: Float[Array, "M K"] | Int8[Array, "M K"] | Levels,
  w: TernaryArray,
  layer: Int[Array, ""] | None = None,
  *,
  row_scales: Float32[Array, " M"] | None = None,
  dtype: jnp.dtype = jnp.float32,
  cut: Tiling | Mapping[str, Any] | None = None,
  parts: bool = False,
) -> Float[Array, "..."]:
  """Multiply x by the weight; sums within a scale group are float32 ("w2a16") or exact ("w2a8").

  Args:
    x: Rows. Floats are rounded as the weight's mode says, to bfloat16 or by `quantize_rows`. int8 is
      rounded already, and needs `row_scales`. Levels are in order "blocks" and have their own scales.
    w: One weight, or a stack of them with one leading axis.
    layer: Index into the stack; the codes are not copied.
    row_scales: The number that one unit of each row of an int8 x stands for.
    dtype: Dtype of the result, float32 or bfloat16.
    cut: How to cut the product, a `Tiling` or its fields; None: `tiling_for` the shape.
    parts: Leave the sums of the blocks that share a contraction apart, for the reader to add in order.
  Returns: [M, N]; float32 [split, M, N] if `parts`.
  Raises:
    ValueError: the stack and the layer, or x and its scales, do not go together.
    NotImplementedError: `why_not` has the reason.
  """
  if (layer is None) != (w.codes.ndim == 2):
    raise ValueError(f"codes {w.codes.shape}: a stack needs a layer, one weight none")
  is_arranged = isinstance(x, Levels)
  if not is_arranged and (x.dtype == jnp.int8) != (row_scales is not None):
    raise ValueError(f"x is {x.dtype}: row_scales go with int8, and only with it")
  if reason := gpus.why_not_jax():
    raise NotImplementedError(reason)
  from neurojax.kernels.gemm import mosaic_kernel

  m, k = (x.rows, x.values.shape[1]) if is_arranged else x.shape
  n = w.codes.shape[-2]
  if reason := why_not(m, n, k, w):
    raise NotImplementedError(reason)
  if isinstance(cut, Mapping):
    cut = Tiling(**cut)
  cut = cut or tiling_for(m, n, k, w)
  values, row_scales = _blocks(x) if is_arranged else _arranged(x, row_scales, w)
  rows = [] if row_scales is None else [jnp.pad(row_scales, (0, -row_scales.shape[0] % cut.m))]
  codes, scales = w.codes, w.scales
  if layer is None:
    codes, scales, at = codes[None], scales[None], []
  else:
    at = [jnp.reshape(layer, (1,)).astype(jnp.int32)]
  kernel = mosaic_kernel.launch(m, w.group_size, cut, dtype)
  y = kernel(values, codes, scales, at, rows)
  if cut.split == 1:
    return y[None] if parts else y
  return y if parts else jnp.sum(y, axis=0).astype(dtype)


def _blocks(x: Levels) -> tuple[Array, Array]:
  if x.order != "blocks":
    raise ValueError(f"levels in order {x.order!r}: Mosaic reads 'blocks'")
  return x.values, x.steps


def _arranged(x: Array, row_scales: Array | None, w: TernaryArray) -> tuple[Array, Array | None]:
  """Round rows if they are not, and put them in the order of `permute`, in whole tiles of 8 rows."""
  if x.dtype != jnp.int8:
    x, row_scales = quantize_rows(x) if w.mode == "w2a8" else (x.astype(jnp.bfloat16), None)
  # The copy engine fills in what is missing of a block, not of a tile.
  padding = -x.shape[0] % 8
  values = jnp.pad(permute(x, x.dtype.itemsize), ((0, padding), (0, 0)))
  return values, None if row_scales is None else jnp.pad(row_scales, (0, padding))
