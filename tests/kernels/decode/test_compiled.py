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


# Few sequences, and caches of more than 2**32 bytes, whose offsets have 64 bits.
SIZES = [(2, 4), (8, 128)]
"""Layers and slots."""


@functools.cache
def compiled(layers: int, slots: int) -> tuple[Any, str]:
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
  cache = spec(layers, slots, s.k, CAPACITY, s.h, dtype=jnp.bfloat16)

  def step(x, w, keys, values, cos, sin, position, slot, final_norm, head):
    return triton.decode(
      x, w, keys, values, cos, sin, position,
      slot=slot, final_norm=final_norm, head=head, programs=132,
    )  # fmt: skip

  return aot.compile_to_ptx(
    step,
    spec(s.d),
    w,
    cache,
    cache,
    spec(s.h // 2),
    spec(s.h // 2),
    spec(dtype=jnp.int32),
    spec(dtype=jnp.int32),
    spec(s.d),
    matrix(n=VOCAB, k=s.d),
    kernel="ternary_decode",
    donate=(2, 3),
  )


def test_a_step_is_one_kernel_that_writes_the_cache_in_place():
  (layers, slots), s = SIZES[0], QWEN3_8B
  program, _ = compiled(layers, slots)
  text = program.as_text()
  assert text.count("__gpu$xla.gpu.triton") == 1
  assert not re.search(r"(?:u8|f16|bf16)\[[\d,]+\]\S* copy\(", text), "weights or caches are copied"
  both = 2 * 2 * layers * slots * s.k * CAPACITY * s.h
  assert program.memory_analysis().alias_size_in_bytes == both


@pytest.mark.parametrize(("layers", "slots"), SIZES)
def test_nothing_is_spilled(layers, slots):
  _, ptx = compiled(layers, slots)
  assert aot.spills(aot.assemble(ptx)) == 0


def test_a_spill_would_be_found():
  _, ptx = compiled(*SIZES[0])
  # Two blocks of 256 threads on a multiprocessor leave 128 registers a thread.
  halved, times = re.subn(r"^\.reqntid 256.*$", r"\g<0>\n.minnctapersm 2", ptx, flags=re.MULTILINE)
  assert times == 1
  assert aot.spills(aot.assemble(halved)) > 0


@pytest.mark.parametrize(("layers", "slots"), SIZES)
def test_instructions_per_weight_do_not_creep_up(layers, slots):
  _, ptx = compiled(layers, slots)
  for product, most in INSTRUCTIONS.items():
    count = aot.instructions_per_weight(ptx, product)
    assert count < most
