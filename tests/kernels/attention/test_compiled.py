"""The kernels compiled for an H200, on a machine without one."""

import functools

import jax
import jax.numpy as jnp
import pytest

from neurojax.kernels.attention import api, triton
from neurojax.kernels.attention.shapes import QWEN3_8B, SHAPES, AttentionShape
from tests.kernels import aot

REASON = aot.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

LAYERS, SLOTS, CAPACITY = 4, 64, 2048
BF16 = jnp.bfloat16

compile_without_spills = functools.partial(
  aot.compile_for_h200, options={"xla_gpu_fail_ptx_compilation_on_register_spilling": True}
)


def abstract(*shape: int, dtype=BF16) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def caches(shape: AttentionShape) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
  cache = abstract(*shape.cache_shape(layers=LAYERS, batch=SLOTS, capacity=CAPACITY))
  return cache, cache


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_decode_is_two_kernels_a_layer_and_the_cache_stays_where_it_is(shape, batch):
  width = shape.head_dim

  def step(qkv, k, v, position, slot, scale_q, scale_k):
    rotation = api.rotation(position, width, base=1e6, style="half")
    outs = []
    for layer in range(2):
      out, k, v = api.decode(
        qkv, k, v, layer, position,
        slot_B=slot, rotation_B2H=rotation, norms=(scale_q, scale_k), implementation="triton",
      )  # fmt: skip
      outs.append(out)
    return outs, k, v

  k, v = caches(shape)
  compiled = compile_without_spills(
    step,
    abstract(batch, (shape.num_heads + 2 * shape.num_kv_heads) * width),
    k, v, *[abstract(batch, dtype=jnp.int32)] * 2, abstract(width), abstract(width),
    donate=(1, 2),
  )  # fmt: skip
  text, memory = compiled.as_text(), compiled.memory_analysis()
  assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 4
  assert text.count(" copy(") == 0
  assert memory.alias_size_in_bytes == 2 * 2 * k.size
  # Angles and the averages of runs: far less than one layer's keys.
  assert memory.temp_size_in_bytes < 2 * k.size / LAYERS / 4


@pytest.mark.parametrize(
  ("shape", "length"), [(QWEN3_8B, 2), (QWEN3_8B, 64), *((shape, 512) for shape in SHAPES)]
)
def test_a_chunk_compiles(shape, length):
  def attend(q, k, v, layer, start_B, slot_B):
    return api.attend_cache(q, k, v, layer, start_B, slot_B=slot_B, implementation="triton")

  compiled = compile_without_spills(
    attend,
    abstract(1, length, shape.num_heads, shape.head_dim),
    *caches(shape),
    abstract(dtype=jnp.int32),
    abstract(1, dtype=jnp.int32),
    abstract(1, dtype=jnp.int32),
  )
  assert compiled.memory_analysis().temp_size_in_bytes == 0


def test_whole_prompts_take_cudnn():
  q, k = (abstract(2, 512, n, 128) for n in (QWEN3_8B.num_heads, QWEN3_8B.num_kv_heads))
  attend = functools.partial(api.attend, implementation="cudnn")
  compiled = compile_without_spills(attend, q, k, k, abstract(2, dtype=jnp.int32))
  assert "cudnn$fmha" in compiled.as_text()


def test_a_spill_would_be_an_error():
  attend = functools.partial(
    triton.attend_cache, tiling=triton.Tiling(128, rows=128, num_warps=4, num_stages=2)
  )
  q = abstract(1, 512, QWEN3_8B.num_heads, QWEN3_8B.head_dim)
  layer, start_B = abstract(dtype=jnp.int32), abstract(1, dtype=jnp.int32)
  with pytest.raises(jax.errors.JaxRuntimeError, match="spill"):
    compile_without_spills(attend, q, *caches(QWEN3_8B), layer, start_B)
