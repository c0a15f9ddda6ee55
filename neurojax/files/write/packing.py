"""Tells which ternary types of GGUF hold a matrix without any change, and packs it into one of them."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, UInt8

from neurojax.weights.codecs import CODECS, Codec

TYPES: Mapping[str, Codec] = {
  "TQ2_0": CODECS["TQ2_0"],
  "TQ1_0": CODECS["TQ1_0"],
  "Q2_0": CODECS["Q2_0 (group 64)"],
  "Q2_0_g128": CODECS["Q2_0 (group 128)"],
}
"""Ternary types by the name that a user gives. llama.cpp reads all but the last, which PrismML's fork
reads."""


def check(k: int, group_size: int | None, codec: Codec, name: str) -> None:
  """Check that a type holds ternary rows of `k` elements, `group_size` of which share a scale.

  Raises: ValueError: the type does not hold them, whatever their values; it gives the types that do.
  """
  if k % codec.block:
    fitting = [kind for kind, other in TYPES.items() if k % other.block == 0]
    instead = f"choose {' or '.join(fitting)}" if fitting else "choose F16, which has no blocks"
    raise ValueError(
      f"{name}: rows of {k} elements are no whole {codec.name} blocks of {codec.block}: {instead}"
    )
  if group_size is not None and group_size % codec.block:
    fitting = [kind for kind, other in TYPES.items() if group_size % other.block == 0]
    raise ValueError(
      f"{name}: its scales are for groups of {group_size} elements, and {codec.name} has one for every"
      f" {codec.block}: choose {' or '.join(fitting)}, or train with group_size = {codec.block}"
    )


def choose(rows: Mapping[str, tuple[int, int | None]]) -> str:
  """Choose the first of TQ2_0 and Q2_0, which llama.cpp reads, that holds all these matrices.

  Args:
    rows: By name: elements of a row, and the group size.
  Raises: ValueError: neither does.
  """
  reasons = []
  for kind in ("TQ2_0", "Q2_0"):
    try:
      for name, (k, group_size) in rows.items():
        check(k, group_size, TYPES[kind], name)
    except ValueError as error:
      reasons.append(str(error))
    else:
      return kind
  raise ValueError(reasons[-1])


def block_scales(
  scales: np.ndarray, group_size: int | None, shape: tuple[int, int], codec: Codec, where: str
) -> Float[np.ndarray, "N Q"]:
  """One float16 scale for each block of the type: the very scale of the block's group.

  Args:
    shape: Rows, and elements of a row.
  Raises: ValueError: float16 does not hold a scale; `where` names the tensor.
  """
  n, k = shape
  exact = scales.astype(np.float32)
  with np.errstate(over="ignore"):
    halves = exact.astype(np.float16)
  if (halves.astype(np.float32) != exact).any():
    row, group = np.argwhere(halves.astype(np.float32) != exact)[0]
    raise ValueError(
      f"{where}: row {row}, group {group}: the scale {exact[row, group]!r} is no float16, which is"
      f" what {codec.name} keeps: round scales to float16 in training already"
    )
  if group_size is None:
    return np.broadcast_to(halves, (n, k // codec.block))
  return np.repeat(halves, group_size // codec.block, axis=1)[:, : k // codec.block]


def pack(
  codes: UInt8[np.ndarray, "N Y"],
  scales: np.ndarray,
  group_size: int | None,
  k: int,
  codec: Codec,
  where: str,
) -> UInt8[np.ndarray, "bytes"]:
  """The bytes of ternary rows of `k` elements in a type.

  Args:
    codes: Codes in the layout of `weights.ternary`, as `WeightSource.read_ternary` gives them.
    scales: The scales beside them.
    group_size: Elements that share a scale, or None.
  Raises: ValueError: as `check` and `block_scales`; `where` names the tensor.
  """
  check(k, group_size, codec, where)
  return codec.pack(codes, block_scales(scales, group_size, (len(codes), k), codec, where))
