"""Rounds numbers to the nearest ternary ones, a scale group at a time."""

import numpy as np
from jaxtyping import Float16, Float32, UInt8

from neurojax.weights.codecs import gather

# Numbers that are sorted at a time.
_CHUNK_ELEMENTS = 1 << 20


def nearest(
  w_NxK: Float32[np.ndarray, "N K"], group_size: int
) -> tuple[UInt8[np.ndarray, "N Y"], Float16[np.ndarray, "N Q"]]:
  """Find the codes and float16 scales, in the layout of `weights.ternary`, with the least squared error in
  every group before its scale is rounded.

  For a threshold that keeps the k largest of a group, whose magnitudes sum to c, the best scale is
  c / k and takes c**2 / k off the error: k is where that is largest. Numbers that are ternary already,
  with scales that float16 has, come out as they are.

  Raises: ValueError: rows are no whole groups, or a scale would be beyond float16.
  Source: Ternary Weight Networks, arXiv:1605.04711, equations 3 to 5, solved exactly.
  """
  n, k = w_NxK.shape
  if k % group_size or group_size % 4:
    raise ValueError(f"rows of {k} elements are no whole groups of {group_size}")
  codes = np.empty((n, k // 4), np.uint8)
  scales = np.empty((n, k // group_size), np.float16)
  step = max(1, _CHUNK_ELEMENTS // k)
  counts = np.arange(1, group_size + 1, dtype=np.float64)
  for first in range(0, n, step):
    w = w_NxK[first : first + step].reshape(-1, k // group_size, group_size)
    largest = -np.sort(-np.abs(w), axis=-1)
    sums = np.cumsum(largest, axis=-1, dtype=np.float64)
    best = np.argmax(sums * sums / counts, axis=-1)[..., None]
    means = np.take_along_axis(sums, best, -1)[..., 0] / (best[..., 0] + 1)
    # A mean of equal numbers is that number, which rounding may miss.
    least, most = np.take_along_axis(largest, best, -1)[..., 0], largest[..., 0]
    with np.errstate(over="ignore"):
      s = np.where(least == most, most, means).astype(np.float16)
    if not np.isfinite(s).all():
      raise ValueError("a scale is beyond float16")
    scales[first : first + step] = s
    kept = np.abs(w) > (s.astype(np.float32) / 2)[..., None]
    fields = (1 + np.sign(w) * kept).astype(np.uint8).reshape(len(w), k)
    codes[first : first + step] = gather(fields)
  return codes, scales
