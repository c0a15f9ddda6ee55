"""Attention kernels, interpreted on the CPU, against float64 and against properties."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurojax.kernels.attention import api, reference, triton, tuned
from neurojax.kernels.attention.tuned import Tiling
from neurojax.kernels.gemm import levels
from neurojax.model.attention import attend as model_attend
from neurojax.model.attention import attend_cache as model_attend_cache
from neurojax.model.cache import KVCache, Rows
from neurojax.model.rope import frequencies, rotate

LAYERS, LAYER, CAPACITY, BASE, EPS = 2, 1, 64, 100.0, 1e-5


@dataclasses.dataclass(frozen=True)
class Case:
  """Heads, the position of each row's new token, and what is done to queries and keys."""

  group: int
  num_kv_heads: int
  head_dim: int
  position: tuple[int, ...]
  style: str | None
  normed: bool
  tiling: Tiling

  @property
  def num_heads(self) -> int:
    return self.group * self.num_kv_heads


CASES = [
  Case(4, 2, 32, (0, 1, 15, 16, 63), "half", True, Tiling(16, splits=4)),
  Case(1, 3, 16, (62, 0, 37), "interleaved", True, Tiling(32, splits=2)),
  Case(3, 2, 64, (5, 47), "half", False, Tiling(16, splits=1)),
  Case(8, 1, 32, (31, 63, 32), None, True, Tiling(64, splits=8)),
  Case(16, 1, 16, (33,), "interleaved", False, Tiling(16, splits=2)),
]


def normal(seed: int, *shape: int, dtype=np.float32) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def arrays(case: Case, dtype=np.float16):
  """qkv, keys, values, and the keyword arguments of decode."""
  batch, width = len(case.position), case.head_dim
  qkv = normal(0, batch, (case.num_heads + 2 * case.num_kv_heads) * width)
  k, v = (
    normal(seed, LAYERS, batch, case.num_kv_heads, CAPACITY, width, dtype=dtype) for seed in (1, 2)
  )
  position = jnp.array(case.position, jnp.int32)
  kwargs = {"norm_eps": EPS}
  if case.style is not None:
    kwargs["rope_style"] = case.style
    kwargs["rotation_B2H"] = api.rotation(position, width, base=BASE, style=case.style)
  if case.normed:
    kwargs["norms"] = jnp.asarray(1 + normal(3, width) / 4), jnp.asarray(1 + normal(4, width) / 4)
  return jnp.asarray(qkv), jnp.asarray(k), jnp.asarray(v), position, kwargs


def oracle_heads(case: Case, qkv: np.ndarray, norms) -> tuple[np.ndarray, ...]:
  """Queries, keys and values of the new tokens, in float64, turned as complex numbers."""
  x = np.asarray(qkv, np.float64).reshape(len(case.position), -1, case.head_dim)
  n, k = case.num_heads, case.num_kv_heads
  parts = [x[:, :n], x[:, n : n + k], x[:, n + k :]]
  for i in range(2):
    if case.normed:
      rms = np.sqrt(np.mean(parts[i] ** 2, axis=-1, keepdims=True) + EPS)
      parts[i] = parts[i] / rms * np.asarray(norms[i], np.float64)
    if case.style is not None:
      half = case.head_dim // 2
      first, second = (
        (slice(0, half), slice(half, None))
        if case.style == "half"
        else (slice(0, None, 2), slice(1, None, 2))
      )
      angle = np.array(case.position)[:, None, None] * BASE ** (-np.arange(half) / half)
      turned = (parts[i][..., first] + 1j * parts[i][..., second]) * np.exp(1j * angle)
      parts[i] = np.empty_like(parts[i])
      parts[i][..., first], parts[i][..., second] = turned.real, turned.imag
  return tuple(parts)


def oracle_attention(q_H: np.ndarray, k_SH: np.ndarray, v_SH: np.ndarray) -> np.ndarray:
  k_SH, v_SH = np.asarray(k_SH, np.float64), np.asarray(v_SH, np.float64)
  weight_S = np.exp(k_SH @ q_H / np.sqrt(len(q_H)))
  return weight_S @ v_SH / weight_S.sum()


