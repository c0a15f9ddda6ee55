"""A weight as groups of small integers with scales, which XLA multiplies in that form."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Float32, Int

from neurojax.forms import PARENT, Grouped
from neurojax.weights.contraction import Contraction, contract_rows
from neurojax.weights.matrix import RowMatrix
from neurojax.weights.rows import FLOAT8, GroupedRows

# Weights that are float32 at a time on a CPU: 4 MB, which its caches hold. Fewer cost loops.
_BLOCK_ELEMENTS = 1 << 20


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GroupedArray(RowMatrix):
  """A weight matrix as `GroupedRows` whose codes are packed into bit planes. A pytree.

  The weight has K contracted elements (its leading axes; for a tied head its trailing ones) and N output
  channels (the other axes).

  A plane of b bits is uint8 [..., N, K b / 8]: with Y = K b / 8 bytes in a row, bits b j .. b j + b - 1
  of byte y are those of element j Y + y. The bits of a code are in `form.planes(K)`, the lowest first.

  Further leading axes on every array (layers) are allowed; `lax.scan` or an index takes one off. Only
  then can `contract` and `take` be called.
  """

  # Any, because tree maps put shapes, shardings and None in an array's place.
  planes: tuple[Any, ...]
  scales: Any
  parents: Any
  minima: Any
  minima_parents: Any
  form: Grouped = field(metadata={"static": True})
  weight_shape: tuple[int, ...] = field(metadata={"static": True})
  contracted_axes: int = field(metadata={"static": True})
  reads_in_place: ClassVar[bool] = True

  def __post_init__(self) -> None:
    object.__setattr__(self, "weight_shape", tuple(self.weight_shape))
    object.__setattr__(self, "planes", tuple(self.planes))

  @classmethod
  def from_rows(
    cls, rows: GroupedRows, weight_shape: tuple[int, ...], contracted_axes: int
  ) -> "GroupedArray":
    """Packs one weight, without further leading axes. Raises: ValueError: the shapes do not fit."""
    c = Contraction(tuple(weight_shape), contracted_axes)
    if rows.codes.shape != (c.n, c.k):
      raise ValueError(
        f"codes are {rows.codes.shape}: a weight {weight_shape} has {c.n} channels of {c.k} elements"
      )
    planes, low = [], 0
    for bits in rows.form.planes(c.k):
      planes.append(_plane(rows.codes, low, bits))
      low += bits
    return cls(
      tuple(planes), rows.scales, rows.parents, rows.minima, rows.minima_parents,
      rows.form, weight_shape, contracted_axes,
    )  # fmt: skip

  @property
  def leading(self) -> tuple[int, ...]:
    return self.scales.shape[:-2]

  def dequantize(self) -> Float32[Array, "..."]:
    """The weight that `contract` multiplies by, float32 in the shape `shape`."""
    w_NxK = jnp.concatenate([self._part(part) for part in range(self._parts)], axis=-1)
    w_NxK = w_NxK if self.contracted_axes < 0 else jnp.swapaxes(w_NxK, -1, -2)
    return w_NxK.reshape(self.shape)

  def contract(self, spec: str, x: Float[Array | np.ndarray, "..."]) -> Float[Array, "..."]:
    """Computes `jnp.einsum(spec, x, w.dequantize())` in float32; returns x's dtype.

    On a CPU a block of rows becomes float32 at a time, so that memory is read as narrow as it is.

    Args:
      x: float32 or bfloat16; specs are as in `weights.contraction.contract_rows`.
    Raises: ValueError: a spec is of another form, or does not fit the shapes.
    """
    return self.contract_all(x, (spec, self))[0]

  @staticmethod
  def contract_all(
    x: Float[Array | np.ndarray, "..."], *products: tuple[str, "GroupedArray"]
  ) -> list[Float[Array, "..."]]:
    """Computes `contract` with each weight."""
    for _, w in products:
      w.check_single()
    x = jnp.asarray(x)
    ys = contract_rows(
      x,
      [(spec, w.contraction) for spec, w in products],
      lambda x_TxK: [w._product(x_TxK.astype(jnp.float32)) for _, w in products],
    )
    return [y.astype(x.dtype) for y in ys]

  def _rows_at(self, ids: Int[Array, "*shape"]) -> Float32[Array, "*shape D"]:
    flat, d = ids.reshape(-1), self.weight_shape[1]
    rows = jax.tree.map(lambda leaf: leaf[flat], self)
    rows = dataclasses.replace(rows, weight_shape=(flat.size, d))
    return rows.dequantize().reshape(*ids.shape, d)

  @property
  def _parts(self) -> int:
    """Number of equal parts of a row; each is some bits of a run of bytes in every plane."""
    return 8 // min(self.form.planes(self.contraction.k))

  def _part(self, part: int) -> Float32[Array, "... R P"]:
    """Dequantises one part of every row to float32."""
    form, k, parts = self.form, self.contraction.k, self._parts
    width, low, codes = k // parts, 0, None
    for plane, bits in zip(self.planes, form.planes(k), strict=True):
      # The plane's own parts are as long as some of ours together.
      position, run = divmod(part, parts * bits // 8)
      bytes_ = plane[..., run * width : (run + 1) * width].astype(jnp.int32)
      bits_ = (bytes_ >> (bits * position) & (1 << bits) - 1) << low
      codes = bits_ if codes is None else codes | bits_
      low += bits
    if form.float8 != "none":
      # One part, of whole bytes.
      codes = lax.bitcast_convert_type(self.planes[0], FLOAT8[form.float8]).astype(jnp.float32)
    q = (codes - form.offset).reshape(*codes.shape[:-1], -1, form.group_size)
    # Both limits, as there may be no row at all to tell from.
    groups = slice(part * width // form.group_size, (part + 1) * width // form.group_size)
    if form.minima == "zero":
      q = q - self.minima[..., groups, None].astype(jnp.int32)
    w = jnp.asarray(q, jnp.float32) * self._spread(self.scales, self.parents, groups)[..., None]
    if form.minima == "minimum":
      w = w + self._spread(self.minima, self.minima_parents, groups)[..., None]
    return w.reshape(codes.shape)

  def _spread(self, scales: Any, parents: Any, groups: slice) -> Float32[Array, "... G"]:
    s = jnp.asarray(scales[..., groups], jnp.float32)
    if parents is None:
      return s
    children = PARENT // self.form.group_size
    # A part may begin and end within what a parent has.
    first, last = groups.start // children, -(-groups.stop // children)
    p = jnp.repeat(jnp.asarray(parents[..., first:last], jnp.float32), children, axis=-1)
    return s * p[..., groups.start - first * children :][..., : s.shape[-1]]

  def _product(self, x_TxK: Float32[Array, "T K"]) -> Float32[Array, "T N"]:
    n, k, parts = self.contraction.n, self.contraction.k, self._parts
    x_parts = jnp.split(x_TxK, parts, axis=1)

    def product(rows: "GroupedArray") -> Array:
      # A dot for each part: XLA:CPU would not vectorise the writing of parts into one another.
      return sum(
        lax.dot_general(
          x, rows._part(part), (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
        )
        for part, x in enumerate(x_parts)
      )

    at_once = max(1, _BLOCK_ELEMENTS // k)
    if at_once >= n or jax.default_backend() != "cpu":
      return product(self)

    def block(i: Array, y_TxN: Array) -> Array:
      # The last block reaches back over rows that are done: their products are the same again.
      start = jnp.minimum(i * at_once, n - at_once)
      rows = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, at_once), self)
      return lax.dynamic_update_slice_in_dim(y_TxN, product(rows), start, axis=1)

    return lax.fori_loop(0, -(-n // at_once), block, jnp.zeros((len(x_TxK), n), jnp.float32))


def _plane(codes: np.ndarray, low: int, bits: int) -> np.ndarray:
  """Packs bits low .. low + bits - 1 of every code as the class says."""
  if bits == 8:
    return np.ascontiguousarray(codes)
  n, k = codes.shape
  parts = codes.reshape(n, 8 // bits, k * bits // 8)
  mask = np.uint8((1 << bits) - 1)
  packed = np.zeros((n, k * bits // 8), np.uint8)
  for position in range(8 // bits):
    packed |= (parts[:, position] >> np.uint8(low) & mask) << np.uint8(bits * position)
  return packed
