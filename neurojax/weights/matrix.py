"""Weight matrices, however they are held: as plain numbers, as small integers with scales, in training.

`contract_all`, `take` and `layer` take any of them but one: products with ternary matrices are a matter
of kernels, so `model.project` hands those to `kernels.gemm`.
"""

import dataclasses
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from neurojax.weights.contraction import Contraction


class Matrix(Protocol):
  """A weight that is no jax.Array: it knows how to multiply and to look up rows."""

  @staticmethod
  def contract_all(x: jax.Array, *products: tuple[str, Any]) -> list[jax.Array]:
    """`einsum(spec, x, w)` for each (spec, w), all of this class; x is float32 and prepared once."""
    ...

  def take(self, ids: jax.Array) -> jax.Array:
    """The rows of a table [V, D] at these ids."""
    ...

  def layer(self, index: jax.Array) -> Any:
    """The `index`-th of matrices that are stacked on a leading axis."""
    ...


def contract_all(x: Float[Array, "..."], *products: tuple[str, Any]) -> list[Float[Array, "..."]]:
  """`einsum(spec, x, w)` for each (spec, w), summed in float32; all w are held alike.

  Returns: float32, or the dtype of the values of a `weights.aware.AwareMatrix`.
  """
  first = products[0][1]
  if not isinstance(first, jax.Array):
    return type(first).contract_all(x.astype(jnp.float32), *products)
  return [
    jnp.einsum(spec, x, w, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    for spec, w in products
  ]


def take(table_VD: Any, ids: Int[Array, "*shape"]) -> Float[Array, "*shape D"]:
  """The rows of a table at these ids."""
  return table_VD[ids] if isinstance(table_VD, jax.Array) else table_VD.take(ids)


def layer(stacked: Any, index: Int[Array, ""]) -> Any:
  """The `index`-th of arrays or matrices that are stacked on a leading axis."""
  if isinstance(stacked, jax.Array):
    return lax.dynamic_index_in_dim(stacked, index, keepdims=False)
  return stacked.layer(index)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InPlace:
  """A matrix that is left where it is: products may be computed by a kernel, which gets whole arrays.

  XLA may slice a stack for free in what it fuses. But inside a loop over layers a slice of it for a kernel
  is a copy.

  Attributes:
    matrix: An array or a matrix; with one further leading axis if there is an index.
    index: int32 [], which of stacked matrices; None: the matrix is a single one.
  """

  # Any, because tree maps put shapes, shardings and None in an array's place.
  matrix: Any
  index: Any = None

  def taken(self) -> Any:
    """The matrix itself."""
    return self.matrix if self.index is None else layer(self.matrix, self.index)


def in_place(stacked: Any, index: Int[Array, ""]) -> Any:
  """The `index`-th of arrays or matrices that are stacked on a leading axis, left where it is.

  Only products can be computed with it.
  """
  return InPlace(stacked, index) if reads_in_place(stacked) else layer(stacked, index)


def reads_in_place(matrix: Any) -> bool:
  """Tells whether `InPlace` may hold a matrix."""
  return isinstance(matrix, jax.Array) or getattr(type(matrix), "reads_in_place", False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackedLayer:
  """One layer of stacked matrices, left where it is because only a part of the layer is read.

  Attributes:
    stacked: Arrays or matrices with two further leading axes: layers, and a layer's experts.
    index: int32 [], the layer.
  """

  # Any, because tree maps put shapes, shardings and None in an array's place.
  stacked: Any
  index: Any

  def layer(self, index: Int[Array, ""]) -> Any:
    """The `index`-th matrix of this layer."""
    count = jax.tree.leaves(self.stacked)[0].shape[1]
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), self.stacked)
    return in_place(flat, self.index * count + index)


class RowMatrix:
  """The common part of matrices that are held as rows of codes with scales, one for each output channel.

  Subclasses are dataclasses and pytrees with the two attributes below, and say what stands in front.

  Attributes:
    weight_shape: The weight's own shape, without further leading axes.
    contracted_axes: c > 0 when the first c axes are contracted, c < 0 when the last -c are.
  """

  weight_shape: tuple[int, ...]
  contracted_axes: int
  # Whether `InPlace` may hold matrices of the class.
  reads_in_place: ClassVar[bool] = False

  @property
  def leading(self) -> tuple[int, ...]:
    """The sizes of the axes in front of the weight's own: layers, experts."""
    raise NotImplementedError

  def _rows_at(self, ids: Int[Array, "*shape"]) -> Float32[Array, "*shape D"]:
    """Dequantised rows; ids are in range."""
    raise NotImplementedError

  @property
  def contraction(self) -> Contraction:
    return Contraction(self.weight_shape, self.contracted_axes)

  @property
  def shape(self) -> tuple[int, ...]:
    """The weight's shape behind the further leading axes, if there are any."""
    return (*self.leading, *self.weight_shape)

  @property
  def nbytes(self) -> int:
    """Bytes of all arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

  def take(self, ids: Int[Array, "*shape"]) -> Float32[Array, "*shape D"]:
    """Looks up rows of the dequantised weight: the embedding of each id, out-of-range ids clamped.

    Raises: ValueError: the weight is not `[V, D]` with the trailing axis contracted.
    """
    self.check_single()
    if self.contracted_axes != -1 or len(self.weight_shape) != 2:
      raise ValueError(
        f"take needs a weight [V, D] with contracted_axes=-1, not one of shape"
        f" {self.weight_shape} with contracted_axes={self.contracted_axes}"
      )
    return self._rows_at(jnp.clip(ids, 0, self.weight_shape[0] - 1))

  def layer(self, index: Int[Array, ""]) -> Any:
    """The `index`-th of matrices that are stacked on one leading axis."""
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), self)

  def check_single(self) -> None:
    """Raises: ValueError: there are further leading axes."""
    if self.leading:
      raise ValueError(
        f"{self.shape} has {len(self.leading)} axes in front of the weight's"
        f" {self.weight_shape}: index them or scan over them first"
      )
