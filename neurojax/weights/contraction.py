"""Products with weights whose first or last axes are contracted, reduced to rows times a matrix."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import SupportsIndex

from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Contraction:
  """The axes of a weight that a product sums over.

  Attributes:
    weight_shape: The weight's own shape.
    contracted_axes: c > 0: the first c axes; c < 0: the last -c.
  Raises: ValueError: no axis would be contracted or none would stay.
  """

  weight_shape: tuple[int, ...]
  contracted_axes: int

  def __post_init__(self) -> None:
    c = self.contracted_axes
    is_integer = isinstance(c, SupportsIndex) and not isinstance(c, bool)
    if not is_integer or not 0 < abs(c) < len(self.weight_shape):
      raise ValueError(
        f"contracted_axes={self.contracted_axes} of shape {self.weight_shape}: at least one axis"
        " must be contracted and at least one must stay: choose c > 0 for the first c axes, c < 0 for"
        " the last -c"
      )

  @property
  def kept_shape(self) -> tuple[int, ...]:
    c = self.contracted_axes
    return self.weight_shape[c:] if c > 0 else self.weight_shape[:c]

  @property
  def contracted_shape(self) -> tuple[int, ...]:
    c = self.contracted_axes
    return self.weight_shape[:c] if c > 0 else self.weight_shape[c:]

  @property
  def n(self) -> int:
    """Number of output channels."""
    return math.prod(self.kept_shape)

  @property
  def k(self) -> int:
    """Number of contracted elements."""
    return math.prod(self.contracted_shape)

  def batch_shape(self, spec: str, x_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of the leading axes of x that an einsum such as "BTD,DNH->BTNH" keeps.

    Raises: ValueError: the spec is of another form, or does not fit the shapes.
    """
    operands, arrow, out = spec.replace(" ", "").partition("->")
    left, comma, right = operands.partition(",")
    c = self.contracted_axes
    contracted, kept = (right[:c], right[c:]) if c > 0 else (right[c:], right[:c])
    batch = left.removesuffix(contracted)
    letters = batch + contracted + kept
    if not (
      arrow
      and comma
      and letters.isalpha()
      and len(set(letters)) == len(letters)
      and len(right) == len(self.weight_shape)
      and left == batch + contracted
      and out == batch + kept
    ):
      where = f"first {c}" if c > 0 else f"last {-c}"
      raise ValueError(
        f"spec {spec!r} does not fit a weight of shape {self.weight_shape} with its"
        f" {where} axes contracted: write 'BTD,DF->BTF', batch letters, then the"
        " contracted ones in x; batch letters, then the other ones in the result"
      )
    if len(x_shape) != len(left) or x_shape[len(batch) :] != self.contracted_shape:
      raise ValueError(
        f"spec {spec!r}: x has shape {x_shape}, the weight contracts {self.contracted_shape}"
      )
    return x_shape[: len(batch)]


def contraction_of(spec: str, weight_shape: tuple[int, ...]) -> Contraction:
  """The axes that an einsum of x and a weight contracts: its first or its last ones.

  Raises: ValueError: the spec is of another form.
  """
  left, _, right = spec.replace(" ", "").partition("->")[0].partition(",")
  count = sum(letter in left for letter in right)
  return Contraction(weight_shape, count if right[:1] and right[0] in left else -count)


def contract_rows(
  x: Float[Array, "..."],
  products: "Sequence[tuple[str, Contraction]]",
  multiply: Callable[[Float[Array, "M K"]], Sequence[Float[Array, "M N"]]],
) -> list[Float[Array, "..."]]:
  """Computes `einsum(spec, x, w)` for each product, by a function that multiplies rows of x.

  Args:
    products: Specs are like "BTD,DNH->BTNH", "BTNH,NHD->BTD", or "BTD,VD->BTV" if trailing axes are
      contracted. x's last axes are the contracted ones, in the weight's order; no weight has a batch
      axis. All weights contract as many elements.
    multiply: From x as [M, K] to [M, N] for each product.
  Raises: ValueError: a spec is of another form, or does not fit the shapes.
  """
  batches = [contraction.batch_shape(spec, x.shape) for spec, contraction in products]
  ys = multiply(x.reshape(math.prod(batches[0]), products[0][1].k))
  return [
    y.reshape(*batch, *contraction.kept_shape)
    for y, batch, (_, contraction) in zip(ys, batches, products, strict=True)
  ]
