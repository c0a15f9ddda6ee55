"""Says how two-bit codes become register operands of the Hopper matrix instruction."""

from dataclasses import dataclass

ROWS = 64
"""Output channels of one matrix instruction."""


@dataclass(frozen=True)
class Fragment:
  """How a word of 16 codes becomes registers of the matrix instruction's operand.

  Register i is `(word << shifts[i] & keep) ^ flip`: a code in the two top bits of a lane, the lower
  one flipped, is w times `unit`, as it stands. Registers i are a thread's share of successive tiles
  of columns, eight wide for bfloat16 and sixteen for int8.
  """

  keep: int
  flip: int
  unit: float
  shifts: tuple[int, ...]


FRAGMENTS = {
  2: Fragment(0xC000C000, 0x40004000, -2.0, (14, 6, 12, 4, 10, 2, 8, 0)),
  1: Fragment(0xC0C0C0C0, 0x40404040, -64.0, (6, 4, 2, 0)),
}
"""Fragments by the bytes of an element: 2 for bfloat16, 1 for int8."""
