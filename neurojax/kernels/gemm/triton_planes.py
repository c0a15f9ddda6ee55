"""Splits activations into planes, one for each field of a packed byte, as the Triton kernels read them."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from neurojax.kernels.gemm.reference import quantize_rows
from neurojax.weights.ternary import Mode

FIELDS = 4
"""Codes in a byte."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Planes:
  """Rows of activations, split by position in a packed byte. A pytree of one or two arrays.

  Attributes:
    values: [4, M, Y], int8 for "w2a8" and bfloat16 for "w2a16": plane j holds elements 4y + j.
    row_scales: float32 [M] of "w2a8", None for "w2a16": x is about values * row_scales.
  """

  # Any, because tree maps put shapes, shardings and None in an array's place.
  values: Any
  row_scales: Any = None


def unpack(codes: UInt8[Array, "n y"], dtype: Any, interpret: bool = False) -> list[Array]:
  """Unpack a block of codes: plane j is -64 w (int8) or -2 w (bfloat16, float16), for j = 0 .. 3.

  A field moves to the top of its byte or half word, where 01, 00 and 11 read as 64, 0, -64 in
  int8 and as 2, 0, -2 in both floats: a shift and a mask for four or two weights. Before that,
  0x55 turns codes 00, 01 and 10 into those three.
  """
  if interpret:
    unit = unpacked_unit(dtype)
    return [((codes >> 2 * j & 3).astype(dtype) - 1) * unit for j in range(FIELDS)]
  fields = _asm("xor.b32 $0, $1, 0x55555555;", 1, jnp.int8, codes)
  if dtype == jnp.int8:
    return [
      _asm(f"shl.b32 $0, $1, {6 - 2 * j}; and.b32 $0, $0, 0xC0C0C0C0;", 1, dtype, fields)
      for j in range(FIELDS)
    ]
  # Bytes 0 and 1 become the upper bytes of one register's half words, 2 and 3 of the other's.
  halves = "".join(
    f"prmt.b32 ${i}, $2, 0, {select}; shl.b32 ${i}, ${i}, %d; and.b32 ${i}, ${i}, 0xC000C000;"
    for i, select in enumerate(("0x1404", "0x3424"))
  )
  return [_asm(halves % (6 - 2 * j, 6 - 2 * j), 2, dtype, fields) for j in range(FIELDS)]


def unpacked_unit(dtype: Any) -> Any:
  """The number that `unpack` gives for a weight of one."""
  return jnp.dtype(dtype).type(-64 if dtype == jnp.int8 else -2)


def _asm(text: str, outputs: int, dtype: Any, words: Array) -> Array:
  """Assembly that sees four bytes of `words` as one register."""
  from jax.experimental.pallas.triton import elementwise_inline_asm

  return elementwise_inline_asm(
    text,
    args=[words],
    # Early clobber: the first output is written before the input's last use.
    constraints=",".join(["=&r"] * outputs + ["r"]),
    pack=4,
    result_shape_dtypes=[jax.ShapeDtypeStruct(words.shape, dtype)],
  )[0]


def prepare(x: Float[Array, "M K"], width: int, mode: Mode) -> Planes:
  """Split rows for weights of `width` bytes a row (Y), padding K with zeros; plain XLA.

  Raises: ValueError: K does not fit in `width` bytes.
  """
  if mode == "w2a8":
    values, row_scales = quantize_rows(x)
  else:
    values, row_scales = x.astype(jnp.bfloat16), None
  m, k = x.shape
  if k > FIELDS * width:
    raise ValueError(f"x has {k} columns, the weight {FIELDS * width}: pass x[:, :K]")
  values = jnp.pad(values, ((0, 0), (0, FIELDS * width - k)))
  return Planes(jnp.moveaxis(values.reshape(m, width, FIELDS), -1, 0), row_scales)
