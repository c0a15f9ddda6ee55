"""Rounding to ternary weights, and packing those that are."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurojax.weights import quantize
from neurojax.weights.quantize import absmean, exact, pack_rows, unpack_rows

CASES = [
  ((100, 6), 1),
  ((4, 40, 5), 2),
  ((5, 130), -1),
  ((64, 3, 2), 1),
]
groups = pytest.mark.parametrize("group_size", [None, 64, 128])
cases = pytest.mark.parametrize(("shape", "axes"), CASES)


def normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def grouped(w: np.ndarray, axes: int, group_size: int | None) -> list[np.ndarray]:
  """The elements of each group, row by row."""
  k = math.prod(w.shape[:axes]) if axes > 0 else math.prod(w.shape[axes:])
  rows = w.reshape(k, -1).T if axes > 0 else w.reshape(-1, k)
  if group_size is None:
    return [rows.ravel()]
  return [row[at : at + group_size] for row in rows for at in range(0, k, group_size)]


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 7), k=st.integers(1, 200), seed=st.integers(0, 999))
def test_rows_pack_and_unpack(n: int, k: int, seed: int):
  w_NxK = np.random.default_rng(seed).integers(-1, 2, (n, k)).astype(np.int8)
  codes = pack_rows(w_NxK)
  assert codes.shape == (n, 16 * -(-k // 64))
  np.testing.assert_array_equal(unpack_rows(codes, k), w_NxK)
  for row in range(n):
    for at in range(codes.shape[1] * 4):
      code = codes[row, at // 4] >> 2 * (at % 4) & 3
      assert code == (w_NxK[row, at] + 1 if at < k else 1)


@groups
@cases
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_absmean_is_the_papers_in_each_group(shape, axes, group_size, dtype, monkeypatch):
  monkeypatch.setattr(quantize, "_CHUNK_ELEMENTS", 300)
  w = normal(shape)
  array = absmean(w, axes, group_size=group_size, scale_dtype=dtype)
  assert array.shape == shape and array.scales.dtype == dtype
  for values, rounded, scale in zip(
    grouped(w, axes, group_size),
    grouped(np.asarray(array.dequantize()), axes, group_size),
    np.asarray(array.scales).ravel(),
    strict=True,
  ):
    assert scale == np.abs(values).astype(np.float64).mean().astype(jnp.dtype(dtype))
    s = np.float32(scale)
    np.testing.assert_array_equal(rounded, np.clip(np.rint(values / s), -1, 1) * s)


@groups
@cases
def test_a_ternary_weight_is_packed_without_any_change(shape, axes, group_size, monkeypatch):
  monkeypatch.setattr(quantize, "_CHUNK_ELEMENTS", 300)
  rounded = absmean(normal(shape), axes, group_size=group_size, mode="w2a8")
  weight = np.asarray(rounded.dequantize())
  again = exact(weight, axes, group_size=group_size, mode="w2a8")
  assert again.mode == "w2a8"
  np.testing.assert_array_equal(again.dequantize(), weight)
  np.testing.assert_array_equal(again.codes, rounded.codes)


def test_groups_of_zeros_have_the_scale_zero():
  w = np.zeros((128, 2), np.float32)
  w[64:, 1] = 0.5
  for convert in (absmean, exact):
    array = convert(w, 1, group_size=64)
    np.testing.assert_array_equal(array.scales, [[0, 0], [0, 0.5]])
    np.testing.assert_array_equal(array.dequantize(), w)


@pytest.mark.parametrize("group_size", [None, 64])
def test_other_values_are_refused_where_they_are(group_size):
  w = np.where(normal((3, 130)) > 0, np.float32(0.25), -np.float32(0.25))
  exact(w, -1, group_size=group_size)
  w[2, 70] = 0.125
  with pytest.raises(ValueError, match=r"row 2, element 70: .*0\.125.* absmean"):
    exact(w, -1, group_size=group_size)
  w[2, 70] = np.float32(0.1)
  w[2, 64:] = np.where(w[2, 64:] > 0, w[2, 70], -w[2, 70])
  with pytest.raises(ValueError, match=r"scale_dtype='float32'" if group_size else "absmean"):
    exact(w, -1, group_size=group_size)
  if group_size:
    array = exact(w, -1, group_size=group_size, scale_dtype="float32")
    np.testing.assert_array_equal(array.dequantize(), w)


@groups
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(group_size, bad):
  w = normal((130, 3))
  w[100, 2] = bad
  for convert in (absmean, exact):
    with pytest.raises(ValueError, match="not finite"):
      convert(w, 1, group_size=group_size)


def test_scales_beyond_their_dtype_are_refused():
  w = np.full((64, 1), 1e6, np.float32)
  for convert in (absmean, exact):
    with pytest.raises(
      ValueError, match=r"row 0, group 0: .*1e\+06 is beyond float16: .*'float32'"
    ):
      convert(w, 1)
    np.testing.assert_array_equal(convert(w, 1, scale_dtype="float32").dequantize(), w)


@pytest.mark.parametrize("scale", [1e-9, 3e-8, 7e-6])
def test_scales_that_would_lose_their_bits_are_refused(scale):
  w = np.ones((128, 2), np.float32)
  w[64:, 1] = scale
  with pytest.raises(
    ValueError, match=rf"row 1, group 1: .*{scale:g} is too small for float16.*'float32'"
  ):
    absmean(w, 1, group_size=64)
  with pytest.raises(ValueError, match=r"row 1, group 1: .*'float32'"):
    exact(w, 1, group_size=64)
  for convert in (absmean, exact):
    packed = convert(w, 1, group_size=64, scale_dtype="float32")
    np.testing.assert_array_equal(packed.dequantize(), w)


def test_scales_at_the_edge_of_their_dtype():
  # Below 2**-17 a rounded float16 loses bits; a power of two is exact down to 2**-24.
  assert absmean(np.full((64, 1), 2.0**-17, np.float32), 1).scales[0, 0] == 2.0**-17
  assert exact(np.full((64, 1), 2.0**-24, np.float32), 1).scales[0, 0] == 2.0**-24
  for dtype in ("bfloat16", "float32"):
    for convert in (absmean, exact):
      assert convert(np.full((64, 1), 2.0**-126, np.float32), 1, scale_dtype=dtype).scales[0, 0] > 0
      with pytest.raises(ValueError, match=r"too small for .*: scale the weight up"):
        convert(np.full((64, 1), 2.0**-130, np.float32), 1, scale_dtype=dtype)


def test_a_weight_that_is_not_ternary_is_told_so_whatever_its_scales():
  with pytest.raises(ValueError, match="not ternary: row 0, element"):
    exact(normal((128, 4)), 1, group_size=64)


@pytest.mark.parametrize("convert", [absmean, exact])
@pytest.mark.parametrize(
  ("shape", "options", "message"),
  [
    ((0, 4), {}, r"shape \(0, 4\) is empty"),
    ((4, 0), {}, r"shape \(4, 0\) is empty"),
    *(
      ((64, 2), {"group_size": size}, f"group_size = {size}: a positive multiple of 64, or None")
      for size in (0, -64, 65)
    ),
    ((64, 2), {"scale_dtype": "float64"}, "scale_dtype = 'float64': one of float16, bfloat16, fl"),
  ],
)
def test_arguments_that_are_none_of_their_choices_are_refused(convert, shape, options, message):
  w = np.ones(shape, np.float32)
  with pytest.raises(ValueError, match=message):
    convert(w, 1, **options)


@pytest.mark.parametrize("axes", [0, 2, -2])
def test_axes_that_do_not_split_the_weight_are_refused(axes):
  for convert in (absmean, exact):
    with pytest.raises(ValueError, match="contracted_axes"):
      convert(normal((8, 6)), axes)
