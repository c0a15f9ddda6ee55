"""A ternary weight as two-bit codes and scales, in the one packing that every kernel here reads."""

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from neurojax.weights.matrix import RowMatrix

BLOCK = 64
"""Contracted elements are padded with zeros to a multiple of this: 16 bytes of codes."""

SCALE_DTYPES = ("float16", "bfloat16", "float32")

Mode = Literal["w2a16", "w2a8"]
"""The treatment of activations in a product with two-bit weights.

"w2a16": as they are (bfloat16 on a GPU), products exact, sums in float32.
"w2a8": rounded to int8 with one scale per row (token), products and sums of a scale group exact.
"""


LEVEL_MAX = 127
"""The largest level of an activation that "w2a8" rounds: a row's absmax becomes it."""

SMALLEST_ABSMAX = 2.0**-100
"""A row whose elements are all smaller in magnitude counts as zeros: 127 / absmax stays finite."""

CODE_BYTES = np.array([sum(v // 3**j % 3 << 2 * j for j in range(4)) for v in range(81)], np.uint8)
"""All bytes that hold four codes, none of them 3."""


def row_bytes(k: int) -> int:
  """Number of bytes of codes in a row of k contracted elements, padding included."""
  return -(-k // BLOCK) * BLOCK // 4


def check_group_size(group_size: int | None) -> None:
  """Raises: ValueError: the size is neither None nor a positive integer multiple of `BLOCK`."""
  if group_size is None:
    return
  is_integer = isinstance(group_size, int | np.integer) and not isinstance(group_size, bool)
  if not is_integer or group_size < 1 or group_size % BLOCK:
    raise ValueError(f"group_size = {group_size!r}: a positive multiple of {BLOCK}, or None")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TernaryArray(RowMatrix):
  """A weight matrix with elements -s, 0 and s as two-bit codes and scales. A pytree of two arrays.

  The weight has K contracted elements (its leading axes; for a tied head its trailing ones) and
  N output channels (the other axes). With Y = 16 * ceil(K / 64), byte y of row n holds elements
  k = 4y .. 4y+3 of channel n, the first in its lowest bits:

    w[n, 4y + j] = ((codes[n, y] >> 2j & 3) - 1) * scales[n, (4y + j) // group_size]

  Codes are 0, 1 and 2; elements past K are zeros (code 1). This is the order of the 2-bit blocks
  of GGUF's Q2_0, without the scales between them.

  Further leading axes on both arrays (layers) are allowed: `jax.tree.map` with `jnp.stack` adds
  one, `lax.scan` or an index takes it off. `kernels.gemm` multiplies by a single matrix only.

  Attributes:
    codes: uint8 [..., N, Y].
    scales: float16, bfloat16 or float32, as the source gave them: [..., N, ceil(K / group_size)],
      or [..., 1, 1] if group_size is None.
    weight_shape: The weight's own shape, without further leading axes.
    contracted_axes: c > 0 when the first c axes are contracted, c < 0 when the last -c are.
    group_size: Contracted elements that share a scale, a multiple of 64; None: one for the tensor.
    mode: The treatment of activations, see `Mode`.

  Example:
    >>> import numpy as np, neurojax as nj
    >>> w = nj.quantize(np.ones((256, 8), np.float32))
    >>> w.weight_shape, w.codes.shape, w.scales.shape
    ((256, 8), (8, 64), (8, 2))
  """

  # Any, because tree maps put shapes, shardings and None in an array's place.
  codes: Any
  scales: Any
  weight_shape: tuple[int, ...] = field(metadata={"static": True})
  contracted_axes: int = field(metadata={"static": True})
  group_size: int | None = field(metadata={"static": True})
  mode: Mode = field(default="w2a16", metadata={"static": True})

  def __post_init__(self) -> None:
    object.__setattr__(self, "weight_shape", tuple(self.weight_shape))
    check_group_size(self.group_size)

  @classmethod
  def from_rows(
    cls,
    codes: np.ndarray | Array,
    scales: np.ndarray | Array,
    weight_shape: tuple[int, ...],
    contracted_axes: int,
    *,
    group_size: int | None,
    mode: Mode = "w2a16",
  ) -> "TernaryArray":
    """Makes one weight, without further leading axes, from arrays of the shapes and dtypes above.

    Raises: ValueError: a shape or dtype does not fit. Codes (0, 1 or 2) and padding (1) are not
      checked: `quantize` and `codecs` pack nothing else.
    """
    w = cls(codes, scales, weight_shape, contracted_axes, group_size, mode)
    n, k = w.contraction.n, w.contraction.k
    wanted = (n, row_bytes(k))
    if codes.shape != wanted or codes.dtype != np.uint8:
      raise ValueError(
        f"codes are {codes.dtype} {codes.shape}: a weight {w.weight_shape} of {n} channels and {k}"
        f" contracted elements has uint8 {wanted}"
      )
    wanted = (1, 1) if group_size is None else (n, -(-k // group_size))
    if scales.shape != wanted or scales.dtype.name not in SCALE_DTYPES:
      raise ValueError(
        f"scales are {scales.dtype} {scales.shape}: {n} channels of {k} elements with"
        f" group_size={group_size} have {wanted}, in {', '.join(SCALE_DTYPES)}"
      )
    return w

  @property
  def leading(self) -> tuple[int, ...]:
    return self.codes.shape[:-2]

  def layer(self, index: Int[Array, ""]) -> "TernaryLayer":
    """The `index`-th of stacked matrices, left where it is."""
    return TernaryLayer(self, index)

  def dequantize(self) -> Float32[Array, "..."]:
    """The weight that products multiply by, float32 in the shape `shape`."""
    c = self.contraction
    w_NxK = self._rows(self.codes, self.scales)[..., : c.k]
    w_NxK = w_NxK if self.contracted_axes < 0 else jnp.swapaxes(w_NxK, -1, -2)
    return w_NxK.reshape(self.shape)

  def _rows_at(self, ids: Int[Array, "*shape"]) -> Float32[Array, "*shape D"]:
    scales = self.scales[0] if self.group_size is None else self.scales[ids]
    scales = jnp.broadcast_to(scales, (*ids.shape, scales.shape[-1]))
    return self._rows(self.codes[ids], scales)[..., : self.weight_shape[1]]

  def _rows(self, codes: Array, scales: Array) -> Float32[Array, "... K"]:
    """Dequantises rows, with their padding."""
    shifts = jnp.arange(0, 8, 2, dtype=jnp.uint8).reshape((1,) * codes.ndim + (4,))
    fields = codes[..., None] >> shifts & 3
    w = (fields.astype(jnp.int8) - 1).astype(jnp.float32).reshape(*codes.shape[:-1], -1)
    s = scales.astype(jnp.float32)
    if self.group_size is not None:
      s = jnp.repeat(s, self.group_size, axis=-1)[..., : w.shape[-1]]
    return w * s


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TernaryLayer:
  """One of stacked ternary matrices, which kernels multiply by without a copy.

  XLA may slice a stack for free in what it fuses. But a kernel gets whole arrays, and inside a loop over
  layers a slice of them is a copy: kernels get the stack and the index.

  Attributes:
    stacked: A TernaryArray with one further leading axis.
    index: int32 [], not negative; beyond the stack's last layer it is clamped.
  """

  # Any, because tree maps put shapes, shardings and None in an array's place.
  stacked: Any
  index: Any
