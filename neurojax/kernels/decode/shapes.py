"""Shapes of the layers that the decode step is tested and benchmarked with."""

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
  """The widths of a layer: D model, F FFN, N query heads, K key-value heads, H head."""

  d: int
  f: int
  n: int
  k: int
  h: int
  norm_eps: float

  @property
  def g(self) -> int:
    """Query heads that share a key-value head."""
    return self.n // self.k

  def smaller(self, divisor: int) -> "Shape":
    """The same heads in a narrower layer, for tests that run the kernel in interpret mode.

    Model and FFN widths and the number of key-value heads are divided, each at least its smallest.
    The head's width and the queries that share a key stay, and with them how attention is cut.
    """
    k = max(1, self.k // divisor)
    width, ffn = (max(128, size // divisor // 128 * 128) for size in (self.d, self.f))
    return dataclasses.replace(self, d=width, f=ffn, n=k * self.g, k=k)


QWEN3_8B = Shape(4096, 12288, 32, 8, 128, 1e-6)
QWEN3_1_7B = Shape(2048, 6144, 16, 8, 128, 1e-6)
TINYLLAMA = Shape(2048, 5632, 32, 4, 64, 1e-5)

SHAPES = {
  "qwen3-8b": QWEN3_8B,
  "qwen3-1.7b": QWEN3_1_7B,
  "tinyllama-1.1b": TINYLLAMA,
}
"""Shapes by the model that has them."""
