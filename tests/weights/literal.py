"""The ternary file formats read byte by byte, as their descriptions say, and weights to write."""

import functools

import numpy as np

from neurojax.weights.codecs import Codec


def weights(codec: Codec, rows: int, blocks: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Random -1, 0 and 1 and scales of either sign, as the codec groups them."""
  rng = np.random.default_rng(seed)
  w_NxK = rng.integers(-1, 2, (rows, blocks * codec.block)).astype(np.int8)
  grouping = (1, 1) if codec.group_size is None else (rows, blocks)
  return w_NxK, rng.standard_normal(grouping).astype(codec.scale_dtype)


@functools.cache
def digits(byte: int) -> list[int]:
  """The five base-3 digits of ceil(256 v / 243), by search rather than by arithmetic on the byte."""
  value = next(v for v in range(243) if -(-v * 256 // 243) == byte)
  return [value // 3 ** (4 - p) % 3 for p in range(5)]


def read_literally(name: str, raw: bytes, count: int) -> list[tuple[int, float]]:
  """(element, scale) of each weight, one block and one element at a time, from the descriptions."""
  found: list[tuple[int, float]] = []

  def half(at: int) -> float:
    return float(np.frombuffer(raw, "<f2", 1, at)[0])

  match name:
    case "TQ2_0":
      for at in range(0, len(raw), 66):
        for e in range(256):
          byte = raw[at + e // 128 * 32 + e % 32]
          found.append(((byte >> 2 * (e % 128 // 32) & 3) - 1, half(at + 64)))
    case "TQ1_0":
      for at in range(0, len(raw), 54):
        for e in range(256):
          if e < 160:
            byte, p = e % 32, e // 32
          elif e < 240:
            byte, p = 32 + (e - 160) % 16, (e - 160) // 16
          else:
            byte, p = 48 + (e - 240) % 4, (e - 240) // 4
          found.append((digits(raw[at + byte])[p] - 1, half(at + 52)))
    case "I2_S":
      scale = float(np.frombuffer(raw, "<f4", 1, count // 4)[0])
      for e in range(count):
        byte = raw[e // 128 * 32 + e % 32]
        found.append(((byte >> 6 - 2 * (e % 128 // 32) & 3) - 1, scale))
    case _:
      group = 64 if name == "Q2_0 (group 64)" else 128
      size = 2 + group // 4
      for at in range(0, len(raw), size):
        for e in range(group):
          found.append(((raw[at + 2 + e // 4] >> 2 * (e % 4) & 3) - 1, half(at)))
  return found
