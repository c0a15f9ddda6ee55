"""The fused programs of two layers of an 8B model compiled for an H200, on a machine without one."""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurojax.config import ModelConfig
from neurojax.kernels.gemm import tuned
from neurojax.measure.speed.stage import random_model
from neurojax.model.cache import KVCache, Rows
from neurojax.stage import fused
from neurojax.stage.kernels import Kernels
from neurojax.stage.programs import FusedPrograms
from tests.kernels import aot

REASON = aot.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

CONFIG = ModelConfig.load(Path(__file__).parents[2] / "configs" / "model" / "bonsai-8b.toml")
LAYERS, CAPACITY = 2, 2304


@functools.cache
def model(mode: str) -> fused.Fused:
  """Shapes in place of arrays."""
  config = dataclasses.replace(CONFIG, num_layers=LAYERS)
  return jax.eval_shape(lambda: random_model(config, mode))


def caches(batch: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
  shape = (LAYERS, batch, CONFIG.num_kv_heads, CAPACITY, CONFIG.head_dim)
  return (jax.ShapeDtypeStruct(shape, jnp.bfloat16),) * 2


def ints(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def copied(text: str) -> list[str]:
  """Copies, and slices that are copies, of codes or of a cache."""
  wide = r"(?:u8|s8)\[[\d,]{9,}\]|bf16\[\d+,\d+,8,2304,128\]"
  return re.findall(rf"^.* = (?:{wide})\S* (?:copy|dynamic-slice|slice)\(.*$", text, re.MULTILINE)


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("mode", ["w2a8", "w2a16"])
def test_a_step_of_64_sequences(mode: str, unroll: bool):
  step = functools.partial(fused.step, kernels=Kernels(unroll=unroll))
  keys, values = caches(64)
  compiled = aot.compile_for_h200(
    step, model(mode), ints(64), keys, values, ints(64), donate=(2, 3)
  )
  text, memory = compiled.as_text(), compiled.memory_analysis()
  assert "mosaic_gpu" in text
  assert copied(text) == []
  assert memory.alias_size_in_bytes == 2 * 2 * keys.size
  codes = model(mode).layers.gate_up.codes
  assert memory.temp_size_in_bytes < codes.size // LAYERS


@pytest.mark.parametrize("mode", ["w2a8", "w2a16"])
def test_a_step_where_a_table_prefers_triton_for_some_shapes(mode: str, monkeypatch, tmp_path):
  entries = [
    tuned.Entry(mode, 64, CONFIG.model_dim, CONFIG.ffn_dim, "triton", {}),
    tuned.Entry(mode, 64, 2 * CONFIG.ffn_dim, CONFIG.model_dim, "mosaic", {}),
  ]
  monkeypatch.setattr(tuned, "load", lambda device: entries if device == "some GPU" else ())
  step = functools.partial(fused.step, kernels=Kernels(device="some GPU"))
  keys, values = caches(64)
  compiled = aot.compile_for_h200(
    step, model(mode), ints(64), keys, values, ints(64), donate=(2, 3)
  )
  text = compiled.as_text()
  assert "mosaic_gpu" in text and "ternary_dot" in text
  assert copied(text) == []


SLOTS = 64


def copied_caches(text: str) -> list[str]:
  """Whatever makes another array of the shape of all slots, but views and what writes in place."""
  free = "parameter|get-tuple-element|tuple|bitcast|custom-call|while|dynamic-update-slice|fusion"
  wide = rf"bf16\[{LAYERS},{SLOTS},8,{CAPACITY},128\]"
  return re.findall(rf"^.* = {wide}\S* (?!(?:{free})\()[\w-]+\(.*$", text, re.MULTILINE)


@pytest.mark.parametrize(
  ("batch", "kernels"),
  [
    (1, Kernels(programs=132)),
    (8, Kernels(device="NVIDIA H200")),
    (8, Kernels(device="NVIDIA H200", invariant=True)),
  ],
  ids=["the kernel for a token", "a batch", "a batch, invariant"],
)
def test_a_loop_over_tokens_leaves_the_caches_of_all_slots_where_they_are(batch, kernels):
  """Rows of few of the slots: nothing of a cache's size is allocated beside the caches."""

  def loop(model, tokens, keys, values, position, slot):
    return fused.generate(
      model, tokens, keys, values, position, slot_B=slot, steps=8, kernels=kernels
    )

  keys, values = caches(SLOTS)
  compiled = aot.compile_for_h200(
    loop, model("w2a8"), ints(batch), keys, values, ints(batch), ints(batch), donate=(2, 3)
  )
  text, memory = compiled.as_text(), compiled.memory_analysis()
  assert copied(text) == copied_caches(text) == []
  assert memory.alias_size_in_bytes == 2 * 2 * keys.size
  # Logits and the like: less than half of one cache.
  assert memory.temp_size_in_bytes < keys.size
  assert ("norm_levels" in text) == (batch > 1)


@pytest.mark.parametrize("invariant", [False, True])
def test_a_chunk_is_written_into_its_slot(invariant: bool):
  def chunk(model, tokens, keys, values, start, slot):
    x_BTD = fused.embed(model, tokens)
    kernels = Kernels(device="NVIDIA H200", invariant=invariant)
    return fused.prefill(model, x_BTD, keys, values, start, slot, kernels=kernels)

  keys, values = caches(SLOTS)
  compiled = aot.compile_for_h200(
    chunk, model("w2a8"), ints(1, 256), keys, values, ints(1), ints(1), donate=(2, 3)
  )
  text, memory = compiled.as_text(), compiled.memory_analysis()
  assert copied(text) == copied_caches(text) == []
  assert memory.alias_size_in_bytes == 2 * 2 * keys.size
  # A weight that is written out is less than half of one cache.
  assert memory.temp_size_in_bytes < keys.size


@pytest.mark.parametrize("length", [1, 256])
@pytest.mark.parametrize("mode", ["w2a8", "w2a16"])
def test_a_stage_of_middle_layers(mode: str, length: int):
  """Activations in, activations out: a token in one kernel if its activations are rounded."""
  span = dataclasses.replace(model(mode), embedding=None, final_norm=None, head=None)
  programs = FusedPrograms(span, Kernels(programs=132), np.dtype(jnp.bfloat16))
  x_BTD = jax.ShapeDtypeStruct((1, length, CONFIG.model_dim), jnp.float32)
  keys, values = caches(1)
  compiled = aot.compile_for_h200(
    programs.forward, span, x_BTD, KVCache(keys, values), Rows(ints(1)), donate=(2,)
  )
  text = compiled.as_text()
  is_one_kernel = (mode, length) == ("w2a8", 1)
  assert ("ternary_decode" in text, "mosaic_gpu" in text) == (is_one_kernel, not is_one_kernel)
  assert copied(text) == []
  assert compiled.memory_analysis().alias_size_in_bytes == 2 * 2 * keys.size


def test_a_token_is_drawn_after_the_last_layer():
  programs = FusedPrograms(model("w2a8"), Kernels(programs=132), np.dtype(jnp.bfloat16))
  x_BTD = jax.ShapeDtypeStruct((1, 1, CONFIG.model_dim), jnp.float32)
  text = aot.compile_for_h200(programs.logits, model("w2a8"), x_BTD).as_text()
  assert "mosaic_gpu" in text and copied(text) == []


@pytest.mark.parametrize("product", ["mosaic", "dense"])
def test_a_prompt_of_2048_tokens(product: str):
  def prompt(model, tokens, keys, values):
    kernels = Kernels(product)
    x, keys, values = fused.prefill(
      model, fused.embed(model, tokens), keys, values, kernels=kernels
    )
    return fused.logits(model, x[:, -1], kernels=kernels), keys, values

  keys, values = caches(1)
  compiled = aot.compile_for_h200(
    prompt, model("w2a16"), ints(1, 2048), keys, values, donate=(2, 3)
  )
  text = compiled.as_text()
  assert "cudnn$fmha" in text
  assert copied(text) == []
  assert compiled.memory_analysis().alias_size_in_bytes == 2 * 2 * keys.size


def test_a_copy_of_a_cache_would_be_found():
  keys, _ = caches(SLOTS)
  text = aot.compile_for_h200(lambda keys: (keys, keys + 1), keys).as_text()
  assert copied(text) or copied_caches(text), text


def test_a_copy_would_be_found():
  def copy(codes):
    return jax.lax.dynamic_index_in_dim(codes, 1) * jnp.uint8(1), codes

  codes = model("w2a8").layers.gate_up.codes
  text = aot.compile_for_h200(copy, codes).as_text()
  assert copied(text), text
