"""The decode kernel in interpret mode, by a single program, against float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurojax.kernels.decode import triton, tuned
from neurojax.kernels.decode.shapes import Shape
from neurojax.kernels.decode.weights import fuse_rows
from tests.kernels.decode import oracle


@dataclasses.dataclass(frozen=True)
class Case:
  shape: Shape
  position: int
  capacity: int
  layers: int = 2
  group: int = 64
  vocab: int = 77
  qk_norm: bool = True
  least: int = 64
  """Keys of a share at least."""
  ahead: int = 0
  """Bytes of codes that are read ahead. The more, the more units are written out, and compiled."""


def decode(*args, **kwargs):
  return jax.jit(functools.partial(triton.decode, programs=1, interpret=True))(*args, **kwargs)


CASES = {
  "grouped queries, several blocks of keys": Case(
    Shape(128, 256, 4, 2, 32, 1e-6), 70, 128, ahead=tuned.AHEAD_BYTES
  ),
  "the first token, ragged width, no qk-norm": Case(
    Shape(192, 320, 4, 1, 64, 1e-5), 0, 192, qk_norm=False
  ),
  "the last position, more than one tile": Case(
    Shape(256, 2560, 8, 2, 32, 1e-6), 127, 128, layers=1, group=128, vocab=130, ahead=1 << 14
  ),
  "three shares of keys, the last one shorter": Case(
    Shape(128, 256, 4, 2, 32, 1e-6), 70, 128, layers=1, least=16
  ),
  "three whole shares of keys": Case(Shape(128, 256, 4, 2, 32, 1e-6), 96, 128, layers=1, least=16),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_step_equals_float64(case: Case, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(tuned, "LEAST_KEYS", case.least)
  monkeypatch.setattr(tuned, "AHEAD_BYTES", case.ahead)
  monkeypatch.setattr(tuned, "AHEAD_QKV_BYTES", case.ahead)
  s = case.shape
  w = oracle.weights(s, layers=case.layers, group=case.group, qk_norm=case.qk_norm, seed=1)
  rng = np.random.default_rng(2)
  head = oracle.matrix(rng, n=case.vocab, k=s.d, group=case.group)
  final_norm = rng.normal(1, 0.1, s.d).astype(np.float32)
  x = rng.normal(size=s.d).astype(np.float32)
  cache = rng.normal(size=(2, case.layers, 1, s.k, case.capacity, s.h)).astype(np.float32)
  angle = case.position * 1e4 ** (-np.arange(0, s.h, 2) / s.h)
  cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
  expected = oracle.step(x, w, *cache, cos, sin, case.position, final_norm, head)
  # What lies behind the position must not matter.
  cache[:, :, :, :, case.position + 1 :] = np.nan
  w, head = jax.tree.map(jnp.asarray, (w, head))
  got = decode(
    jnp.asarray(x),
    w,
    *jnp.asarray(cache),
    jnp.asarray(cos),
    jnp.asarray(sin),
    jnp.int32(case.position),
    final_norm=jnp.asarray(final_norm),
    head=head,
  )
  for name, a, b in zip(("x", "logits"), got[:2], expected[:2], strict=True):
    error = np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
    assert error < 2e-6, f"{name} is off by {error}"
  for a, b in zip(got[2:], expected[2:], strict=True):
    seen = np.s_[:, :, :, : case.position + 1]
    np.testing.assert_allclose(np.asarray(a)[seen], b[seen], atol=2e-5)
    assert np.isnan(np.asarray(a)[:, :, :, case.position + 1 :]).all()


def test_a_sequence_in_any_slot_is_that_sequence(nothing_ahead):
  s, slot, capacity, position = Shape(128, 256, 4, 2, 32, 1e-6), 2, 128, 70
  w = oracle.weights(s, layers=2, group=64, qk_norm=True, seed=1)
  w = jax.tree.map(jnp.asarray, w)
  rng = np.random.default_rng(2)
  x = jnp.asarray(rng.normal(size=s.d), jnp.float32)
  alone = jnp.asarray(rng.normal(size=(2, 2, 1, s.k, capacity, s.h)), jnp.float32)
  others = jnp.full((2, 2, 4, *alone.shape[3:]), jnp.nan, jnp.float32)
  turn = jnp.asarray(rng.normal(size=(2, s.h // 2)), jnp.float32)
  wanted = decode(x, w, *alone, *turn, jnp.int32(position))
  among = others.at[:, :, slot].set(alone[:, :, 0])
  found = decode(x, w, *among, *turn, jnp.int32(position), slot=jnp.int32(slot))
  np.testing.assert_array_equal(found[0], wanted[0])
  for new, old, expected in zip(found[2:], among, wanted[2:], strict=True):
    np.testing.assert_array_equal(new, old.at[:, slot].set(expected[:, 0]))


def test_what_does_not_fit_is_named():
  s = Shape(128, 256, 4, 2, 32, 1e-6)
  w = oracle.weights(s, layers=1, group=64, qk_norm=False, seed=0)
  assert triton.why_not(w, 128, 132) is None
  wide = dataclasses.replace(w, shape=dataclasses.replace(s, d=5120))
  assert "5120" in triton.why_not(wide, 128, 132)
  odd = dataclasses.replace(w, shape=dataclasses.replace(s, h=48))
  assert "48" in triton.why_not(odd, 128, 132)
  floats = dataclasses.replace(w, o=dataclasses.replace(w.o, mode="w2a16"))
  assert "w2a16" in triton.why_not(floats, 128, 132)
  assert "positions" in triton.why_not(w, 2**26, 132)


def test_rows_are_fused_in_order_and_only_if_alike():
  rng = np.random.default_rng(0)
  parts = [oracle.matrix(rng, 2, n=n, k=128, group=64) for n in (3, 5)]
  fused = fuse_rows(*parts)
  assert fused.shape == (2, 128, 8)
  np.testing.assert_array_equal(
    oracle.dense(fused), np.concatenate([oracle.dense(p) for p in parts], axis=1)
  )
  whole = [
    dataclasses.replace(p, scales=np.full((2, 1, 1), 0.5, np.float32), group_size=None)
    for p in parts
  ]
  assert set(np.unique(oracle.dense(fuse_rows(*whole)))) == {-0.5, 0.0, 0.5}
  with pytest.raises(ValueError, match="group_size"):
    fuse_rows(parts[0], oracle.matrix(rng, 2, n=3, k=128, group=128))


def test_a_nan_comes_out_at_the_end(nothing_ahead):
  s = Shape(128, 256, 4, 2, 32, 1e-6)
  given = oracle.weights(s, layers=1, group=64, qk_norm=False, seed=1)
  cache = jnp.zeros((1, 1, s.k, 128, s.h))
  turn = jnp.ones(s.h // 2)
  run = jax.jit(
    lambda w: triton.decode(
      jnp.ones(s.d), w, cache, cache, turn, turn, jnp.int32(0), programs=1, interpret=True
    )[0]
  )
  assert np.isfinite(run(jax.tree.map(jnp.asarray, given))).all()
  for name in ("qkv", "o", "gate_up", "down"):
    scales = np.array(getattr(given, name).scales)
    scales[0, 3, 1] = np.nan
    w = dataclasses.replace(
      given, **{name: dataclasses.replace(getattr(given, name), scales=scales)}
    )
    assert not np.isfinite(run(jax.tree.map(jnp.asarray, w))).all(), name


def test_several_programs_need_a_gpu():
  s = Shape(128, 256, 4, 2, 32, 1e-6)
  w = oracle.weights(s, layers=1, group=64, qk_norm=False, seed=1)
  cache = jnp.zeros((1, 1, s.k, 128, s.h))
  turn = jnp.ones(s.h // 2)
  with pytest.raises(NotImplementedError, match="2 programs"):
    triton.decode(
      jnp.ones(s.d), w, cache, cache, turn, turn, jnp.int32(0), programs=2, interpret=True
    )
