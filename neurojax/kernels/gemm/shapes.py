"""Products that benchmarks time and tests check: the matrices of models, as they are multiplied.

Matrices that share an input are one product: q, k and v, and gate and up.
"""

from typing import NamedTuple


class Matrix(NamedTuple):
  """n output channels of k contracted elements."""

  model: str
  name: str
  n: int
  k: int

  def lower(self, n_most: int) -> "Matrix":
    """The same product with at most `n_most` channels, for tests that all of them would take too long.

    What an implementation does along k, where sums and scale groups are, stays as it is.
    """
    return self._replace(n=min(self.n, n_most))

  def __str__(self) -> str:
    return f"{self.model} {self.name} {self.n}x{self.k}"


QWEN3_8B = (
  Matrix("qwen3-8b", "qkv", 6144, 4096),
  Matrix("qwen3-8b", "o", 4096, 4096),
  Matrix("qwen3-8b", "gate_up", 24576, 4096),
  Matrix("qwen3-8b", "down", 4096, 12288),
  Matrix("qwen3-8b", "head", 151936, 4096),
)
"""What `neurojax bench gemm` measures on a GPU."""

TINYLLAMA = (
  Matrix("tinyllama-1.1b", "qkv", 2560, 2048),
  Matrix("tinyllama-1.1b", "o", 2048, 2048),
  Matrix("tinyllama-1.1b", "gate_up", 11264, 2048),
  Matrix("tinyllama-1.1b", "down", 2048, 5632),
  Matrix("tinyllama-1.1b", "head", 32000, 2048),
)

SMALL = tuple(m for m in TINYLLAMA if m.name in ("o", "down"))
"""What `neurojax bench gemm` measures on a CPU."""

SHAPES = (
  *QWEN3_8B,
  *TINYLLAMA,
  Matrix("bitnet-2b4t", "qkv", 3840, 2560),
  Matrix("bitnet-2b4t", "o", 2560, 2560),
  Matrix("bitnet-2b4t", "gate_up", 13824, 2560),
  Matrix("bitnet-2b4t", "down", 2560, 6912),
  Matrix("smollm2-135m", "qkv", 960, 576),
  Matrix("smollm2-135m", "o", 576, 576),
  Matrix("smollm2-135m", "gate_up", 3072, 576),
  Matrix("smollm2-135m", "down", 576, 1536),
  Matrix("smollm2-135m", "head", 49152, 576),
)
"""All of them: tests take every one, benchmarks some."""

ODD = ((1, 1, 1), (2, 3, 130), (7, 17, 63), (17, 65, 500), (64, 130, 513), (300, 33, 192))
"""Further (m, n, k), for tests: no tile divides them."""
