"""Attention of one query of each row by the CPU kernel: its numbers, and bits that other rows do not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurojax.kernels.native import library
from neurojax.kernels.rows import attend as kernel
from neurojax.model.attention import Scores, attend_cache
from neurojax.model.cache import KVCache, Rows
from tests.kernels.native.built import FLAGS, build_with

pytestmark = pytest.mark.optimized
needs_kernel = pytest.mark.skipif(
  library.unavailable() is not None, reason=str(library.unavailable())
)
LAYERS, CAPACITY = 2, 384


def problem(batch: int, heads: int, group: int, width: int, dtype: str = "float32", ring=False):
  rng = np.random.default_rng(width + group)
  shape = (LAYERS, batch, heads, CAPACITY, width)
  k, v = (jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2))
  q = jnp.asarray(rng.standard_normal((batch, 1, heads * group, width)), dtype)
  return q, KVCache(k, v, is_ring=ring)


def exact(q, cache, layer, start, scores: Scores, window) -> np.ndarray:
  """float64, one row after the other."""
  k, v = (np.asarray(a, np.float64)[layer] for a in (cache.k_LPKSH, cache.v_LPKSH))
  batch, heads, capacity, width = k.shape
  scale = width**-0.5 if scores.scale is None else scores.scale
  q = np.asarray(q * jnp.asarray(scale, q.dtype), np.float64).reshape(batch, heads, -1, width)
  out = np.zeros_like(q)
  for b in range(batch):
    first = 0 if window is None else max(0, start[b] - window + 1)
    places = np.arange(first, start[b] + 1) % capacity
    s = np.einsum("kgh,ksh->kgs", q[b], k[b][:, places])
    s = s if scores.softcap is None else scores.softcap * np.tanh(s / scores.softcap)
    w = np.exp(s - s.max(-1, keepdims=True))
    out[b] = np.einsum("kgs,ksh->kgh", w / w.sum(-1, keepdims=True), v[b][:, places])
  return out.reshape(batch, 1, -1, width)


CASES = {
  "plain": (None, None, False),
  "cap": (20.0, None, False),
  "window": (None, 100, False),
  "ring": (None, 128, True),
}


@needs_kernel
@pytest.mark.parametrize(("softcap", "window", "ring"), CASES.values(), ids=CASES)
@pytest.mark.parametrize(("heads", "group", "width"), ((3, 3, 64), (1, 1, 16), (2, 5, 96)))
def test_numbers_are_those_of_float64_and_rows_are_alone(
  softcap, window, ring, heads, group, width
):
  q, cache = problem(5, heads, group, width, ring=ring)
  start = np.array([0, 383, 63, 64, 200]) if not ring else np.array([0, 1000, 383, 384, 400])
  scores = Scores(softcap=softcap)

  @jax.jit
  def run(q, cache, start):
    return attend_cache(q, cache, jnp.int32(1), Rows(start), scores=scores, window=window)

  y = np.asarray(run(q, cache, jnp.asarray(start, jnp.int32)))
  want = exact(q, cache, 1, start, scores, window)
  np.testing.assert_allclose(y, want, rtol=2e-5, atol=2e-6)
  for rows in ([0], [1, 2], [4, 3, 0], [2] * 9):
    part = KVCache(cache.k_LPKSH[:, np.array(rows)], cache.v_LPKSH[:, np.array(rows)], is_ring=ring)
    alone = run(q[np.array(rows)], part, jnp.asarray(start[rows], jnp.int32))
    np.testing.assert_array_equal(alone, y[rows])


@needs_kernel
def test_a_model_of_half_precision_has_its_own():
  q, cache = problem(3, 2, 4, 64, "bfloat16")
  start = np.array([5, 300, 77])
  y = attend_cache(q, cache, jnp.int32(0), Rows(jnp.asarray(start, jnp.int32)))
  assert y.dtype == jnp.bfloat16
  want = exact(q, cache, 0, start, Scores(), None)
  np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=2**-7, atol=2**-8)


@needs_kernel
def test_without_a_compiler_the_numbers_are_close(monkeypatch):
  q, cache = problem(2, 3, 3, 64)
  start = jnp.asarray([10, 300], jnp.int32)
  want = attend_cache(q, cache, jnp.int32(1), Rows(start))
  monkeypatch.setattr(library, "_build_once", lambda: (None, "no C++ compiler"))
  got = attend_cache(q, cache, jnp.int32(1), Rows(start))
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  with pytest.raises(NotImplementedError, match="no C\\+\\+ compiler"):
    kernel.attend(q[:, 0], cache.k_LPKSH, cache.v_LPKSH, jnp.int32(0), start)


@needs_kernel
def test_padding_gets_zeros_and_what_is_no_number_stays():
  q, cache = problem(3, 1, 2, 32)
  q = q.at[1, 0, 0, 0].set(jnp.nan)
  start = jnp.asarray([-1, 100, 100], jnp.int32)
  y = np.asarray(attend_cache(q, cache, jnp.int32(1), Rows(start)))
  assert (y[0] == 0).all() and np.isnan(y[1, 0, 0]).all()
  assert np.isfinite(y[1, 0, 1]).all() and np.isfinite(y[2]).all()


@needs_kernel
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_every_instruction_set_gives_the_same_bits(monkeypatch, tmp_path, flags):
  q, cache = problem(4, 2, 3, 80)
  start = jnp.asarray([3, 383, 64, 129], jnp.int32)
  want = np.asarray(attend_cache(q, cache, jnp.int32(1), Rows(start)))
  build_with(monkeypatch, tmp_path, flags)
  np.testing.assert_array_equal(attend_cache(q, cache, jnp.int32(1), Rows(start)), want)


@needs_kernel
def test_rows_lie_in_the_slots_that_they_name():
  """Rows may come in any order, padding may name a live slot, and a slot that is not there is no crash."""
  q, cache = problem(5, 2, 3, 32)
  start = np.array([5, 300, 77, 200, 128], np.int32)
  wanted = np.asarray(attend_cache(q, cache, jnp.int32(1), Rows(jnp.asarray(start))))
  order = np.array([3, 0, 4])
  slot = jnp.asarray([*order, 3, 3], jnp.int32)
  asked = jnp.concatenate([q[order], q[:2]])
  rows = Rows(jnp.asarray([*start[order], 9, 400]), jnp.array([1, 1, 1, 0, 0]), slot)
  found = np.asarray(attend_cache(asked, cache, jnp.int32(1), rows))
  np.testing.assert_array_equal(found[:3], wanted[order])
  assert (found[3:] == 0).all()
  far = Rows(jnp.asarray(start), slot_B=jnp.full(5, 10**6, jnp.int32))
  assert np.isfinite(np.asarray(attend_cache(q, cache, jnp.int32(1), far))).all()
