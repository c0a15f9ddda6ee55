"""Lists the architectures that sizing chooses from, which are the same for every fleet."""

import functools

from neurojax import count
from neurojax.config import ModelConfig

VOCAB_SIZE = 50304
"""GPT-2's 50257 padded to a multiple of 128."""

NARROWEST_FOR_128 = 2048
"""Widths from here on have heads of 128, narrower ones of 64."""

UNTIED_FROM = 4096
"""Widths from here on have an untied head, as Qwen3 and Llama 3 have it from 8 billion parameters on."""

_WIDTHS = (
  *range(256, 2048, 256),
  *range(2048, 4096, 512),
  *range(4096, 16384, 1024),
  *range(16384, 32768, 2048),
  *range(32768, 65536 + 1, 4096),
)


@functools.lru_cache(maxsize=16)
def candidates(vocab_size: int = VOCAB_SIZE, context_length: int = 2048) -> tuple[ModelConfig, ...]:
  """All candidates, in the order of their parameters.

  Valid by construction: heads of 64 or 128 whose number times width is model_dim, a whole number of
  queries per key-value head, model_dim and ffn_dim multiples of 256 (the longest scale group; the
  kernels take multiples of 64).

    1. model_dim / num_layers, the aspect, from 64 (nanochat's) to 128 (Llama 3: 128 at 8B, 102 at
       70B, 130 at 405B). Doubt: Kaplan et al., arXiv:2001.08361, figure 5, find the loss nearly flat
       over a far wider band, so deeper candidates would serve fleets of many small hosts.
    2. key-value heads: a quarter of the heads to 32 heads, then 8 (Llama 3, arXiv:2407.21783, table 3),
       and a sixteenth of the heads where that is more, as in its 405B (8 of 128).
    3. ffn_dim 8/3 model_dim, rounded up: three matrices at the cost of the classic two.
       Source: arXiv:2002.05202. Doubt: Llama 3 and Qwen3 take 3 to 3.5.
    4. rope_base 10,000 to 4096 positions, 500,000 beyond. Source: Llama 2 and 3.
  """
  found = [
    _candidate(width, layers, vocab_size, context_length)
    for width in _WIDTHS
    for layers in _depths(width)
  ]
  return tuple(sorted(found, key=lambda c: (count.parameters(c), c.num_layers)))


def _depths(width: int) -> list[int]:
  low, high = max(2, width // 128), width // 64
  step = 1 if high <= 64 else 4 if high <= 256 else 16
  return list(range(low, high + 1, step))


def _candidate(width: int, layers: int, vocab_size: int, context_length: int) -> ModelConfig:
  head_dim = 128 if width >= NARROWEST_FOR_128 else 64
  heads = width // head_dim
  kv_heads = heads // 4 if heads <= 32 else max(8, heads // 16)
  return ModelConfig(
    vocab_size=vocab_size,
    model_dim=width,
    num_layers=layers,
    num_heads=heads,
    num_kv_heads=kv_heads,
    head_dim=head_dim,
    ffn_dim=-(-8 * width // (3 * 256)) * 256,
    context_length=context_length,
    rope_base=10_000.0 if context_length <= 4096 else 500_000.0,
    rope_style="half",
    tied_embedding=width < UNTIED_FROM,
  )
