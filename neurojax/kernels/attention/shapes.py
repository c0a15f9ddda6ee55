"""Shapes of attention that are tested and benchmarked."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class AttentionShape:
  """Heads of one layer."""

  name: str
  num_heads: int
  num_kv_heads: int
  head_dim: int

  @property
  def group(self) -> int:
    """Query heads that share a key-value head (G)."""
    return self.num_heads // self.num_kv_heads

  def cache_shape(self, *, layers: int, batch: int, capacity: int) -> tuple[int, ...]:
    """[L, B, K, S, H] of the keys, and of the values."""
    return (layers, batch, self.num_kv_heads, capacity, self.head_dim)


QWEN3_8B = AttentionShape("qwen3-8b", 32, 8, 128)
LLAMA32_1B = AttentionShape("llama3.2-1b", 32, 8, 64)
BITNET_2B = AttentionShape("bitnet-2b-4t", 20, 5, 128)
SMOLLM2_135M = AttentionShape("smollm2-135m", 9, 3, 64)

SHAPES = (QWEN3_8B, LLAMA32_1B, BITNET_2B, SMOLLM2_135M)
