"""Quantization-aware training: rounds float32 weights to the ternary numbers that products multiply by.

The optimizer keeps and moves a float32 weight. Once a step, `absmean` rounds it to the very numbers
that the model file will hold, and all products of the step multiply by those. Gradients are taken
with respect to them and applied to the float32 weight as they are: the straight-through estimator
(arXiv:1308.3432), without a line of code. Activations are rounded inside a product (`AwareMatrix`),
straight-through as well.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from neurojax.weights.contraction import Contraction
from neurojax.weights.ternary import LEVEL_MAX, SMALLEST_ABSMAX

Activations = Literal["none", "int8"]

SMALLEST_SCALE = 2.0**-17
"""Groups with a smaller scale become zeros: below it, float16 does not hold all bits of a bfloat16."""


def absmean(
  w: Float32[Array, "..."],
  contracted_axes: int,
  *,
  group_size: int | None = None,
  dtype: DTypeLike = jnp.bfloat16,
) -> tuple[Float[Array, "..."], Float32[Array, "..."]]:
  """Rounds each group of a weight to -s, 0 and s, where s is the group's mean of |w|.

  s has the 8 significant bits of a bfloat16, so that it is exact in float16 too, in which model files
  keep it, and the products -s and s are exact in bfloat16, in which a GPU multiplies. These are the
  values of `quantize.absmean(..., scale_dtype="bfloat16")`.

  Args:
    w: One weight; use `jax.vmap` for stacked layers.
    contracted_axes: c > 0: products sum over its first c axes, c < 0: over its last -c.
    group_size: Contracted elements that share s, counted in the order of the axes; None: all of
      the weight's.
    dtype: The dtype of the values, bfloat16 or wider.
  Returns: The values, in the shape of w; and s: [N, ceil(K / group_size)] for N kept and K
    contracted elements, or [1, 1].
  Source: BitNet b1.58, arXiv:2402.17764, equations 1 to 3.
  """
  c = Contraction(w.shape, contracted_axes)
  size = group_size or c.k
  groups = -(-c.k // size)
  padding = groups * size - c.k
  # [Q, q, N] or [N, Q, q]: the axis of a group's elements is 1 or 2.
  if contracted_axes > 0:
    w_KN = jnp.pad(w.reshape(c.k, c.n), ((0, padding), (0, 0)))
    grouped, axis = w_KN.reshape(groups, size, c.n), 1
  else:
    w_NK = jnp.pad(w.reshape(c.n, c.k), ((0, 0), (0, padding)))
    grouped, axis = w_NK.reshape(c.n, groups, size), 2
  if group_size is None:
    total = _sum(jnp.abs(grouped), (0, 1, 2))[None, None]
    scales = _scale(total * np.float32(1 / (c.k * c.n)))
    s = scales[:, :, None]
  else:
    counts = np.full(groups, size)
    counts[-1] -= padding
    inverse = jnp.asarray(1 / counts, jnp.float32)
    total = _sum(jnp.abs(grouped), (axis,))
    scales = _scale(total * (inverse[:, None] if axis == 1 else inverse[None]))
    s = jnp.expand_dims(scales, axis)
    scales = scales.T if axis == 1 else scales
  # s has few bits, so that w / s rounded to float32 is beyond a half exactly where w is beyond s / 2.
  values = jnp.where(grouped > s / 2, s, jnp.where(grouped < -s / 2, -s, 0)).astype(dtype)
  if contracted_axes > 0:
    values = values.reshape(groups * size, c.n)[: c.k]
  else:
    values = values.reshape(c.n, groups * size)[:, : c.k]
  return values.reshape(w.shape), scales


def _scale(mean: Float32[Array, "..."]) -> Float32[Array, "..."]:
  """Rounds a mean to a scale. `astype` would not do: XLA may leave out a conversion there and back."""
  s = lax.reduce_precision(mean, exponent_bits=8, mantissa_bits=7)
  return jnp.where(s < SMALLEST_SCALE, 0.0, s)


def _sum(x: Float32[Array, "..."], axes: tuple[int, ...]) -> Float32[Array, "..."]:
  """Sums with an error of half a unit in the last place, in whatever order a compiler adds.

  So a scale is the same number in a training step, sharded or not, and in the export. Errors of the
  additions are added up beside the sum (Knuth's TwoSum, The Art of Computer Programming, 4.2.2).
  """

  def add(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    high = a[0] + b[0]
    part = high - a[0]
    error = (a[0] - (high - part)) + (b[0] - part)
    low = error + (a[1] + b[1])
    total = high + low
    return total, low - (total - high)

  zero = np.float32(0)
  return lax.reduce((x, jnp.zeros_like(x)), (zero, zero), add, axes)[0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AwareMatrix:
  """A differentiable matrix, as training multiplies by it: a `weights.matrix.Matrix`.

  Products are of the dtype of `values`, which a GPU sums in float32; gradients of the activations and
  of the values come out in that dtype too.

  Attributes:
    values: bfloat16 or float32, in the weight's own shape or stacked on a further leading axis, which
      `lax.scan` takes off.
    activations: "int8": activations are rounded for each token by its absmax, with straight-through
      gradients; "none": they stay as they are.
  """

  # Any, because tree maps put shapes, shardings and None in an array's place.
  values: Any
  activations: Activations = field(default="none", metadata={"static": True})

  def contract(self, spec: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes `einsum(spec, x, values)` in the dtype of the values."""
    return self.contract_all(x, (spec, self))[0]

  @staticmethod
  def contract_all(
    x: Float[Array, "..."], *products: tuple[str, "AwareMatrix"]
  ) -> list[Float[Array, "..."]]:
    """Computes `contract` with each weight; x is rounded once for all that round activations."""
    # Prepared once: what several products share is kept for the backward pass only once.
    prepared: dict[tuple, tuple[Array, Array | None]] = {}
    results = []
    for spec, w in products:
      dtype, kept = w.values.dtype, _kept_axes(spec)
      key = w.activations, dtype, kept
      if key not in prepared:
        levels, step = (x, None) if w.activations == "none" else levels_and_steps(x, kept)
        prepared[key] = levels.astype(dtype), step
      levels, step = prepared[key]
      y = _einsum(spec, levels, w.values)
      if step is not None:
        step = step.reshape(*step.shape[:kept], *[1] * (y.ndim - kept))
        y = (y.astype(jnp.float32) * step).astype(dtype)
      results.append(y)
    return results

  def take(self, ids: Array) -> Array:
    """Looks up rows of the values."""
    return self.values[ids]

  def layer(self, index: Array) -> "AwareMatrix":
    """The `index`-th of stacked matrices."""
    return replace(self, values=lax.dynamic_index_in_dim(self.values, index, keepdims=False))


def levels_and_steps(
  x: Float[Array, "..."], kept: int
) -> tuple[Float32[Array, "..."], Float32[Array, "..."]]:
  """Rounds x to whole numbers in [-127, 127], with a step for each index of its first `kept` axes.

  In the forward pass these are the numbers of `kernels.gemm.reference.quantize_rows`, to the bit.
  Gradients pass the rounding unchanged, and the step counts as a constant.

  Returns: float32 levels in the shape of x, and steps with axes of 1 behind the kept ones. Where x
    holds a NaN or an infinity the step is NaN.
  """
  x = x.astype(jnp.float32)
  absmax = jnp.max(jnp.abs(lax.stop_gradient(x)), axis=tuple(range(kept, x.ndim)), keepdims=True)
  finite = jnp.isfinite(absmax)
  used = finite & (absmax >= SMALLEST_ABSMAX)
  inverse = jnp.where(used, LEVEL_MAX / jnp.where(used, absmax, 1), 0)
  scaled = x * inverse
  # The difference of a number to the nearest integer is exact, and so is the sum.
  levels = scaled + lax.stop_gradient(jnp.round(scaled) - scaled)
  step = jnp.where(used, absmax * np.float32(1 / LEVEL_MAX), 0)
  return levels, jnp.where(finite, step, jnp.nan)


def _kept_axes(spec: str) -> int:
  """The number of leading axes of x that a product keeps."""
  operands, _, out = spec.partition("->")
  left, _, _ = operands.partition(",")
  return len([letter for letter in left if letter in out])


def _einsum(spec: str, x: Array, w: Array) -> Array:
  # In float32 a GPU would round to TensorFloat-32 otherwise.
  precision = lax.Precision.HIGHEST if w.dtype == jnp.float32 else None
  return jnp.einsum(spec, x, w, precision=precision, preferred_element_type=w.dtype)
