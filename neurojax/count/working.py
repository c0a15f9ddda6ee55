"""Counts the working memory of a stage's programs: what they need beside weights and caches."""

import dataclasses
from typing import Literal

from neurojax import count
from neurojax.config import ModelConfig
from neurojax.forms import DTYPE_BYTES, KEY_BLOCK, PREFILL, Weights

DeviceKind = Literal["cuda", "cpu"]


def kind_of(device: str) -> DeviceKind:
  """The kind of a device that JAX calls `device` (`jax.Device.device_kind`)."""
  return "cpu" if device == "cpu" else "cuda"


_FLOAT = DTYPE_BYTES["float32"]
_OF_FFN = ("gate_", "up_", "down_")
_SMALL = 1 << 16
"""Bytes for buffers of fixed size: indices, counters, sums of a few numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Working:
  """Bytes of the working memory of a stage: that of its program which needs most.

  Attributes:
    base: Bytes of any stage.
    layer: Bytes that each layer adds.
    last: Bytes that the last stage adds, which draws tokens.
  """

  base: int = 0
  layer: int = 0
  last: int = 0

  def stage(self, layers: int, *, is_last: bool) -> int:
    return self.base + layers * self.layer + is_last * self.last


def working(
  config: ModelConfig,
  *,
  dtype: str,
  weights: Weights,
  capacity: int = KEY_BLOCK,
  kind: DeviceKind = "cpu",
  tokens: int = PREFILL,
) -> Working:
  """Estimate the working memory of a stage: at least what XLA allocates for its programs, and little more.

  Counted are the programs of `stage.programs` for any model, one sequence at a time. Buffers that could share
  memory are added up where XLA may keep them apart: on the architectures of the tests the estimate is 1 to
  1.7 times what XLA's memory analysis says. With T inputs, S positions in a cache, float32:

    any     activations, the greater of the FFN's and attention's: scores of a block of keys twice, queries
            and their sum; in decode, keys and values of one layer, S of them, and their scores
    dense   a copy of a layer, which the loop over layers takes out of the stack
    int8    in prefill, the matrices of attention or one of the FFN as floats; also for weights as stored
    last    logits, and the arrays that sampling makes of them, beside all else: a step draws its tokens too

  Kernels for few rows on a CPU (`kernels.rows`) read layers and caches in place and need less: they are not
  taken for granted, as a machine may have no compiler.

  XLA:CPU computes bfloat16 as float32. Up to jax 0.10 it widens all dense layers, caches and the head of a
  stage before the loop over layers; later versions take a third to a half of that, and the estimate is on the
  safe side.

  Args:
    capacity: Positions of a cache.
    kind: Kind of the device. Doubt: "cuda" is taken to be like a CPU that computes in `dtype`; fused
      programs need less.
    tokens: The longest input that is compiled.
  """
  d, f, h = config.model_dim, config.ffn_dim, config.head_dim
  heads, kv_heads = config.num_heads, config.num_kv_heads
  tokens = min(tokens, capacity)
  widens = kind == "cpu" and dtype != "float32"
  width = _FLOAT if widens else DTYPE_BYTES[dtype]
  wide = "float32" if widens else dtype
  inner = f * max(1, config.experts_per_token)
  attention = heads * (2 * KEY_BLOCK + 3 * h)
  dense_layer = count.layer_bytes(config, dtype=wide, weights="dense")
  prefill = tokens * _FLOAT * (d + h)
  decode = capacity * (2 * kv_heads * h * width + heads * _FLOAT)
  if weights == "dense":
    own = 4 * d * heads * h * width
    prefill += dense_layer + tokens * _FLOAT * max(inner, attention, 3 * inner - own // tokens // 4)
    decode += dense_layer
  elif weights in ("int8", "stored"):
    shapes = count.layer_matrices(config)
    matrices = sum(k * n for name, (k, n) in shapes.items() if not name.startswith(_OF_FFN))
    one = d * f * max(1, config.num_experts)
    ffn = one + tokens * (2 * d + 4 * inner + heads * KEY_BLOCK)
    others = matrices + tokens * (d + attention + (heads + 2 * kv_heads) * h)
    prefill += _FLOAT * max(ffn, others)
  else:
    prefill += tokens * _FLOAT * max(3 * inner, attention)
  base = max(prefill, decode) + _SMALL
  layer = 0
  if widens:
    layer = count.cache_bytes(config, 1, capacity=capacity, dtype="float32")
    layer += dense_layer if weights == "dense" else 0
  draw = 10 * config.vocab_size * _FLOAT + _SMALL
  if widens and weights == "dense":
    draw += count.head_bytes(config, dtype="float32", weights="dense")
    # The loop over tokens widens the embedding too, before it begins.
    draw += count.embedding_bytes(config, dtype="float32", weights="dense") + 8 * _SMALL
  return Working(base=base, layer=layer, last=draw)
