"""Which ternary types of GGUF hold a weight without any change, and its bytes in one of them."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, UInt8

from neurojax.weights.codecs import CODECS, Codec
from neurojax.weights.ternary import TernaryArray

TYPES: Mapping[str, Codec] = {
  "TQ2_0": CODECS["TQ2_0"],
  "TQ1_0": CODECS["TQ1_0"],
  "Q2_0": CODECS["Q2_0 (group 64)"],
  "Q2_0_g128": CODECS["Q2_0 (group 128)"],
}
"""By the name that a user gives. llama.cpp reads all but the last, which PrismML's fork reads."""


def check(array: TernaryArray, codec: Codec, name: str) -> None:
  """Raises: ValueError: the type does not hold this weight as it is, whatever its values."""
  k = array.contraction.k
  if k % codec.block:
    fitting = [kind for kind, other in TYPES.items() if k % other.block == 0]
    instead = f"choose {' or '.join(fitting)}" if fitting else "choose F16, which has no blocks"
    raise ValueError(
      f"{name}: rows of {k} elements are no whole {codec.name} blocks of {codec.block}: {instead}"
    )
  group = array.group_size
  if group is not None and group % codec.block:
    fitting = [kind for kind, other in TYPES.items() if group % other.block == 0]
    raise ValueError(
      f"{name}: its scales are for groups of {group} elements, and {codec.name} has one for every"
      f" {codec.block}: choose {' or '.join(fitting)}, or train with group_size = {codec.block}"
    )


def choose(arrays: Mapping[str, TernaryArray]) -> str:
  """The first of `TYPES` that llama.cpp reads and that holds all these weights as they are.

  Raises: ValueError: none does.
  """
  reasons = []
  for kind in ("TQ2_0", "Q2_0"):
    try:
      for name, array in arrays.items():
        check(array, TYPES[kind], name)
    except ValueError as error:
      reasons.append(str(error))
    else:
      return kind
  raise ValueError(reasons[-1])


def block_scales(array: TernaryArray, codec: Codec, where: str) -> Float[np.ndarray, "N Q"]:
  """One float16 scale per block of the type, the very scale of the block's group.

  Raises: ValueError: a scale is no float16.
  """
  n, k = array.contraction.n, array.contraction.k
  scales = array.scales.astype(np.float32)
  with np.errstate(over="ignore"):
    halves = scales.astype(np.float16)
  if (halves.astype(np.float32) != scales).any():
    row, group = np.argwhere(halves.astype(np.float32) != scales)[0]
    raise ValueError(
      f"{where}: row {row}, group {group}: the scale {scales[row, group]!r} is no float16, which is"
      f" what {codec.name} keeps: round scales to float16 in training already"
    )
  if array.group_size is None:
    return np.broadcast_to(halves, (n, k // codec.block))
  return np.repeat(halves, array.group_size // codec.block, axis=1)[:, : k // codec.block]


def pack(array: TernaryArray, codec: Codec, where: str) -> UInt8[np.ndarray, "bytes"]:
  """The bytes of one weight on the host, its rows being its output channels.

  Raises: ValueError: as `check` and `block_scales`; `where` names the tensor.
  """
  check(array, codec, where)
  return codec.pack(array.codes, block_scales(array, codec, where))