@pytest.mark.parametrize(
  ("case", "dtype"),
  [
    *zip(CASES, itertools.cycle([np.float16, jnp.bfloat16]), strict=False),
    (CASES[0], jnp.bfloat16),
  ],
  ids=str,
)
def test_decode_equals_float64(case: Case, dtype):
  qkv, k, v, position, kwargs = arrays(case, dtype)
  new_q, new_k, new_v = oracle_heads(case, qkv, kwargs.get("norms"))
  expected = []
  for b, p in enumerate(case.position):
    for n in range(case.num_heads):
      g = n // case.group
      keys = np.concatenate([np.asarray(k[LAYER, b, g, :p], np.float64), new_k[b, g][None]])
      values = np.concatenate([np.asarray(v[LAYER, b, g, :p], np.float64), new_v[b, g][None]])
      expected.append(oracle_attention(new_q[b, n], keys, values))
  expected = np.stack(expected).reshape(len(case.position), -1)
  unit = float(jnp.finfo(dtype).eps)
  for out, stored_k, stored_v in (
    triton.decode(qkv, k, v, LAYER, position, tiling=case.tiling, interpret=True, **kwargs),
    reference.decode(qkv, k, v, jnp.int32(LAYER), position, **kwargs),
  ):
    np.testing.assert_allclose(out, expected, atol=5 * unit)
    for stored, old, new in ((stored_k, k, new_k), (stored_v, v, new_v)):
      for b, p in enumerate(case.position):
        np.testing.assert_allclose(
          np.asarray(stored[LAYER, b, :, p], np.float64), new[b], rtol=unit, atol=unit / 8
        )
        old = old.at[LAYER, b, :, p].set(stored[LAYER, b, :, p])
      np.testing.assert_array_equal(stored, old, err_msg="another position was written")


@pytest.mark.parametrize("order", ["planes", "blocks"])
@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_what_is_merged_is_rounded(case: Case, order: str):
  """Norms of all layers in place of one's, and levels in place of floats; caches are the same."""
  qkv, k, v, position, kwargs = arrays(case)
  run = functools.partial(triton.decode, qkv, k, v, LAYER, position, interpret=True)
  if (case.num_heads * case.head_dim) % 64:
    with pytest.raises(ValueError, match="a multiple of 64"):
      run(tiling=case.tiling, order=order, **kwargs)
    return
  out, *caches = run(tiling=case.tiling, **kwargs)
  if case.normed:
    kwargs["norms"] = tuple(
      jnp.full((LAYERS, case.head_dim), 7.0).at[LAYER].set(scale) for scale in kwargs["norms"]
    )
  found, *rest = run(tiling=case.tiling, order=order, **kwargs)
  for a, b in zip(rest, caches, strict=True):
    np.testing.assert_array_equal(a, b)
  wanted = levels.quantize(out, order)
  assert (found.rows, found.order) == (len(case.position), order)
  # Runs are added up in another order: a level next to a half may go either way.
  values = [np.asarray(x.values, np.int32) for x in (found, wanted)]
  if order == "blocks":
    values = [x[: found.rows] for x in values]
  assert np.abs(values[0] - values[1]).max() <= 1 and (values[0] != values[1]).mean() < 0.01
  np.testing.assert_allclose(found.steps[: found.rows], wanted.steps[: found.rows], rtol=1e-5)


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_what_lies_past_the_end_of_a_sequence_changes_no_bit(case: Case):
  qkv, k, v, position, kwargs = arrays(case)
  past = jnp.arange(CAPACITY)[None] >= position[:, None]
  poisoned = [
    jnp.where(past[None, :, None, :, None], bad, cache)
    for bad, cache in ((jnp.nan, k), (jnp.inf, v))
  ]
  for decode in (
    lambda k, v: triton.decode(
      qkv, k, v, LAYER, position, tiling=case.tiling, interpret=True, **kwargs
    ),
    lambda k, v: reference.decode(qkv, k, v, LAYER, position, **kwargs),
  ):
    np.testing.assert_array_equal(decode(*poisoned)[0], decode(k, v)[0])


def test_any_cut_of_the_keys_gives_the_same():
  case = CASES[0]
  qkv, k, v, position, kwargs = arrays(case)
  whole, *rest = (
    triton.decode(qkv, k, v, LAYER, position, tiling=tiling, interpret=True, **kwargs)[0]
    for tiling in (Tiling(64), Tiling(16), Tiling(16, splits=2), Tiling(16, splits=8))
  )
  for out in rest:
    # float16 weights are rounded relative to another maximum.
    np.testing.assert_allclose(out, whole, atol=1e-3)


def test_a_position_outside_the_cache_is_not_stored():
  case = dataclasses.replace(CASES[0], position=(CAPACITY, -1, 3))
  qkv, k, v, position, kwargs = arrays(case)
  for _, stored_k, stored_v in (
    triton.decode(qkv, k, v, LAYER, position, tiling=case.tiling, interpret=True, **kwargs),
    reference.decode(qkv, k, v, LAYER, position, **kwargs),
  ):
    for stored, old in ((stored_k, k), (stored_v, v)):
      assert np.argwhere(np.asarray(stored != old))[:, (0, 1, 3)].tolist()[0] == [LAYER, 2, 3]
      np.testing.assert_array_equal(stored[:, :2], old[:, :2])


