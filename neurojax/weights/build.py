"""Builds the array of a form from what a file's tensor holds."""

from typing import Any, Literal

import jax
import numpy as np

from neurojax.forms import Form, Grouped, Scales
from neurojax.weights.grouped import GroupedArray
from neurojax.weights.int8 import Int8Array
from neurojax.weights.rows import GroupedRows, TernaryRows
from neurojax.weights.ternary import Mode, TernaryArray

Source = GroupedRows | TernaryRows | np.ndarray


def build(
  form: Form | Literal["int8"],
  source: Source,
  shape: tuple[int, ...],
  contracted_axes: int,
  *,
  experts: int | None = None,
  mode: Mode = "w2a16",
) -> Any:
  """Builds the array in which a form holds a matrix, on the host or the default device.

  Args:
    source: `TernaryRows` for `Scales`, `GroupedRows` for `Grouped`, in the weight's own shape an
      array of the form's dtype for `Plain`, of float32 for "int8". Rows of experts stand one after
      the other; arrays have them on a leading axis.
    shape: The matrix's own shape, of one expert if there are several.
    experts: Number of matrices in the source, which get a leading axis E; None: one, without it.
    mode: The treatment of activations in products with a ternary matrix.
  Raises: ValueError: the source has another shape.
  """
  if isinstance(source, np.ndarray) and form != "int8":
    return source
  if experts is not None:
    parts = source if isinstance(source, np.ndarray) else source.split(experts)
    each = [build(form, part, shape, contracted_axes, mode=mode) for part in parts]
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *each)
  match form:
    case Scales():
      assert isinstance(source, TernaryRows)
      return TernaryArray.from_rows(
        source.codes, source.scales, shape, contracted_axes,
        group_size=source.group_size, mode=mode,
      )  # fmt: skip
    case Grouped():
      assert isinstance(source, GroupedRows)
      return GroupedArray.from_rows(source.as_form(form), shape, contracted_axes)
    case "int8":
      return Int8Array.quantize(source, contracted_axes=contracted_axes)
  raise AssertionError(form)
