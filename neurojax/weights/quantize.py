"""Packs float weights as ternary ones, on the host: by rounding, or exactly where they are ternary."""

from collections.abc import Iterator
from typing import get_args

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Float64, Int8, UInt8

from neurojax.weights.codecs import gather, spread
from neurojax.weights.contraction import Contraction
from neurojax.weights.ternary import (
  SCALE_DTYPES,
  Mode,
  TernaryArray,
  check_group_size,
  row_bytes,
)

# Elements worked on at a time: temporaries stay small beside the weight.
_CHUNK_ELEMENTS = 1 << 20

# XLA takes smaller float32 numbers for zeros.
_SMALLEST_FLOAT32 = 2.0**-126

# A rounded scale keeps the 8 significant bits of a bfloat16, as it does in training: a float16 has
# them down to 2**-17, which is `aware.SMALLEST_SCALE`, then loses one with each halving.
_SMALLEST_SCALE = {"float16": 2.0**-17, "bfloat16": _SMALLEST_FLOAT32, "float32": _SMALLEST_FLOAT32}


def absmean(
  w: Float32[np.ndarray, "..."],
  contracted_axes: int,
  *,
  group_size: int | None = None,
  scale_dtype: DTypeLike = "float16",
  mode: Mode = "w2a16",
) -> TernaryArray:
  """Rounds a weight to -s, 0 and s, where s is the mean of |w| over a group, in `scale_dtype`.

  An element becomes the nearest of the three (0 where two are), one beyond s becomes s. A group
  of zeros stays zeros.

  Args:
    w: float32, finite, of the weight's own shape.
    contracted_axes: c > 0: products sum over the first c axes, c < 0: over the last -c.
    group_size: Contracted elements that share a scale, a multiple of 64; None: one for the tensor.
    scale_dtype: "float16", "bfloat16" or "float32".
  Raises: ValueError: an element is not finite; a scale is too large for `scale_dtype`, or so small
    that fewer than 8 significant bits of it would stay; the weight is empty; an argument is none of
    its choices.
  Source: BitNet b1.58, arXiv:2402.17764, equations 1 to 3.
  """
  _check(w, contracted_axes, group_size, scale_dtype, mode)
  w_NxK = _rows(w, contracted_axes)
  sums = _reduce(np.add, w_NxK, group_size)
  counts = (
    w.size if group_size is None else np.diff(_starts(w_NxK, group_size), append=len(w_NxK.T))
  )
  means = sums / counts
  scales = _cast(means, scale_dtype)
  _check_smallest(means, _SMALLEST_SCALE[scales.dtype.name], scales.dtype)
  codes = np.empty((len(w_NxK), row_bytes(w_NxK.shape[1])), np.uint8)
  for chunk, w_nxK, s_nxK in _chunks(w_NxK, scales, group_size):
    ratio = np.divide(w_nxK, s_nxK, out=np.zeros_like(w_nxK), where=s_nxK > 0)
    codes[chunk] = pack_rows(np.rint(np.clip(ratio, -1, 1)).astype(np.int8))
  return _array(codes, scales, w.shape, contracted_axes, group_size, mode)


def exact(
  w: Float32[np.ndarray, "..."],
  contracted_axes: int,
  *,
  group_size: int | None = None,
  scale_dtype: DTypeLike = "float16",
  mode: Mode = "w2a16",
) -> TernaryArray:
  """Packs a weight without rounding: each of its groups holds no other values than -s, 0 and s.

  Arguments as in `absmean`.
  Raises: ValueError: a group holds another value (the error names the row, which is the output
    channel, and the element), or `scale_dtype` has no such s (it names the row and the group).
  """
  _check(w, contracted_axes, group_size, scale_dtype, mode)
  w_NxK = _rows(w, contracted_axes)
  maxima = _reduce(np.maximum, w_NxK, group_size)
  codes = np.empty((len(w_NxK), row_bytes(w_NxK.shape[1])), np.uint8)
  for chunk, w_nxK, s_nxK in _chunks(w_NxK, maxima, group_size):
    other = (w_nxK != 0) & (np.abs(w_nxK) != s_nxK)
    if other.any():
      row, k = np.argwhere(other)[0]
      raise ValueError(
        f"not ternary: row {chunk.start + row}, element {k}: {w_nxK[row, k]} is none of -s, 0 and s"
        f" for s = {np.broadcast_to(s_nxK, other.shape)[row, k]}, the largest magnitude of its"
        " group: round the weight instead, by exact=False or by absmean"
      )
    codes[chunk] = pack_rows(np.sign(w_nxK).astype(np.int8))
  scales = _cast(maxima, scale_dtype)
  _check_smallest(maxima, _SMALLEST_FLOAT32, scales.dtype)
  changed = scales.astype(np.float64) != maxima
  if changed.any():
    place, value = _first(changed, maxima)
    raise ValueError(
      f"{place}: the scale {value} has no exact {scales.dtype}: choose scale_dtype='float32'"
    )
  return _array(codes, scales, w.shape, contracted_axes, group_size, mode)


def pack_rows(w_NxK: Int8[np.ndarray, "N K"]) -> UInt8[np.ndarray, "N Y"]:
  """Packs rows of -1, 0 and 1 as codes, padded with zeros. Values are not checked."""
  n, k = w_NxK.shape
  fields = np.ones((n, 4 * row_bytes(k)), np.uint8)
  np.add(w_NxK, 1, out=fields[:, :k].view(np.int8))
  return gather(fields)


