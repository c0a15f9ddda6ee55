"""How one tensor is held in memory, and the few sizes that every room agrees on."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

Weights = Literal["dense", "int8", "w2a16", "w2a8", "stored"]
"""How matrices are held: "dense" in the compute dtype, "int8" as integers with scales; "w2a16" and
"w2a8" keep a file's ternary ones packed, for activations as they are or rounded to int8, and the
others dense; "stored" keeps every one as its file has it, exactly, where that is narrower."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

KEY_BLOCK = 128
"""Attention reads the cache in blocks of this many positions; a capacity is a multiple of it."""

PREFILL = 256
"""Inputs of one call that a cache of a layer with a window has room for, beside the window."""


@dataclasses.dataclass(frozen=True)
class Scales:
  """How the scales of a ternary matrix lie: one for each `group_size` contracted elements of an
  output, or one for the matrix (of each layer) if that is None; `scale_bytes` each."""

  group_size: int | None
  scale_bytes: int

  def matrix_bytes(self, contracted: int, output: int) -> int:
    # weights.ternary.TernaryArray: 16 bytes of codes for each 64 elements of a row.
    codes = output * -(-contracted // 64) * 16
    groups = 1 if self.group_size is None else output * -(-contracted // self.group_size)
    return codes + groups * self.scale_bytes


PARENT = 256
"""Contracted elements whose groups' scales are multiples of one, see `Grouped.parent`."""

_PLANES: Mapping[int, tuple[tuple[int, ...], ...]] = {
  8: (), 6: ((4, 2),), 5: ((4, 1), (4, 2)), 4: ((4,),), 3: ((2, 1), (4,)), 2: ((2,), (4,)),
  1: ((1,), (2,), (4,)),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grouped:
  """How a matrix of small integers lies, `group_size` contracted elements of an output to a scale:

    w = scale * (code - offset) [+ minimum]    or    w = scale * (code - offset - zero)

  Attributes:
    bits: Of a code: 1 to 8 except 7.
    offset: What stands for zero.
    scale: The dtype of a scale, and of a minimum.
    parent: Whether a group has an int8 factor in its place (uint8 for minima), and PARENT elements
      have the scale that it multiplies.
    minima: Whether a group has a minimum, a zero (uint8), or none.
    float8: Codes of 8 bits that are floating-point numbers of that kind, not integers.
  """

  bits: int
  offset: int
  group_size: int
  scale: Literal["float16", "float32"]
  parent: bool = False
  minima: Literal["none", "minimum", "zero"] = "none"
  float8: Literal["none", "e4m3", "e5m2"] = "none"

  def planes(self, contracted: int) -> tuple[int, ...]:
    """Bits of each plane that a row's codes are cut into: the lowest bits are in the first. A byte of
    a plane holds codes that are apart by an equal part of the row, and every part has whole groups;
    rows for which that does not come out are kept in more bits, at worst as bytes."""
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
    """The narrowest form that has room for matrices of both, exactly; None: there is none."""
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
  """A matrix of plain numbers that are narrower than those computed with, or as wide."""

  dtype: Literal["float16", "bfloat16"]

  def matrix_bytes(self, contracted: int, output: int) -> int:
    return contracted * output * DTYPE_BYTES[self.dtype]


Form = Scales | Grouped | Plain

Forms = Mapping[str, Form]
"""What matrices are in a file, by canonical name, where that is narrow; `files.kept.stored_forms`
tells. Those with `Scales` are ternary."""


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
"""Scales by the name of a format, those of files (`weights.codecs`) too. Every one of them is two-bit
codes on the device, whatever its file holds: TQ1_0's 1.69 bits become 2.06 there."""


def capacity_for(context_length: int) -> int:
  """Cache positions allocated for a context: the next multiple of KEY_BLOCK."""
  return -(-context_length // KEY_BLOCK) * KEY_BLOCK


def kept_positions(capacity: int, window: int | None) -> int:
  """Of a cache of `capacity` positions, those kept in a layer with a window: its keys, and a call's new
  ones."""
  return capacity if window is None else min(capacity, capacity_for(window + PREFILL))
