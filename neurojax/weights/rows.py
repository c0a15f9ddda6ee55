"""Quantized matrices exactly as files hold them: groups of small integers with scales, on the host."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float32, UInt8

from neurojax.forms import Grouped

FLOAT8 = {
  "e4m3": np.dtype(ml_dtypes.float8_e4m3fn), "e5m2": np.dtype(ml_dtypes.float8_e5m2),
}  # fmt: skip
"""The dtypes of `Grouped.float8`."""


class TernaryRows(NamedTuple):
  """A ternary matrix on the host, in the packing of `weights.ternary`.

  Attributes:
    codes: uint8 [N, Y].
    scales: [N, K / group_size]; [1, 1], or [experts, 1], if group_size is None.
    group_size: Elements of a row that share a scale; None: all of a matrix.
  """

  codes: UInt8[np.ndarray, "N Y"]
  scales: np.ndarray
  group_size: int | None

  def split(self, parts: int) -> "list[TernaryRows]":
    """Cuts the rows into as many matrices of equally many rows, one after the other."""
    scales = self.scales
    if self.group_size is None:
      scales = np.broadcast_to(scales, (parts, 1))
    return [
      TernaryRows(part, part_scales, self.group_size)
      for part, part_scales in zip(
        np.split(self.codes, parts), np.split(scales, parts), strict=True
      )
    ]


@dataclass(frozen=True)
class GroupedRows:
  """A grouped matrix on the host: a row of K elements is an output channel, or a vocabulary entry.

  Attributes:
    form: The form, which gives the arrays their meaning.
    codes: uint8 [N, K], below 2**form.bits.
    scales: [N, K / group_size] of form.scale; int8 if form.parent.
    parents: [N, K / PARENT] of form.scale if form.parent, else None.
    minima: Shaped like scales, but uint8 for a "zero" or under a parent; None without minima.
    minima_parents: Shaped like parents, of the minima.
  """

  form: Grouped
  codes: UInt8[np.ndarray, "N K"]
  scales: np.ndarray
  parents: np.ndarray | None = None
  minima: np.ndarray | None = None
  minima_parents: np.ndarray | None = None

  def split(self, parts: int) -> "list[GroupedRows]":
    """Cuts the rows into `parts` matrices of equally many rows, one after the other."""
    arrays = {
      field.name: getattr(self, field.name) for field in fields(self) if field.name != "form"
    }
    each = {
      name: [None] * parts if array is None else np.split(array, parts)
      for name, array in arrays.items()
    }
    return [
      replace(self, **{name: arrays[i] for name, arrays in each.items()}) for i in range(parts)
    ]

  @classmethod
  def join(cls, rows: "Sequence[GroupedRows]") -> "GroupedRows":
    """Joins the rows of several matrices of one form into one matrix."""
    arrays = {
      field.name: [getattr(one, field.name) for one in rows]
      for field in fields(cls)
      if field.name != "form"
    }
    whole = {name: None if of[0] is None else np.concatenate(of) for name, of in arrays.items()}
    return replace(rows[0], **whole)

  def values(self) -> Float32[np.ndarray, "N K"]:
    """Dequantises: each product and each sum is rounded to float32 once."""
    n, k = self.codes.shape
    form = self.form
    if form.float8 != "none":
      numbers = np.arange(256, dtype=np.uint8).view(FLOAT8[form.float8]).astype(np.float32)
      q = numbers[self.codes].reshape(n, -1, form.group_size)
    else:
      # Codes are below 2**8: what is taken off leaves exact integers.
      q = self.codes.astype(np.float32).reshape(n, -1, form.group_size) - np.float32(form.offset)
    with np.errstate(all="ignore"):
      if form.minima == "zero":
        q -= self.minima[..., None].astype(np.float32)
      q *= _scaled(self.scales, self.parents)[..., None]
      if form.minima == "minimum":
        q += _scaled(self.minima, self.minima_parents)[..., None]
    return q.reshape(n, k)

  def check_finite(self) -> None:
    """Raises: ValueError: a scale, minimum or float8 is not finite; it names the row."""
    if self.form.float8 != "none":
      finite = np.isfinite(np.arange(256, dtype=np.uint8).view(FLOAT8[self.form.float8]))
      if not (good := finite[self.codes]).all():
        raise ValueError(f"row {int(np.argwhere(~good)[0][0])}: a number is NaN or infinite")
    for what, array in (
      ("scale", self.scales), ("scale", self.parents),
      ("minimum", self.minima), ("minimum", self.minima_parents),
    ):  # fmt: skip
      if array is not None and not (good := np.isfinite(array)).all():
        row = int(np.argwhere(~good)[0][0])
        raise ValueError(f"row {row}: a {what} is NaN or infinite")

  def as_form(self, form: Grouped) -> "GroupedRows":
    """Converts to another form without any change of numbers: one that `Grouped.join` gave for this one."""
    if form == self.form:
      return self
    mine = self.form
    times = mine.group_size // form.group_size
    codes = self.codes.astype(np.int16) + np.int16(form.offset - mine.offset)
    minima, minima_parents = self.minima, self.minima_parents
    if mine.minima == "zero":
      codes -= np.repeat(minima.astype(np.int16), mine.group_size, axis=1)
      minima = None
    scales, parents = self.scales, self.parents
    if not form.parent:
      scales, parents = _scaled(scales, parents).astype(form.scale), None
      if minima is not None:
        minima, minima_parents = _scaled(minima, minima_parents).astype(form.scale), None
    elif parents is not None:
      parents = parents.astype(form.scale)
      minima_parents = None if minima_parents is None else minima_parents.astype(form.scale)
    if form.minima == "minimum" and minima is None:
      minima = np.zeros(scales.shape, np.uint8 if form.parent else scales.dtype)
      minima_parents = None if parents is None else np.zeros_like(parents)
    return GroupedRows(
      form,
      codes.astype(np.uint8),
      np.repeat(scales, times, axis=1),
      parents,
      None if minima is None else np.repeat(minima, times, axis=1),
      minima_parents,
    )


def _scaled(scales: np.ndarray, parents: np.ndarray | None) -> np.ndarray:
  """Multiplies scales by their parents: float32 for each group."""
  s = scales.astype(np.float32)
  if parents is None:
    return s
  return s * np.repeat(parents.astype(np.float32), s.shape[1] // parents.shape[1], axis=1)
