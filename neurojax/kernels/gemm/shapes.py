"""Products that tests check and benchmarks time: the matrices of models, and numbers of rows."""

from typing import NamedTuple

ROWS = {"decode": (1, 8), "batch": (16, 64), "prefill": (256, 1024)}
"""Rows of activations at once: tokens of one sequence, of many, and of prompts."""


class Matrix(NamedTuple):
  """n output channels of k contracted elements, and how often a token passes such a matrix."""

  name: str
  n: int
  k: int
  count: int


MODELS: dict[str, tuple[Matrix, ...]] = {
  "smollm2-135m": (
    Matrix("q, o", 576, 576, 60),
    Matrix("k, v", 192, 576, 60),
    Matrix("gate, up", 1536, 576, 60),
    Matrix("down", 576, 1536, 30),
    Matrix("head", 49152, 576, 1),
  ),
  "tinyllama-1.1b": (
    Matrix("q, o", 2048, 2048, 44),
    Matrix("k, v", 256, 2048, 44),
    Matrix("gate, up", 5632, 2048, 44),
    Matrix("down", 2048, 5632, 22),
    Matrix("head", 32000, 2048, 1),
  ),
  "bitnet-2b4t": (
    Matrix("q, o", 2560, 2560, 60),
    Matrix("k, v", 640, 2560, 60),
    Matrix("gate, up", 6912, 2560, 60),
    Matrix("down", 2560, 6912, 30),
  ),
  "qwen3-8b": (
    Matrix("q, o", 4096, 4096, 72),
    Matrix("k, v", 1024, 4096, 72),
    Matrix("gate, up", 12288, 4096, 72),
    Matrix("down", 4096, 12288, 36),
    Matrix("head", 151936, 4096, 1),
  ),
}

ODD = ((1, 1, 1), (2, 3, 130), (7, 17, 63), (17, 65, 500), (64, 130, 513), (300, 33, 192))
"""(m, n, k) that no tile divides."""
