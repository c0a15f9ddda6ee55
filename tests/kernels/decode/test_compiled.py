"""The decode kernel compiled for an H200, on a machine without one."""

import re

import jax
import jax.numpy as jnp
import pytest

from neurojax.kernels.decode import triton
from neurojax.kernels.decode.weights import LayerWeights, Shape
from neurojax.ternary.array import TernaryArray
from tests.kernels import aot

pytestmark = pytest.mark.skipif(aot.why_not() is not None, reason=str(aot.why_not()))

LAYERS, VOCAB, CAPACITY = 2, 4096, 2176
QWEN3_8B = Shape(4096, 12288, 32, 8, 128, 1e-6)


def spec(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def matrix(*lead: int, n: int, k: int) -> TernaryArray:
  codes, scales = (*lead, n, k // 4), (*lead, n, k // 128)
  return TernaryArray(
    spec(*codes, dtype=jnp.uint8), spec(*scales, dtype=jnp.float16), (k, n), 1, 128, "w2a8"
  )


def test_a_step_is_one_kernel_that_writes_the_cache_in_place():
  s = QWEN3_8B
  w = LayerWeights(
    qkv=matrix(LAYERS, n=(s.n + 2 * s.k) * s.h, k=s.d),
    o=matrix(LAYERS, n=s.d, k=s.n * s.h),
    gate_up=matrix(LAYERS, n=2 * s.f, k=s.d),
    down=matrix(LAYERS, n=s.d, k=s.f),
    attn_norm=spec(LAYERS, s.d),
    ffn_norm=spec(LAYERS, s.d),
    q_norm=spec(LAYERS, s.h),
    k_norm=spec(LAYERS, s.h),
    shape=s,
  )
  cache = spec(LAYERS, 1, s.k, CAPACITY, s.h, dtype=jnp.bfloat16)

  def step(x, w, keys, values, cos, sin, position, final_norm, head):
    return triton.decode(
      x, w, keys, values, cos, sin, position, final_norm=final_norm, head=head, programs=132
    )

  compiled = aot.compile_for_h200(
    step,
    spec(s.d),
    w,
    cache,
    cache,
    spec(s.h // 2),
    spec(s.h // 2),
    spec(dtype=jnp.int32),
    spec(s.d),
    matrix(n=VOCAB, k=s.d),
    donate=(2, 3),
  )
  text = compiled.as_text()
  assert text.count("__gpu$xla.gpu.triton") == 1
  assert not re.search(r"(?:u8|f16|bf16)\[[\d,]+\]\S* copy\(", text), "weights or caches are copied"
  both = 2 * 2 * LAYERS * s.k * CAPACITY * s.h
  assert compiled.memory_analysis().alias_size_in_bytes == both
