"""Forms of one tensor in memory, and the few sizes that every room agrees on."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

Weights = Literal["dense", "int8", "w2a16", "w2a8", "stored"]
"""The user's choice for all matrices of a model.

"dense" holds them in the compute dtype, "int8" as 8-bit integers with scales. "w2a16" and "w2a8" keep the
file's ternary matrices packed, for activations as they are or rounded to int8, and the others dense.
"stored" keeps every matrix as its file has it, exactly, where that is narrower."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

KEY_BLOCK = 128
"""Attention reads the cache in blocks of this many positions; a capacity is a multiple of it."""

PREFILL = 256
"""Tokens of one prefill step at most. The cache of a layer with a window has room for them beside the
window."""


@dataclasses.dataclass(frozen=True)
class Scales:
  """Form of a ternary matrix: two-bit codes and scales.

  Attributes:
    group_size: Contracted elements of one output that share a scale; None: the whole matrix (of each
      layer) has one.
    scale_bytes: Bytes of a scale.
  """

  group_size: int | None
  scale_bytes: int

  def matrix_bytes(self, contracted: int, output: int) -> int:
    # weights.ternary.TernaryArray: 16 bytes of codes for each 64 elements of a row.
    codes = output * -(-contracted // 64) * 16
    groups = 1 if self.group_size is None else output * -(-contracted // self.group_size)
    return codes + groups * self.scale_bytes


PARENT = 256
"""Contracted elements of one output whose groups share a parent scale, see `Grouped.parent`."""

_PLANES: Mapping[int, tuple[tuple[int, ...], ...]] = {
  8: (), 6: ((4, 2),), 5: ((4, 1), (4, 2)), 4: ((4,),), 3: ((2, 1), (4,)), 2: ((2,), (4,)),
  1: ((1,), (2,), (4,)),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grouped:
  """Form of a matrix of small integers, with a scale for each `group_size` contracted elements of an output:

    w = scale * (code - offset) [+ minimum]    or    w = scale * (code - offset - zero)

  Attributes:
    bits: Bits of a code: 1 to 8 except 7.
    offset: The code that stands for zero.
    group_size: Contracted elements of one output that share a scale.
    scale: Dtype of a scale, and of a minimum.
    parent: Every PARENT elements have a scale, and each group has an int8 factor of it (uint8 for minima).
    minima: Each group has a minimum, a zero (uint8), or neither.
    float8: The codes are 8-bit floating-point numbers of this kind, not integers.
  """

  bits: int
  offset: int
  group_size: int
  scale: Literal["float16", "float32"]
  parent: bool = False
  minima: Literal["none", "minimum", "zero"] = "none"
  float8: Literal["none", "e4m3", "e5m2"] = "none"

  def planes(self, contracted: int) -> tuple[int, ...]:
    """Bits of each plane that a row's codes are cut into; the first plane has the lowest bits.

    A byte of a plane holds codes that lie an equal part of the row apart, and every part has whole
    groups. Rows that cannot be divided so are kept in more bits, at worst as bytes."""
    for planes in _PLANES[self.bits]:
      if contracted % (8 // min(planes) * self.group_size) == 0:
        return planes
    return (8,)

  def matrix_bytes(self, contracted: int, output: int) -> int:
    row = sum(contracted * bits // 8 for bits in self.planes(contracted))
    scales = 2 if self.minima == "minimum" else 1
    groups = contracted // self.group_size
    if self.parent:
      row += scales * (groups + contracted // PARENT * DTYPE_BYTES[self.scale])
    else:
      row += scales * groups * DTYPE_BYTES[self.scale]
    return output * (row + (groups if self.minima == "zero" else 0))

  def join(self, other: "Grouped") -> "Grouped | None":
    """The narrowest form that holds matrices of both forms exactly; None: there is none."""
    if self == other:
      return self
    if (self.float8, other.float8) != ("none", "none"):
      return None
    group_size = math.gcd(self.group_size, other.group_size)
    bits, offset = 8, 128
    if "zero" not in (self.minima, other.minima):
      offset = max(self.offset, other.offset)
      most = max((1 << form.bits) - form.offset for form in (self, other)) + offset
      bits = next(b for b in sorted(_PLANES) if 1 << b >= most)
    parent = self.parent and other.parent
    same = self.scale == other.scale and self.parent == other.parent
    return Grouped(
      bits=bits,
      offset=offset,
      group_size=group_size,
      scale=self.scale if same else "float32",
      parent=parent,
      minima="minimum" if "minimum" in (self.minima, other.minima) else "none",
    )


@dataclasses.dataclass(frozen=True)
class Plain:
  """Form of a matrix of plain 16-bit numbers."""

  dtype: Literal["float16", "bfloat16"]

  def matrix_bytes(self, contracted: int, output: int) -> int:
    return contracted * output * DTYPE_BYTES[self.dtype]


Form = Scales | Grouped | Plain

Forms = Mapping[str, Form]
"""Forms of a file's matrices by canonical name, where they are narrow; see `files.kept.stored_forms`. Those
with `Scales` are ternary."""


TERNARY_FORMATS: Mapping[str, Scales] = {
  "ternary-g64": Scales(64, 2),
  "ternary-g128": Scales(128, 2),
  "ternary-g256": Scales(256, 2),
  "ternary-tensor": Scales(None, 4),
  "Q2_0 (group 64)": Scales(64, 2),
  "Q2_0 (group 128)": Scales(128, 2),
  "PQ2_0": Scales(128, 2),
  "TQ1_0": Scales(256, 2),
  "TQ2_0": Scales(256, 2),
  "I2_S": Scales(None, 4),
}
"""Scales by the name of a ternary format; those of files are in `weights.codecs`. On the device every one of
them has two-bit codes, whatever its file holds: TQ1_0's 1.69 bits become 2.06 there."""


def capacity_for(context_length: int) -> int:
  """Cache positions allocated for a context: the next multiple of KEY_BLOCK."""
  return -(-context_length // KEY_BLOCK) * KEY_BLOCK


def kept_positions(capacity: int, window: int | None) -> int:
  """Positions that the cache of one layer keeps: with a window its keys and those of one step at most, else
  all `capacity`."""
  return capacity if window is None else min(capacity, capacity_for(window + PREFILL))