def unpack_rows(codes: UInt8[np.ndarray, "N Y"], k: int) -> Int8[np.ndarray, "N K"]:
  """Unpacks rows of k elements to -1, 0 and 1: the inverse of `pack_rows`."""
  return spread(codes).view(np.int8)[:, :k] - np.int8(1)


def _rows(w: np.ndarray, contracted_axes: int) -> Float32[np.ndarray, "N K"]:
  c = Contraction(w.shape, contracted_axes)
  return w.reshape(c.k, c.n).T if contracted_axes > 0 else w.reshape(c.n, c.k)


def _starts(w_NxK: np.ndarray, group_size: int | None) -> np.ndarray:
  k = w_NxK.shape[1]
  return np.arange(0, k, group_size or k)


def _reduce(
  operation: np.ufunc, w_NxK: np.ndarray, group_size: int | None
) -> Float64[np.ndarray, "N Q"]:
  """Reduces |w| over each group, or over the tensor to [1, 1]."""
  starts = _starts(w_NxK, group_size)
  parts = [
    operation.reduceat(np.abs(w_nxK), starts, axis=1, dtype=np.float64)
    for _, w_nxK, _ in _chunks(w_NxK, np.zeros((1, 1)), None)
  ]
  reduced = np.concatenate(parts)
  if not np.isfinite(reduced).all():
    row, group = np.argwhere(~np.isfinite(reduced))[0]
    raise ValueError(f"row {row}, group {group} of the weight has an element that is not finite")
  return reduced if group_size else operation.reduce(reduced, axis=(0, 1), keepdims=True)


def _chunks(
  w_NxK: np.ndarray, scales: np.ndarray, group_size: int | None
) -> Iterator[tuple[slice, Float32[np.ndarray, "n K"], Float32[np.ndarray, "#n #K"]]]:
  """Yields some rows at a time, with the scale of each element."""
  n, k = w_NxK.shape
  step = max(1, _CHUNK_ELEMENTS // k)
  for first in range(0, n, step):
    chunk = slice(first, min(first + step, n))
    if group_size is None:
      s = scales.astype(np.float32)
    else:
      s = np.repeat(scales[chunk].astype(np.float32), group_size, axis=1)[:, :k]
    yield chunk, w_NxK[chunk], s


def _cast(scales: Float64[np.ndarray, "N Q"], dtype: DTypeLike) -> Float[np.ndarray, "N Q"]:
  with np.errstate(over="ignore", under="ignore"):
    cast = scales.astype(jnp.dtype(dtype))
  infinite = ~np.isfinite(cast)
  if infinite.any():
    place, value = _first(infinite, scales)
    remedy = "scale the weight down" if cast.dtype == np.float32 else "choose scale_dtype='float32'"
    raise ValueError(f"{place}: a scale of {value} is beyond {cast.dtype}: {remedy}")
  return cast


def _check_smallest(scales: Float64[np.ndarray, "N Q"], smallest: float, dtype: np.dtype) -> None:
  """Raises: ValueError: a scale is smaller than `smallest`, though not 0."""
  small = (scales > 0) & (scales < smallest)
  if small.any():
    place, value = _first(small, scales)
    remedy = "scale the weight up"
    if smallest > _SMALLEST_FLOAT32 and scales[small].min() >= _SMALLEST_FLOAT32:
      remedy = "choose scale_dtype='float32'"
    raise ValueError(
      f"{place}: a scale of {value} is too small for {dtype}, which has no precise number below"
      f" {smallest:g}: {remedy}"
    )


def _first(where: np.ndarray, scales: Float64[np.ndarray, "N Q"]) -> tuple[str, str]:
  """The place of the first marked scale in words, and the scale."""
  row, group = np.argwhere(where)[0]
  return f"row {row}, group {group}", f"{scales[row, group]:g}"


def _check(
  w: np.ndarray,
  contracted_axes: int,
  group_size: int | None,
  scale_dtype: DTypeLike,
  mode: str,
) -> None:
  """Raises: ValueError: the weight is empty, or an argument is none of its choices."""
  Contraction(w.shape, contracted_axes)
  if not w.size:
    raise ValueError(f"a weight of shape {w.shape} is empty: every axis needs at least one element")
  check_group_size(group_size)
  try:
    is_choice = jnp.dtype(scale_dtype).name in SCALE_DTYPES
  except TypeError:
    is_choice = False
  if not is_choice:
    raise ValueError(f"scale_dtype = {scale_dtype!r}: one of {', '.join(SCALE_DTYPES)}")
  if mode not in get_args(Mode):
    raise ValueError(f"mode = {mode!r}: one of {', '.join(get_args(Mode))}")


def _array(
  codes: np.ndarray,
  scales: np.ndarray,
  shape: tuple[int, ...],
  contracted_axes: int,
  group_size: int | None,
  mode: Mode,
) -> TernaryArray:
  return TernaryArray.from_rows(
    jnp.asarray(codes), jnp.asarray(scales), shape, contracted_axes,
    group_size=group_size, mode=mode,
  )  # fmt: skip
