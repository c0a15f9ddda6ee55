"""Multiplies a few rows on a CPU by the C++ kernel in cpu.cc, which is compiled when first wanted."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from neurojax.forms import Grouped
from neurojax.kernels.native import library
from neurojax.weights.contraction import Contraction
from neurojax.weights.grouped import GroupedArray
from neurojax.weights.int8 import Int8Array

_ROWS, _MATRIX, _INT8, _GROUPED = range(4)
_MINIMA = ("none", "minimum", "zero")
_FLOAT8 = ("none", "e4m3", "e5m2")
_VECTOR = 16
"""The kernel dequantises so many elements at once: groups are a multiple of it."""

Weight = tuple[Any, Contraction, Int[Array, ""] | None]
"""A jax.Array, an Int8Array or a GroupedArray; the axes of it that are summed; the layer if it is stacked."""


def why_not(dtype: Any) -> str | None:
  """Why a matrix cannot be multiplied by here, or None.

  Args:
    dtype: A dtype of plain numbers, a `Grouped` form, or Int8Array.
  """
  if isinstance(dtype, Grouped):
    if dtype.group_size % _VECTOR:
      return f"groups of {dtype.group_size}: no multiple of {_VECTOR}"
  elif dtype is not Int8Array and jnp.dtype(dtype).name not in ("float32", "bfloat16", "float16"):
    return f"a matrix of {jnp.dtype(dtype).name}"
  return library.unavailable()


def matmul_all(x: Float[Array, "M K"], weights: list[Weight]) -> list[Float32[Array, "M N"]]:
  """Multiplies x by each weight, as `reference.matmul_all` defines it, in one call.

  Sums of floats over weights whose last axes are contracted: elements 16 apart, from the first to the
  last, then those sixteen sums 8, 4, 2 and 1 apart. Over first axes: 64 neighbours from the first to
  the last, added to those before. Every product is added with a single rounding.

  Args:
    x: float32 or bfloat16; others are cast to float32.
    weights: All held alike. A layer's stack is read in place.
  Raises:
    NotImplementedError: there is no compiled kernel, and `native.library.unavailable` says why.
  """
  x = x if x.dtype in (jnp.float32, jnp.bfloat16) else x.astype(jnp.float32)
  operands, results, about = [x], [], []
  for w, c, layer in weights:
    if x.shape[1] != c.k:
      raise ValueError(f"x of shape {x.shape} does not fit a weight that contracts {c.k}")
    arrays = jax.tree.leaves(w)
    layers = 1 if layer is None else arrays[0].shape[0]
    operands += [jnp.asarray(0 if layer is None else layer, jnp.int32), *arrays]
    results.append(jax.ShapeDtypeStruct((x.shape[0], c.n), jnp.float32))
    about += _about(w, c, layers)
  call = jax.ffi.ffi_call(library.target("rows"), results, vmap_method="sequential")
  return call(*operands, about=np.asarray(about, np.int64))


def _about(w: Any, c: Contraction, layers: int) -> list[int]:
  """The numbers that cpu.cc describes a weight by."""
  if isinstance(w, GroupedArray):
    form, (low, *high) = w.form, w.form.planes(c.k)
    return [
      _GROUPED, c.n, c.k, layers, form.group_size, form.offset, _MINIMA.index(form.minima),
      _FLOAT8.index(form.float8), low + 16 * sum(high), int(form.parent),
    ]  # fmt: skip
  kind = _INT8 if isinstance(w, Int8Array) else _MATRIX if c.contracted_axes > 0 else _ROWS
  return [kind, c.n, c.k, layers, 0, 0, 0, 0, 0, 0]
