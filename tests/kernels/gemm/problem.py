"""Random products with ternary weights, and what they are in exact or float64 arithmetic."""

import jax.numpy as jnp
import numpy as np

from neurojax.weights.ternary import Mode, TernaryArray


def weight(
  n: int,
  k: int,
  group_size: int | None,
  mode: Mode,
  *,
  dtype: str = "float16",
  seed: int = 0,
  powers: bool = False,
) -> TernaryArray:
  """[k, n], the first axis contracted. Scales are of either sign; `powers`: powers of two."""
  rng = np.random.default_rng(seed)
  width = 16 * -(-k // 64)
  codes = rng.integers(0, 3, (n, 4 * width), np.uint8)
  codes[:, k:] = 1
  packed = (codes.reshape(n, width, 4) << np.arange(0, 8, 2, dtype=np.uint8)).sum(-1)
  shape = (n, -(-k // group_size)) if group_size else (1, 1)
  scales = 2.0 ** rng.integers(-3, 3, shape) if powers else rng.uniform(0.01, 0.03, shape)
  scales = scales * rng.choice((-1, 1), shape)
  return TernaryArray(
    jnp.asarray(packed, jnp.uint8), jnp.asarray(scales, dtype), (k, n), 1, group_size, mode
  )


def rows(m: int, k: int, seed: int = 1) -> np.ndarray:
  """float32 [m, k], rows of very different sizes."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((m, k)) * 10.0 ** rng.integers(-3, 4, (m, 1))
  return x.astype(np.float32)


def trits(w: TernaryArray) -> np.ndarray:
  """int64 [n, 4y], with the padding."""
  fields = np.asarray(w.codes)[..., None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3
  return fields.astype(np.int64).reshape(w.codes.shape[0], -1) - 1


def quantized(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Levels, int64, and steps, float32, of finite rows that are not zeros; one operation a line."""
  absmax = np.abs(x).max(1, keepdims=True)
  inverse = np.float32(127) / absmax
  scaled = x * inverse
  return np.rint(scaled).astype(np.int64), (absmax * np.float32(1 / 127))[:, 0]


def group_sums(x: np.ndarray, w: TernaryArray) -> np.ndarray:
  """Exact sums [m, n, q] of x (int64, or float64) times trits over each scale group."""
  t = trits(w)
  size = w.group_size or t.shape[1]
  x = np.pad(x, ((0, 0), (0, t.shape[1] - x.shape[1])))
  starts = range(0, t.shape[1], size)
  return np.stack([x[:, i : i + size] @ t[:, i : i + size].T for i in starts], axis=2)


def float64_product(x: np.ndarray, w: TernaryArray) -> tuple[np.ndarray, np.ndarray]:
  """[m, n] of finite rows, and by how much float32 sums in any order may be off."""
  k = w.contraction.k
  scales = np.asarray(w.scales, np.float64)[None]
  dense = np.abs(np.asarray(w.dequantize(), np.float64))
  if w.mode == "w2a16":
    x = x.astype(np.float64)
    return (group_sums(x, w) * scales).sum(2), (k + 8) * 2.0**-24 * (np.abs(x) @ dense)
  levels, steps = quantized(x)
  parts = group_sums(levels, w) * scales
  count = parts.shape[2] + 4
  bound = count * 2.0**-24 * np.abs(parts).sum(2)
  return parts.sum(2) * steps[:, None].astype(np.float64), bound * steps[:, None]
