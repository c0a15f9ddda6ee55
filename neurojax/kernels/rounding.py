"""Rounds activations to int8 on a GPU, each together with what makes them: one Triton kernel a step.

A program has a whole row, so that how a row is summed follows its width alone: a row has the same bits
in any number of rows. Levels and steps are those of `gemm.reference.quantize_rows` bit for bit, and lie
in the order in which the next product reads them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from neurojax.kernels import gpus
from neurojax.kernels.gemm.levels import FIELDS, Levels, Order, count_of
from neurojax.weights.ternary import BLOCK, LEVEL_MAX, SMALLEST_ABSMAX

_ELEMENTS = 512
"""Elements of a row for each warp of a program, up to 16 warps."""

_INFINITY_BITS = 0x7F800000


def normalised(
  x_MD: Float32[Array, "M D"],
  parts_SMD: Float32[Array, "S M D"] | None,
  scale_LD: Float32[Array, "L D"],
  layer: Int[Array, ""],
  *,
  eps: float,
  order: Order,
  interpret: bool = False,
) -> tuple[Float32[Array, "M D"], Levels]:
  """Add the parts of a product to the residual stream, normalise by RMSNorm, and round.

  Args:
    parts_SMD: The sums of a product, which are added up in order; None: nothing is added.
    scale_LD: The norm's scales of all layers.
  Returns: x + (parts[0] + parts[1] + ...), and the levels of its norm.
  """
  _check(interpret)
  return _normalised(x_MD, parts_SMD, scale_LD, layer, eps=eps, order=order, interpret=interpret)


def gated(
  both_MX: Float[Array, "M X"], *, dtype: DTypeLike, order: Order, interpret: bool = False
) -> Levels:
  """Compute silu(gate) * up in float32 and round it.

  Args:
    both_MX: Gate, then up: X = 2F.
    dtype: The product has this dtype before it is rounded to int8.
  """
  _check(interpret)
  return _gated(both_MX, dtype=jnp.dtype(dtype), order=order, interpret=interpret)


def rounded(x_MK: Float[Array, "M K"], *, order: Order, interpret: bool = False) -> Levels:
  """Round rows."""
  _check(interpret)
  return _rounded(x_MK, order=order, interpret=interpret)


def _check(interpret: bool) -> None:
  """Raises: NotImplementedError: this JAX cannot compile the kernels."""
  if not interpret and (reason := gpus.why_not_jax()):
    raise NotImplementedError(reason)


@functools.partial(jax.jit, static_argnames=("eps", "order", "interpret"))
def _normalised(
  x_MD: Array,
  parts_SMD: Array | None,
  scale_LD: Array,
  layer: Array,
  *,
  eps: float,
  order: Order,
  interpret: bool,
) -> tuple[Array, Levels]:
  def kernel(layer_ref, x_ref, parts_ref, scale_ref, *out):
    *sum_refs, values_ref, steps_ref = out
    row, column, inside = row_of_program(x_ref.shape)
    x = load_row(x_ref, (row, column), inside)
    if parts_ref is not None:
      added = load_row(parts_ref, (0, row, column), inside)
      for s in range(1, parts_ref.shape[0]):
        added += load_row(parts_ref, (s, row, column), inside)
      x += added
      plgpu.store(sum_refs[0].at[row, column], x, mask=inside)
    scale = load_row(scale_ref, (layer_ref[0], column), inside)
    factor = lax.rsqrt(jnp.sum(x * x, axis=1) / x_ref.shape[1] + eps)
    x = x * factor[:, None] * scale
    store_levels(x, row, column, inside, values_ref, steps_ref, order, interpret)

  m, d = x_MD.shape
  sums = [] if parts_SMD is None else [jax.ShapeDtypeStruct((m, d), jnp.float32)]
  *sums, values, steps = _call(
    kernel, m, d, order, sums, interpret, "norm_levels",
    jnp.asarray(layer, jnp.int32).reshape(1), x_MD, parts_SMD, scale_LD,
  )  # fmt: skip
  return sums[0] if sums else x_MD, Levels(values, steps, m, order)


@functools.partial(jax.jit, static_argnames=("dtype", "order", "interpret"))
def _gated(both_MX: Array, *, dtype: Any, order: Order, interpret: bool) -> Levels:
  m, f = both_MX.shape[0], both_MX.shape[1] // 2

  def kernel(both_ref, values_ref, steps_ref):
    row, column, inside = row_of_program((m, f))
    gate, up = (load_row(both_ref, (row, column + part * f), inside) for part in range(2))
    hidden = (jax.nn.silu(gate) * up).astype(dtype).astype(jnp.float32)
    store_levels(hidden, row, column, inside, values_ref, steps_ref, order, interpret)

  values, steps = _call(kernel, m, f, order, [], interpret, "gated_levels", both_MX)
  return Levels(values, steps, m, order)


@functools.partial(jax.jit, static_argnames=("order", "interpret"))
def _rounded(x_MK: Array, *, order: Order, interpret: bool) -> Levels:
  def kernel(x_ref, values_ref, steps_ref):
    row, column, inside = row_of_program(x_ref.shape)
    x = load_row(x_ref, (row, column), inside)
    store_levels(x, row, column, inside, values_ref, steps_ref, order, interpret)

  m, k = x_MK.shape
  values, steps = _call(kernel, m, k, order, [], interpret, "row_levels", x_MK)
  return Levels(values, steps, m, order)


def _call(kernel, m, width, order, more, interpret, name, *operands):
  """Run a program for each row that the order stores; `more` are outputs in front of the levels."""
  rows = count_of(m, order)
  return pl.pallas_call(
    kernel,
    grid=(rows,),
    out_shape=[*more, *level_shapes(m, width, order)],
    compiler_params=plgpu.CompilerParams(num_warps=warps_for(width), num_stages=1),
    interpret=interpret,
    name=name,
  )(*operands)


def level_shapes(m: int, width: int, order: Order) -> list[jax.ShapeDtypeStruct]:
  """The shapes of values and steps."""
  if width % BLOCK:
    raise ValueError(f"rows of {width} elements: use a multiple of {BLOCK}")
  rows = count_of(m, order)
  shape = (FIELDS, m, width // FIELDS) if order == "planes" else (rows, width)
  return [jax.ShapeDtypeStruct(shape, jnp.int8), jax.ShapeDtypeStruct((rows,), jnp.float32)]


def warps_for(width: int) -> int:
  """Warps of a program that has a row of `width`."""
  return max(1, min(16, pl.next_power_of_2(width) // _ELEMENTS))


def row_of_program(shape: tuple[int, int]) -> tuple[Array, Array, Array]:
  """The row of this program, and columns as [1, width], of which those inside count.

  Programs past the last row repeat it: all that write it write the same.
  """
  row = jnp.minimum(pl.program_id(0), shape[0] - 1)
  column = lax.iota(jnp.int32, pl.next_power_of_2(shape[1]))[None]
  return jnp.full(column.shape, row), column, column < shape[1]


def load_row(ref: Any, index: Any, inside: Array) -> Array:
  """Load float32 [1, width]; zeros outside."""
  index = tuple(jnp.broadcast_to(i, inside.shape) for i in index)
  return plgpu.load(ref.at[index], mask=inside, other=0.0).astype(jnp.float32)


def store_levels(
  x: Array,
  row: Array,
  column: Array,
  inside: Array,
  values_ref: Any,
  steps_ref: Any,
  order: Order,
  interpret: bool,
) -> None:
  """Round a row [1, width] of this program, whose elements outside are zeros, and store it."""
  # As integers NaN is above infinity, so that the maximum finds it.
  top_bits = jnp.max(lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF, axis=1)
  top = lax.bitcast_convert_type(top_bits, jnp.float32)
  finite = top_bits < _INFINITY_BITS
  used = finite & (top >= SMALLEST_ABSMAX)
  inverse = jnp.where(used, _quotient(jnp.where(used, top, 1.0), interpret), 0.0)
  levels = _levels(x, jnp.broadcast_to(inverse[:, None], x.shape), interpret)
  levels = jnp.where(finite[:, None], levels, 0).astype(jnp.int8)
  steps = jnp.where(used, top * jnp.float32(1 / LEVEL_MAX), 0.0)
  steps_ref[pl.ds(pl.program_id(0), 1)] = jnp.where(finite, steps, jnp.nan)
  if order == "planes":
    at = (column & FIELDS - 1, row, column >> 2)
  else:
    within = (column & FIELDS - 1) * (BLOCK // FIELDS) + (column >> 2 & BLOCK // FIELDS - 1)
    at = (jnp.full(column.shape, pl.program_id(0)), (column & -BLOCK) + within)
  plgpu.store(values_ref.at[at], levels, mask=inside)


def _quotient(top: Array, interpret: bool) -> Array:
  """127 / top as IEEE has it: Triton's own division is off by up to two units."""
  if interpret:
    return LEVEL_MAX / top
  return _asm("div.rn.f32 $0, $1, $2;", jnp.float32, jnp.full(top.shape, LEVEL_MAX, top.dtype), top)


def _levels(x: Array, inverse: Array, interpret: bool) -> Array:
  """Round x * inverse half to even; the product is rounded to float32 before that."""
  if interpret:
    product = x * inverse
    return jnp.round(jnp.where(jnp.isnan(product), 0, product)).astype(jnp.int32)
  text = "{ .reg .f32 t; mul.rn.f32 t, $1, $2; cvt.rni.s32.f32 $0, t; }"
  return _asm(text, jnp.int32, x, inverse)


def _asm(text: str, dtype: Any, a: Array, b: Array) -> Array:
  return plgpu.elementwise_inline_asm(
    text,
    args=[a, b],
    constraints="=r,f,f" if dtype == jnp.int32 else "=f,f,f",
    pack=1,
    result_shape_dtypes=[jax.ShapeDtypeStruct(a.shape, dtype)],
  )[0]
