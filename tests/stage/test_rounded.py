"""Layers whose activations kernels round: the reference's numbers, and which product is chosen."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurojax.config import ModelConfig
from neurojax.kernels import norm, rounding
from neurojax.kernels.attention import triton as attention
from neurojax.kernels.gemm import triton, tuned
from neurojax.measure.speed.stage import random_model
from neurojax.stage import fused, rounded
from neurojax.stage.fused import Fused
from neurojax.stage.kernels import REFERENCE, Kernels
from neurojax.weights.ternary import TernaryArray

CONFIG = ModelConfig(
  vocab_size=256, model_dim=512, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=64,
  ffn_dim=2048, rope_style="half", norm_eps=1e-6, qk_norm=True, tied_embedding=False,
)  # fmt: skip
CAPACITY = 256
KERNELS = Kernels(device="a card", invariant=True)


@pytest.fixture(scope="module")
def model() -> Fused:
  return random_model(CONFIG, "w2a8")


@pytest.fixture
def interpreted(monkeypatch):
  """Kernels in the interpreter; products by Triton, because Mosaic's has no interpreter."""
  names = ("normalised", "gated", "rounded")
  own = {name: functools.partial(getattr(rounding, name), interpret=True) for name in names}
  monkeypatch.setattr(rounded, "_rounding", lambda: SimpleNamespace(**own))
  for module, name in (
    (triton, "matmul"), (attention, "decode"), (attention, "attend_cache"), (norm, "normalise")
  ):  # fmt: skip
    monkeypatch.setattr(module, name, functools.partial(getattr(module, name), interpret=True))
  entries = (tuned.Entry("w2a8", 64, 512, 512, "triton", {}),)
  monkeypatch.setattr(tuned, "load", lambda device: entries)


def caches(model: Fused, batch: int) -> list[jax.Array]:
  cache = model.new_cache(batch=batch, capacity=CAPACITY)
  return [jax.random.normal(jax.random.key(i), a.shape, a.dtype) for i, a in enumerate(cache)]


def step(model: Fused, rows: int, kernels: Kernels) -> list[np.ndarray]:
  tokens = jnp.arange(rows, dtype=jnp.int32) * 7
  position, slot = 100 + 3 * tokens % 50, 5 - jnp.arange(rows, dtype=jnp.int32)
  out = fused.step(model, tokens, *caches(model, 6), position, slot, kernels=kernels)
  return [np.asarray(a, np.float32) for a in out]


BY_XLA = dataclasses.replace(KERNELS, rounds=False)


def close(found, wanted, atol: float):
  for a, b in zip(found, wanted, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol * np.abs(b).max())


def test_a_step_is_that_whose_activations_xla_rounds(model: Fused, interpreted):
  """Parts of a sum are added up in another order: a level of an activation may round the other way."""
  assert rounded.parts_for(512, 2048) > 1
  found = step(model, 5, KERNELS)
  close(found, step(model, 5, BY_XLA), 0.01)
  # Queries, keys and weights of attention are bfloat16 on their way.
  close(found, step(model, 5, REFERENCE), 0.1)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_row_has_the_same_bits_in_any_number_of_rows(model: Fused, interpreted, rows: int):
  few, many = step(model, rows, KERNELS), step(model, 6, KERNELS)
  np.testing.assert_array_equal(few[0], many[0][:rows])
  for a, b in zip(few[1:], many[1:], strict=True):
    np.testing.assert_array_equal(a[:, 6 - rows :], b[:, 6 - rows :])


def test_a_prompt_is_that_whose_activations_xla_rounds(model: Fused, interpreted):
  ids, start = jnp.arange(9, dtype=jnp.int32)[None], jnp.full(1, 40, jnp.int32)

  def run(kernels: Kernels) -> list[np.ndarray]:
    x_BTD = fused.embed(model, ids)
    slot = jnp.ones(1, jnp.int32)
    kwargs = {"slot_B": slot, "kernels": kernels, "dtype": jnp.bfloat16}
    out = fused.prefill(model, x_BTD, *caches(model, 2), start, **kwargs)
    return [np.asarray(a, np.float32) for a in out]

  found = run(KERNELS)
  close(found, run(BY_XLA), 0.01)
  close(found, run(REFERENCE), 0.1)


def weight(n: int, k: int, group_size: int = 128, mode: str = "w2a8") -> TernaryArray:
  codes = jax.ShapeDtypeStruct((2, n, k // 4), jnp.uint8)
  scales = jax.ShapeDtypeStruct((2, n, k // group_size), jnp.float16)
  return TernaryArray(codes, scales, (k, n), 1, group_size, mode)


def test_parts_follow_widths_and_fill_the_device():
  for n, k in ((4096, 4096), (4096, 12288), (6144, 4096), (24576, 4096), (512, 2048)):
    parts = rounded.parts_for(n, k)
    assert k % (512 * parts) == 0
    assert parts == 1 or n // 128 * parts <= 132
  assert rounded.parts_for(4096, 4096) == rounded.parts_for(4096, 12288) == 4
  assert rounded.parts_for(24576, 4096) == 1


@pytest.mark.parametrize("m", [1, 7, 8, 20, 64, 200])
@pytest.mark.parametrize("parts", [1, 4])
def test_a_table_gives_tiles_but_no_order_of_sums(monkeypatch, m: int, parts: int):
  """Whatever a table holds, the parts of a contraction are those that were asked for."""
  tiles = {"n": 16, "m": 64, "y": 64, "split": 2, "warps": 4, "stages": 5}
  cut = {"n": 128, "m": 256, "k": 256, "warpgroups": 2, "stages": 3, "split": 8}
  for by, parameters in (("triton", {"tiles": tiles}), ("mosaic", {"cut": cut})):
    entries = (tuned.Entry("w2a8", 256, 4096, 4096, by, parameters),)
    monkeypatch.setattr(tuned, "load", lambda device, entries=entries: entries)
    chosen, arguments = rounded.choose(m, weight(4096, 4096), KERNELS, parts=parts)
    [found] = arguments.values()
    assert chosen == (by if m <= 64 else "mosaic") and found.split == parts
    if by == chosen == "mosaic":
      assert (found.k, found.stages, found.m) == (256, 3, -(-m // 8) * 8)
    elif chosen == "triton":
      assert (found.n, found.y) == (16, 64) and m <= found.m <= max(8, 2 * m)
    # Another shape has the tiles that its widths give, not those of a neighbour.
    _, arguments = rounded.choose(m, weight(2048, 4096), KERNELS, parts=parts)
    [found] = arguments.values()
    assert found.stages == 4 or found.m > 64


def test_what_kernels_round(model: Fused):
  head = model.head
  assert rounded.takes(Kernels(), head)
  assert not rounded.takes(REFERENCE, head)
  assert not rounded.takes(Kernels(rounds=False), head)
  assert not rounded.takes(Kernels(), head, dataclasses.replace(head, mode="w2a16"))
  assert not rounded.takes(Kernels(), weight(100, 256))
