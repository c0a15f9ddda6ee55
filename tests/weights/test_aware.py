"""What training multiplies by is what the file will hold, and gradients pass straight through."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from neurojax.kernels.gemm.reference import quantize_rows
from neurojax.weights import aware, quantize
from neurojax.weights.aware import AwareMatrix

SHAPES = [
  ((192, 2, 5), 1, 64), ((192, 2, 5), 1, None), ((3, 70, 9), 2, 64), ((3, 70, 9), 2, None),
  ((7, 300), -1, 128), ((7, 300), -1, None), ((65, 1), 1, 64), ((1, 1), 1, None),
]  # fmt: skip


@given(case=st.sampled_from(SHAPES), seed=st.integers(0, 2**32 - 1), power=st.integers(-9, 9))
@example(case=SHAPES[0], seed=0, power=-16)
@settings(max_examples=40, deadline=None)
def test_values_are_those_of_the_quantizer_of_files(case, seed: int, power: int):
  """That sums in float64 on the host. A small group becomes zeros here, see SMALLEST_SCALE."""
  shape, axes, group_size = case
  w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * np.float32(2.0**power)
  values, scales = aware.absmean(jnp.asarray(w), axes, group_size=group_size, dtype=jnp.float32)
  wanted = quantize.absmean(w, axes, group_size=group_size, scale_dtype="bfloat16")
  kept = np.asarray(wanted.scales, np.float32)
  kept = np.where(kept < aware.SMALLEST_SCALE, 0, kept)
  np.testing.assert_array_equal(scales, kept)
  if (kept > 0).all():
    np.testing.assert_array_equal(values, wanted.dequantize())


@given(seed=st.integers(0, 2**32 - 1), power=st.floats(-17, 15))
@settings(max_examples=50, deadline=None)
def test_scales_are_exact_in_float16_and_values_in_bfloat16(seed: int, power: float):
  w = np.random.default_rng(seed).standard_normal((64, 3)) * 2.0**power
  w = jnp.asarray(w, jnp.float32)
  wide, scales = aware.absmean(w, 1, group_size=64, dtype=jnp.float32)
  narrow, _ = aware.absmean(w, 1, group_size=64, dtype=jnp.bfloat16)
  np.testing.assert_array_equal(np.asarray(scales).astype(np.float16).astype(np.float32), scales)
  np.testing.assert_array_equal(narrow.astype(jnp.float32), wide)


def test_halves_go_to_zero_and_zeros_stay():
  """w / s is a half at 0.5 and just above it at the next number, as in arXiv:2402.17764's rounding."""
  s = np.float32(1)
  above = np.nextafter(np.float32(0.5), s)
  w = np.array([0.5, -0.5, above, -above, 0, 3.0, -0.25, 0.25], np.float32)
  w = np.concatenate([w, np.full(56, (64 - np.abs(w).sum()) / 56, np.float32)])
  values, scales = aware.absmean(jnp.asarray(w)[:, None], 1, group_size=64, dtype=jnp.float32)
  assert scales.tolist() == [[1.0]]
  assert values[:8, 0].tolist() == [0, 0, 1, -1, 0, 1, 0, 0]
  zeros, scales = aware.absmean(jnp.zeros((64, 2)), 1, group_size=64)
  assert not zeros.any() and not scales.any()


def test_sums_do_not_depend_on_the_order_of_additions():
  """Numbers of very different sizes: a plain float32 sum of them differs with the order."""
  rng = np.random.default_rng(0)
  w = (rng.standard_normal(256) * 10.0 ** rng.uniform(-6, 2, 256)).astype(np.float32)
  sums = {float(aware._sum(jnp.asarray(rng.permutation(np.abs(w))), (0,))) for _ in range(50)}
  assert sums == {float(np.float32(np.abs(w).astype(np.float64).sum()))}


def test_activations_are_rounded_as_kernels_round_them():
  x = np.random.default_rng(1).standard_normal((2, 3, 4, 16)).astype(np.float32)
  x[0, 1] *= 1e3
  x[1, 2] = 0
  levels, steps = aware.levels_and_steps(jnp.asarray(x), 2)
  wanted, wanted_steps = quantize_rows(jnp.asarray(x).reshape(6, 64))
  np.testing.assert_array_equal(levels.reshape(6, 64), wanted)
  np.testing.assert_array_equal(steps.ravel(), wanted_steps)


def test_what_is_not_finite_shows():
  w = AwareMatrix(jnp.ones((4, 2)), "int8")
  for bad in (jnp.nan, jnp.inf):
    y = w.contract("BTD,DF->BTF", jnp.ones((1, 2, 4)).at[0, 1, 2].set(bad))
    assert jnp.isfinite(y[0, 0]).all() and not jnp.isfinite(y[0, 1]).any()


@pytest.mark.parametrize("activations", ["none", "int8"])
@pytest.mark.parametrize("spec", ["BTD,DNH->BTNH", "BTNH,NHD->BTD", "BTD,VD->BTV"])
def test_gradients_are_those_of_a_product_without_rounding(spec: str, activations):
  """Straight-through, written out: dx = dy w, dw = (rounded x) dy."""
  sizes = dict(B=2, T=3, D=8, N=2, H=6, V=5)
  left, right, out = (part for half in spec.split("->") for part in half.split(","))
  rng = np.random.default_rng(2)
  x, w, dy = (
    jnp.asarray(rng.standard_normal([sizes[c] for c in letters]), jnp.float32)
    for letters in (left, right, out)
  )
  y, pull = jax.vjp(lambda x, w: AwareMatrix(w, activations).contract(spec, x), x, w)
  dx, dw = pull(dy)
  seen = np.asarray(x, np.float64)
  if activations == "int8":
    axes = tuple(range(2, x.ndim))
    step = np.abs(seen).max(axes, keepdims=True) / 127
    seen = np.rint(seen / step) * step
  np.testing.assert_allclose(y, np.einsum(spec, seen, w), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(dx, np.einsum(f"{out},{right}->{left}", dy, w), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(
    dw, np.einsum(f"{left},{out}->{right}", seen, dy), rtol=1e-5, atol=1e-5
  )


def test_products_keep_the_dtype_of_the_values():
  """A float32 gradient would make a GPU multiply in float32."""
  w = AwareMatrix(jnp.ones((4, 2), jnp.bfloat16), "int8")
  loss = lambda x, w: w.contract("BTD,DF->BTF", x).sum()  # noqa: E731
  jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(jnp.ones((1, 3, 4), jnp.bfloat16), w)
  dots = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "dot_general"]
  assert len(dots) >= 2
  assert {v.aval.dtype for e in dots for v in (*e.invars, *e.outvars)} == {jnp.dtype(jnp.bfloat16)}
