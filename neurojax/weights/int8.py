"""A weight as int8 codes and float32 channel scales, which XLA:CPU multiplies at memory speed."""

import functools
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Float32, Int, Int32

from neurojax.weights.contraction import Contraction, contract_rows
from neurojax.weights.matrix import RowMatrix

# Weight rows that one loop multiplies by a row of activations, and sums that it can hold: 4 * 4
# fit the vector registers.
_LANES = 4
_SUMS = 16
# Weight rows that a float32 dot takes at once.
_BLOCK_ROWS = 4096
# From 17 rows on, a float32 dot on dequantised weights is the faster one: see bench.py.
MAX_INTEGER_ROWS = 16
_CODE_MAX = 127
# Between 2**23 and 2**24 the integers are all the float32 there are, so an integer q of up to
# 2**22 stands in the lowest bits of the float32 _OFFSET + q.
_OFFSET = np.float32(1.5 * 2**23)
_OFFSET_BITS = _OFFSET.view(np.int32)
_LEVELS_MAX = 2.0**22 - 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Array(RowMatrix):
  """A weight matrix: int8, symmetric, one scale per output channel. A pytree of three arrays.

  The weight has K contracted elements (its leading axes; for a tied head its trailing ones) and
  N output channels (the other axes). Channel n is stored as row `n % R` of lane `n // R`, with
  `R = ceil(N / 4)`; channels from N on are zeros.

  Further leading axes on every array (layers) are allowed: `jax.tree.map` with `jnp.stack` adds
  one, `lax.scan` or an index takes it off. Only then can `contract` and `take` be called.

  Attributes:
    codes: int8 [..., 4, R, K], in [-127, 127].
    scales: float32 [..., 4, R], the channel's absmax / 127.
    levels: float32 [...], the largest integer that an activation may become, so that no
      channel's sum of products leaves int32.
    weight_shape: the weight's own shape, without further leading axes.
    contracted_axes: c > 0 when the first c axes are contracted, c < 0 when the last -c are.
  """

  # Any, because tree maps put shapes, shardings and None in an array's place.
  codes: Any
  scales: Any
  levels: Any
  weight_shape: tuple[int, ...] = field(metadata={"static": True})
  contracted_axes: int = field(metadata={"static": True})
  reads_in_place: ClassVar[bool] = True

  def __post_init__(self) -> None:
    object.__setattr__(self, "weight_shape", tuple(self.weight_shape))

  @classmethod
  def quantize(cls, w: Float32[np.ndarray | Array, "..."], contracted_axes: int) -> "Int8Array":
    """Rounds a weight to int8, on the host.

    Absmax rounding, as LLM.int8() does per channel (arXiv:2208.07339, section 2.1):
    `scale = absmax / 127`, so an element is off by at most `scale / 2`.

    Args:
      w: float32, finite, of the weight's own shape.
      contracted_axes: c > 0: `contract` sums over the first c axes, c < 0: over the last -c.
    Raises: ValueError: no axis would be contracted or none would stay, or w is not finite.
    """
    w = np.asarray(w)
    c = Contraction(w.shape, contracted_axes)
    n, k = c.n, c.k
    w_NxK = w.reshape(k, n).T if contracted_axes > 0 else w.reshape(n, k)
    absmax_N = np.maximum(w_NxK.max(1), -w_NxK.min(1))
    if not np.isfinite(absmax_N).all():
      raise ValueError(f"weight of shape {w.shape} has an element that is not finite")
    inverse_N = np.divide(_CODE_MAX, absmax_N, out=np.zeros_like(absmax_N), where=absmax_N > 0)
    # An absmax below 2**-121 or so has no finite float32 inverse: such a channel is zero.
    inverse_N = np.where(np.isfinite(inverse_N), inverse_N, np.float32(0))
    r = -(-n // _LANES)
    codes = np.zeros((_LANES * r, k), np.int8)
    codes[:n] = np.rint(w_NxK * inverse_N[:, None])
    scales = np.zeros(_LANES * r, np.float32)
    scales[:n] = np.where(inverse_N > 0, absmax_N / np.float32(_CODE_MAX), 0)
    largest_sum = max(1, int(np.abs(codes).sum(1, dtype=np.int64).max()))
    # The margin of 2**-16 covers the float32 rounding of x * levels / absmax.
    levels = math.floor(min(_LEVELS_MAX, 2.0**31 * (1 - 2.0**-16) / largest_sum - 1))
    if levels < 1:
      raise ValueError(
        f"{k} contracted elements: their int8 products cannot be summed in int32;"
        " cut the weight along its contracted axes"
      )
    return cls(
      codes=jnp.asarray(codes.reshape(_LANES, r, k)),
      scales=jnp.asarray(scales.reshape(_LANES, r)),
      levels=jnp.float32(levels),
      weight_shape=w.shape,
      contracted_axes=contracted_axes,
    )

  @property
  def leading(self) -> tuple[int, ...]:
    return self.codes.shape[:-3]

  def dequantize(self) -> Float32[Array, "..."]:
    """The weight that `contract` multiplies by, float32 in the shape `shape`."""
    lead, k = self.codes.shape[:-3], self.codes.shape[-1]
    n = self.contraction.n
    w_NxK = (self.codes.astype(jnp.float32) * self.scales[..., None]).reshape(*lead, -1, k)
    w_NxK = w_NxK[..., :n, :]
    return (w_NxK if self.contracted_axes < 0 else jnp.swapaxes(w_NxK, -1, -2)).reshape(self.shape)

  def contract(self, spec: str, x: Float[Array | np.ndarray, "..."]) -> Float[Array, "..."]:
    """Computes `contract_all` with a single weight."""
    return self.contract_all(x, (spec, self))[0]

  @staticmethod
  def contract_all(
    x: Float[Array | np.ndarray, "..."], *products: tuple[str, "Int8Array"]
  ) -> list[Float[Array, "..."]]:
    """Computes `jnp.einsum(spec, x, w.dequantize())` for each (spec, w); no weight has a batch axis.

    Up to MAX_INTEGER_ROWS rows (products of x's batch axes), each row of x is rounded to
    integers in [-levels, levels] by its own absmax, levels being the least of any w, and products
    are summed exactly in int32: a row's result does not depend on how many other rows there are
    or what they hold. The error is at most `absmax(x) / levels / 2 * sum_k |w|`, and some float32
    roundings. More rows are multiplied in float32 by the dequantised weights.

    A row that holds a NaN or an infinity becomes NaN in the integer path.

    Args:
      x: float32 or bfloat16.
      products: specs are as in `weights.contraction.contract_rows`.
    Returns: x's dtype, computed in float32, in the order of `products`.
    Raises: ValueError: a spec is of another form, or does not fit the shapes.
    """
    weights = [w for _, w in products]
    for w in weights:
      w.check_single()
    x = jnp.asarray(x)
    ys = contract_rows(
      x, [(spec, w.contraction) for spec, w in products], lambda x_TxK: _products(weights, x_TxK)
    )
    return [y.astype(x.dtype) for y in ys]

  def _rows_at(self, ids: Int[Array, "*shape"]) -> Float32[Array, "*shape D"]:
    codes = self.codes.reshape(-1, self.codes.shape[-1])[ids].astype(jnp.float32)
    return codes * self.scales.reshape(-1)[ids][..., None]


def _products(weights: list[Int8Array], x_TxK: Float[Array, "T K"]) -> list[Array]:
  x_TxK = x_TxK.astype(jnp.float32)
  if x_TxK.shape[0] <= MAX_INTEGER_ROWS:
    results = _integer(weights, x_TxK)
  else:
    results = [_dequantised(w, x_TxK) for w in weights]
  return [y_TxN[:, : w.contraction.n] for y_TxN, w in zip(results, weights, strict=True)]


def _integer(weights: list[Int8Array], x_TxK: Float32[Array, "T K"]) -> list[Array]:
  """Multiplies x by each weight, float32 [T, N]; x is rounded once for all of them."""
  levels = functools.reduce(jnp.minimum, [w.levels for w in weights])
  absmax_Tx1 = jnp.max(jnp.abs(x_TxK), axis=1, keepdims=True)
  # Divided before the broadcast: XLA would do so for some T only, and round otherwise.
  steps_Tx1 = absmax_Tx1 * jnp.broadcast_to(1 / levels, absmax_Tx1.shape)
  inverse_Tx1 = jnp.where(steps_Tx1 > 0, 1 / steps_Tx1, 0.0)
  # XLA:CPU fuses this into the product, where it is repeated for every four weight rows: hence
  # the bits, as a conversion to int32 saturates and that costs more than the product. The rounding
  # stands on its own lest multiplication and addition become one, with other bits, in some fusion.
  q_TxK = lax.bitcast_convert_type(jnp.round(x_TxK * inverse_Tx1) + _OFFSET, jnp.int32)
  q_TxK = q_TxK - _OFFSET_BITS
  sums = _integer_sums([w.codes for w in weights], q_TxK)
  # Infinity times a sum of zero is NaN already, times another one it is not.
  steps_Tx1 = jnp.where(jnp.isfinite(absmax_Tx1), steps_Tx1, jnp.nan)
  return [
    y_TxN.astype(jnp.float32) * (steps_Tx1 * w.scales.reshape(1, -1))
    for y_TxN, w in zip(sums, weights, strict=True)
  ]


def _integer_sums(codes: list[Array], q_TxK: Int32[Array, "T K"]) -> list[Array]:
  """Multiplies q by each matrix [4, R, K] of codes, int32 [T, 4 * R]."""
  count = q_TxK.shape[0]
  # A single row passes all matrices of one height in one loop: threads start and meet but once.
  loops: dict[int, list[int]] = {}
  for i, c in enumerate(codes):
    loops.setdefault(c.shape[1] if count == 1 else i, []).append(i)
  results = list(codes)
  for members in loops.values():
    lanes = [codes[i][lane].astype(jnp.int32) for i in members for lane in range(_LANES)]
    at_once = max(1, _SUMS // len(lanes))
    sums: list[Array] = []
    for start in range(0, count, at_once):
      rows = range(start, min(start + at_once, count))
      # A reduction of several operands is the form that XLA:CPU neither cuts into windows of 32
      # (which writes every product to memory) nor hands to a library: LLVM vectorises it whole.
      sums += _sum_minor([lane * q_TxK[row][None, :] for row in rows for lane in lanes])
    for first, i in enumerate(members):
      own = [sums[at : at + _LANES] for at in range(_LANES * first, len(sums), len(lanes))]
      results[i] = jnp.concatenate([part for row in own for part in row]).reshape(count, -1)
  return results


def _sum_minor(products: list[Array]) -> list[Array]:
  zeros = (jnp.int32(0),) * len(products)

  def add(a, b):
    return tuple(u + v for u, v in zip(a, b, strict=True))

  return list(lax.reduce(tuple(products), zeros, add, (1,)))


def _dequantised(w: Int8Array, x_TxK: Float32[Array, "T K"]) -> Float32[Array, "T N"]:
  # A block at a time: a whole float32 table would leave the caches and come back.
  _, r, k = w.codes.shape
  blocks = _LANES
  while _LANES * r // blocks > _BLOCK_ROWS and _LANES * r % (2 * blocks) == 0:
    blocks *= 2

  def product(block: tuple[Array, Array]) -> Array:
    codes_RxK, scales_R = block
    w_RxK = codes_RxK.astype(jnp.float32) * scales_R[:, None]
    return lax.dot_general(x_TxK, w_RxK, (((1,), (1,)), ((), ())))

  y_BxTxR = lax.map(product, (w.codes.reshape(blocks, -1, k), w.scales.reshape(blocks, -1)))
  return jnp.swapaxes(y_BxTxR, 0, 1).reshape(x_TxK.shape[0], -1)