def test_one_query_sees_exactly_its_length():
  k, v = (jnp.asarray(normal(seed, LAYERS, 4, 2, CAPACITY, 32), jnp.bfloat16) for seed in (1, 2))
  q = jnp.asarray(normal(0, 4, 6, 32))
  length = jnp.array([0, 1, 33, CAPACITY], jnp.int32)
  out = triton.attend_one(q, k, v, LAYER, length, tiling=Tiling(16, splits=4), interpret=True)
  np.testing.assert_array_equal(out[0], 0)
  np.testing.assert_array_equal(out[1], jnp.repeat(v[LAYER, 1, :, 0], 3, axis=0))
  np.testing.assert_allclose(out, reference.attend_one(q, k, v, LAYER, length), atol=0.02)


@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("tiling", [Tiling(16, rows=16), Tiling(32, rows=64)], ids=str)
def test_a_chunk_equals_float64(group: int, tiling: Tiling):
  length, start = 13, (0, 5, CAPACITY - 13)
  q = normal(0, 3, length, 2 * group, 32)
  k, v = (normal(seed, LAYERS, 3, 2, CAPACITY, 32, dtype=np.float16) for seed in (1, 2))
  for b, s in enumerate(start):
    k[:, b, :, s + length :], v[:, b, :, s + length :] = np.nan, np.inf
  expected = np.empty_like(q)
  for b, t, n in np.ndindex(q.shape[:3]):
    seen = slice(0, start[b] + t + 1)
    keys, values = (cache[LAYER, b, n // group, seen] for cache in (k, v))
    expected[b, t, n] = oracle_attention(q[b, t, n].astype(np.float64), keys, values)
  args = (jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), LAYER, jnp.array(start, jnp.int32))
  out = triton.attend_cache(*args, tiling=tiling, interpret=True)
  np.testing.assert_allclose(out, expected, atol=5e-3)
  np.testing.assert_allclose(reference.attend_cache(*args), expected, atol=1e-5)


def test_no_query_of_a_chunk_sees_a_later_key():
  length = 9
  q = jnp.asarray(normal(0, 1, length, 4, 16))
  k, v = (jnp.asarray(normal(seed, 1, 1, 1, CAPACITY, 16), jnp.float16) for seed in (1, 2))
  start = jnp.array([20], jnp.int32)

  def run(k, v):
    return triton.attend_cache(q, k, v, 0, start, tiling=Tiling(16, rows=16), interpret=True)

  clean = run(k, v)
  changed = run(k.at[..., 24, :].add(1), v.at[..., 24, :].add(1))
  np.testing.assert_array_equal(changed[:, :4], clean[:, :4])
  assert (np.abs(np.asarray(changed - clean))[:, 4:].max(axis=(2, 3)) > 1e-4).all()


def test_the_reference_is_the_model():
  q, k, v = (jnp.asarray(normal(i, 2, 7, n, 32)) for i, n in enumerate((6, 2, 2)))
  np.testing.assert_allclose(reference.attend(q, k, v), model_attend(q, k, v), atol=1e-6)
  caches = (jnp.asarray(normal(seed, LAYERS, 2, 2, 128, 32)) for seed in (3, 4))
  cache, start = KVCache(*caches), jnp.array([0, 99], jnp.int32)
  np.testing.assert_allclose(
    reference.attend_cache(q, cache.k_LPKSH, cache.v_LPKSH, LAYER, start),
    model_attend_cache(q, cache, jnp.int32(LAYER), Rows(start)),
    atol=1e-6,
  )
  for style in ("half", "interleaved"):
    turned = reference.turn(q[:, 0], api.rotation(start, 32, base=1e4, style=style), style)
    expected = rotate(q[:, :1], start[:, None], frequencies(q.shape[-1], 1e4)[0], style=style)[:, 0]
    np.testing.assert_allclose(turned, expected, atol=1e-6)


def test_rows_of_a_prompt_shorter_than_the_batch():
  q, k, v = (jnp.asarray(normal(i, 2, 7, 2, 16)) for i in range(3))
  out = reference.attend(q, k, v.at[1, 4:].set(jnp.nan), jnp.array([7, 4], jnp.int32))
  np.testing.assert_allclose(out[1, :4], reference.attend(q, k, v)[1, :4], atol=1e-6)


def test_what_the_kernels_refuse_is_named():
  def run(width: int = 32, capacity: int = CAPACITY, dtype=jnp.bfloat16, heads: int = 4, **kwargs):
    cache = jnp.zeros((1, 1, 2, capacity, width), dtype)
    q = jnp.zeros((1, heads, width))
    return triton.attend_one(q, cache, cache, 0, jnp.ones(1, jnp.int32), **kwargs)

  for kwargs, says in (
    ({"width": 96}, "96"),
    ({"capacity": 40}, "40"),
    ({"dtype": jnp.float32}, "float32"),
  ):
    with pytest.raises(NotImplementedError, match=says):
      run(**kwargs, interpret=True)
  with pytest.raises(ValueError, match="5 query heads"):
    run(heads=5, interpret=True)
  with pytest.raises(ValueError, match="implementation = 'cudnn'"):
    cache = jnp.zeros((1, 1, 1, 16, 16))
    api.attend_cache(
      jnp.zeros((1, 1, 1, 16)), cache, cache, 0, jnp.zeros(1, jnp.int32), implementation="cudnn"
    )


def test_a_slow_way_is_taken_only_unasked_and_said_once(monkeypatch, caplog):
  k = jnp.asarray(normal(1, 1, 1, 1, 16, 24))
  q, start = jnp.asarray(normal(0, 1, 1, 1, 24)), jnp.array([3], jnp.int32)
  with pytest.raises(NotImplementedError, match="head width 24"):
    api.attend_cache(q, k, k, 0, start, implementation="triton")
  expected = api.attend_cache(q, k, k, 0, start)
  assert not caplog.messages
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  for _ in range(2):
    np.testing.assert_array_equal(api.attend_cache(q, k, k, 0, start), expected)
  assert len(caplog.messages) == 1 and "head width 24" in caplog.text


@pytest.mark.parametrize("num_kv_heads", [1, 3, 5, 8, 32])
@pytest.mark.parametrize("capacity", [16, 128, 640, 2048, 40960])
def test_tilings_fit(num_kv_heads: int, capacity: int):
  for head_dim in (64, 128, 256):
    tiling = tuned.decode_tiling(num_kv_heads, capacity, head_dim)
    assert capacity % tiling.block == 0
    assert tiling.block * tiling.splits <= capacity
    # Powers of two, and with 16 sequences a program for each multiprocessor where there are keys enough.
    assert tiling.block.bit_count() == tiling.splits.bit_count() == 1
    enough = tiling.splits == 32 or 2 * tiling.block * tiling.splits > capacity
    assert 16 * num_kv_heads * tiling.splits >= 132 or enough


def test_a_chunks_length_changes_only_how_many_rows_a_program_has():
  """A warpgroup multiplies 64 rows: with as many warps for each row, their sums have one order."""
  tilings = [tuned.prefill_tiling(length, 4, 2048, 128) for length in (2, 16, 17, 64, 2048)]
  assert {t.rows for t in tilings} == {64, 128}
  assert (
    len({dataclasses.replace(t, rows=0, num_warps=t.rows // t.num_warps) for t in tilings}) == 1
  )


SLOTS = 7
"""More than rows, and none of them row b's own in `in_slots`."""


def in_slots(case: Case, dtype=np.float16):
  """`arrays`, but rows in any order of slots; the caches hold noise wherever a row has no slot."""
  qkv, k, v, position, kwargs = arrays(case, dtype)
  slot = jnp.asarray([5, 2, 6, 0, 1][: len(case.position)], jnp.int32)
  shape = (LAYERS, SLOTS, case.num_kv_heads, CAPACITY, case.head_dim)
  wide = (jnp.asarray(normal(seed, *shape, dtype=dtype)) for seed in (8, 9))
  k, v = (noise.at[:, slot].set(cache) for noise, cache in zip(wide, (k, v), strict=True))
  return qkv, k, v, position, slot, kwargs


def runs(case: Case):
  """The two implementations of `decode`, each with one signature."""
  yield functools.partial(triton.decode, tiling=case.tiling, interpret=True)
  yield reference.decode


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_in_any_slots_are_rows_in_their_own(case: Case):
  qkv, k, v, position, kwargs = arrays(case)
  _, wide_k, wide_v, _, slot, _ = in_slots(case)
  for decode in runs(case):
    wanted = decode(qkv, k, v, LAYER, position, **kwargs)
    out, *stored = decode(qkv, wide_k, wide_v, LAYER, position, slot_B=slot, **kwargs)
    np.testing.assert_array_equal(out, wanted[0])
    for new, old, expected in zip(stored, (wide_k, wide_v), wanted[1:], strict=True):
      np.testing.assert_array_equal(new, old.at[:, slot].set(expected))


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_a_row_has_the_same_bits_alone_among_others_and_beside_padding(case: Case):
  qkv, k, v, position, slot, kwargs = in_slots(case)
  turns = kwargs.pop("rotation_B2H")

  def rows(decode, which, at=None):
    which = jnp.asarray(which)
    at = position[which] if at is None else jnp.asarray(at, jnp.int32)
    return decode(
      qkv[which], k, v, LAYER, at, slot_B=slot[which], rotation_B2H=turns[which], **kwargs
    )

  for decode in runs(case):
    # XLA multiplies a single row by other loops than several: the reference keeps its bits from two on.
    tolerance = 1e-6 if decode is reference.decode else 0
    together, stored_k, stored_v = rows(decode, range(len(case.position)))
    for b, p in enumerate(case.position):
      alone, *stored = rows(decode, [b])
      np.testing.assert_allclose(alone[0], together[b], rtol=0, atol=tolerance)
      # Rows that stand for nothing name the same slot, before and behind the row.
      padded, *padded_stored = rows(decode, [b, b, b, b], [-1, p, CAPACITY, -7])
      np.testing.assert_array_equal(padded[1], together[b])
      for one, other, both in zip(stored, padded_stored, (stored_k, stored_v), strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one[:, slot[b]], both[:, slot[b]])


def test_the_cut_of_keys_follows_the_rows_own_length():
  """Long and short rows side by side, at the cut of `decode_tiling`, merged runs included."""
  case = dataclasses.replace(CASES[3], position=(31, 63, 0), tiling=Tiling(16, splits=4))
  qkv, k, v, position, kwargs = arrays(case)
  wanted = triton.decode(qkv, k, v, LAYER, position, tiling=case.tiling, interpret=True, **kwargs)[
    0
  ]
  for b in range(3):
    row = slice(b, b + 1)
    alone = triton.decode(
      qkv[row], k[:, row], v[:, row], LAYER, position[row], tiling=case.tiling, interpret=True,
      **kwargs,
    )  # fmt: skip
    np.testing.assert_array_equal(alone[0][0], wanted[b])


@pytest.mark.parametrize("tiling", [Tiling(16, rows=16), Tiling(32, rows=64)], ids=str)
def test_a_chunk_reads_the_slot_it_names_and_any_cut_of_it_gives_the_same_bits(tiling: Tiling):
  length, start = 13, 9
  q = jnp.asarray(normal(0, 2, length, 4, 32))
  k, v = (
    jnp.asarray(normal(seed, LAYERS, 2, 2, CAPACITY, 32, dtype=np.float16)) for seed in (1, 2)
  )
  starts, slot = jnp.array([start, 40], jnp.int32), jnp.array([4, 1], jnp.int32)
  wide_k, wide_v = (jnp.full((LAYERS, 5, *c.shape[2:]), jnp.nan, c.dtype) for c in (k, v))
  wide = wide_k.at[:, slot].set(k), wide_v.at[:, slot].set(v)
  for attend in (
    functools.partial(triton.attend_cache, tiling=tiling, interpret=True),
    reference.attend_cache,
  ):
    wanted = attend(q, k, v, LAYER, starts)
    out = attend(q, *wide, LAYER, starts, slot_B=slot)
    np.testing.assert_array_equal(out, wanted)
    if attend is reference.attend_cache:
      continue
    for first, last in ((0, 2), (2, 3), (3, 13)):
      part = attend(q[:1, first:last], *wide, LAYER, starts[:1] + first, slot_B=slot[:1])
      np.testing.assert_array_equal(part[0], wanted[0, first:last])


def test_one_query_reads_the_slot_it_names():
  k, v = (jnp.asarray(normal(seed, LAYERS, 5, 2, CAPACITY, 32), jnp.bfloat16) for seed in (1, 2))
  q = jnp.asarray(normal(0, 3, 6, 32))
  length, slot = jnp.array([0, 33, CAPACITY], jnp.int32), jnp.array([4, 0, 2], jnp.int32)
  tiling = Tiling(16, splits=4)
  for attend in (
    functools.partial(triton.attend_one, tiling=tiling, interpret=True),
    reference.attend_one,
  ):
    out = attend(q, k, v, LAYER, length, slot_B=slot)
    np.testing.assert_array_equal(out, attend(q, k[:, slot], v[:, slot], LAYER, length))
