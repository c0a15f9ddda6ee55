"""The decode kernel compiled for an H200, on a machine without one."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from neurojax.kernels.decode import triton
from neurojax.kernels.decode.shapes import QWEN3_8B
from neurojax.kernels.decode.weights import LayerWeights
from neurojax.weights.ternary import TernaryArray
from tests.kernels import aot

pytestmark = pytest.mark.skipif(aot.why_not() is not None, reason=str(aot.why_not()))

VOCAB, CAPACITY = 4096, 2176

# A tenth more than measured with jax 0.11.2.
INSTRUCTIONS = {"dp4a.u32.s32": 1.40}
"""By product: at most so many for a weight."""


def spec(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def matrix(*lead: int, n: int, k: int) -> TernaryArray:
  codes, scales = (*lead, n, k // 4), (*lead, n, k // 128)
  return TernaryArray(
    spec(*codes, dtype=jnp.uint8), spec(*scales, dtype=jnp.float16), (k, n), 1, 128, "w2a8"
  )


@functools.cache
def compiled(layers: int) -> tuple[Any, str]:
  """The program, and the PTX of its kernel."""
  s = QWEN3_8B
  w = LayerWeights(
    qkv=matrix(layers, n=(s.n + 2 * s.k) * s.h, k=s.d),
    o=matrix(layers, n=s.d, k=s.n * s.h),
    gate_up=matrix(layers, n=2 * s.f, k=s.d),
    down=matrix(layers, n=s.d, k=s.f),
    attn_norm=spec(layers, s.d),
    ffn_norm=spec(layers, s.d),
    q_norm=spec(layers, s.h),
    k_norm=spec(layers, s.h),
    shape=s,
  )
  cache = spec(layers, 1, s.k, CAPACITY, s.h, dtype=jnp.bfloat16)

  def step(x, w, keys, values, cos, sin, position, final_norm, head):
    return triton.decode(
      x, w, keys, values, cos, sin, position, final_norm=final_norm, head=head, programs=132
    )

  return aot.compile_to_ptx(
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
    kernel="ternary_decode",
    donate=(2, 3),
  )


def test_a_step_is_one_kernel_that_writes_the_cache_in_place():
  layers, s = 2, QWEN3_8B
  program, _ = compiled(layers)
  text = program.as_text()
  assert text.count("__gpu$xla.gpu.triton") == 1
  assert not re.search(r"(?:u8|f16|bf16)\[[\d,]+\]\S* copy\(", text), "weights or caches are copied"
  both = 2 * 2 * layers * s.k * CAPACITY * s.h
  assert program.memory_analysis().alias_size_in_bytes == both


@pytest.mark.parametrize("layers", [2, 8])
def test_nothing_is_spilled(layers):
  _, ptx = compiled(layers)
  assert aot.spills(aot.assemble(ptx)) == 0


def test_a_spill_would_be_found():
  _, ptx = compiled(2)
  # Two blocks of 256 threads on a multiprocessor leave 128 registers a thread.
  halved, times = re.subn(r"^\.reqntid 256.*$", r"\g<0>\n.minnctapersm 2", ptx, flags=re.MULTILINE)
  assert times == 1
  assert aot.spills(aot.assemble(halved)) > 0


@pytest.mark.parametrize("layers", [2, 8])
def test_instructions_per_weight_do_not_creep_up(layers):
  _, ptx = compiled(layers)
  for product, most in INSTRUCTIONS.items():
    count = aot.instructions_per_weight(ptx, product)
    assert count < most
