"""How the attention kernels are cut: estimates, checked by a few timings on an H200.

No result depends on them but for the order of sums, and that does not follow the number of rows.
"""

import dataclasses
import math

from neurojax.kernels import gpus

LEAST_ROWS = 16
"""Rows and columns of the smallest product that tensor cores do; fewer query heads are padded."""


@dataclasses.dataclass(frozen=True)
class Tiling:
  """How a kernel is cut. All numbers are powers of two, except num_stages.

  Attributes:
    block: Keys per step; divides the capacity.
    splits: Runs that the keys of one sequence are cut into; decode only.
    rows: Queries (heads times positions) per program; prefill only.
    num_stages: Depth of the software pipeline that fetches blocks ahead.
  """

  block: int
  splits: int = 1
  rows: int = LEAST_ROWS
  num_warps: int = 4
  num_stages: int = 3


_SEQUENCES = 16
"""Sequences that decode is cut for: whatever their number is, the cut must be the same."""


def decode_tiling(num_kv_heads: int, capacity: int, head_dim: int) -> Tiling:
  """Cut decode into programs enough to fill the GPU a few times over, yet few averages to merge.

  The cut orders a row's sums, so it does not follow the number of rows. Runs without keys store and
  merge nothing: with many rows, too many runs cost little. With a single row there are fewer
  programs than multiprocessors may want; one sequence has the kernel for a token.
  """
  block = _block(capacity, head_dim)
  wanted = 8 * gpus.MULTIPROCESSORS // (_SEQUENCES * num_kv_heads)
  return Tiling(block, splits=_floor_power_of_two(min(wanted, 32, capacity // block)))


def prefill_tiling(length: int, group: int, capacity: int, head_dim: int) -> Tiling:
  """Cut a chunk into programs of 128 rows and two warpgroups, or one of 64 for few queries.

  Not fewer: each warpgroup then multiplies by the same instruction, and a row's sums have one order
  in a chunk of any length.
  """
  rows = 64 if length * group <= 64 else 128
  return Tiling(_block(capacity, head_dim), rows=rows, num_warps=rows // 16)


def _block(capacity: int, head_dim: int) -> int:
  return math.gcd(capacity, 64 if head_dim <= 128 else 32)


def _floor_power_of_two(x: int) -> int:
  return 1 << max(0, x.bit_length() - 1)
