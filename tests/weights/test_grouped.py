"""Grouped integers: one packing, whose products are those of the numbers it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurojax.forms import Grouped
from neurojax.weights.grouped import GroupedArray
from neurojax.weights.rows import GroupedRows

pytestmark = pytest.mark.optimized

FORMS = {
  "8 bits": Grouped(bits=8, offset=128, group_size=32, scale="float16"),
  "6 bits": Grouped(bits=6, offset=32, group_size=16, scale="float16", parent=True),
  "5 bits": Grouped(bits=5, offset=0, group_size=32, scale="float16", minima="minimum"),
  "4 bits": Grouped(
    bits=4, offset=0, group_size=32, scale="float16", parent=True, minima="minimum"
  ),
  "4 bits, zeros": Grouped(bits=4, offset=0, group_size=128, scale="float16", minima="zero"),
  "3 bits": Grouped(bits=3, offset=4, group_size=16, scale="float32"),
  "2 bits": Grouped(bits=2, offset=0, group_size=16, scale="float32", parent=True),
  "1 bit": Grouped(bits=1, offset=0, group_size=64, scale="float16", minima="minimum"),
}
N, K = 24, 512


def rows(form: Grouped, n: int = N, k: int = K, seed: int = 0) -> GroupedRows:
  rng = np.random.default_rng(seed)
  groups = (n, k // form.group_size)

  def scales() -> tuple[np.ndarray, np.ndarray | None]:
    if form.parent:
      return (
        rng.integers(-20, 20, groups).astype(np.int8),
        rng.uniform(0.01, 0.02, (n, k // 256)).astype(form.scale),
      )
    return rng.uniform(-1, 1, groups).astype(form.scale), None

  scale, parents = scales()
  minima, minima_parents = None, None
  if form.minima == "zero":
    minima = rng.integers(0, 1 << form.bits, groups).astype(np.uint8)
  elif form.minima == "minimum":
    minima, minima_parents = scales()
    minima = np.abs(minima).astype(np.uint8) if form.parent else minima
  codes = rng.integers(0, 1 << form.bits, (n, k)).astype(np.uint8)
  return GroupedRows(form, codes, scale, parents, minima, minima_parents)


def literal(r: GroupedRows, n: int, k: int) -> np.float32:
  """One weight, by the definition."""
  g, f = k // r.form.group_size, np.float32
  scale = f(r.scales[n, g])
  if r.parents is not None:
    scale *= f(r.parents[n, k // 256])
  code = int(r.codes[n, k]) - r.form.offset
  if r.form.minima == "zero":
    return scale * f(code - int(r.minima[n, g]))
  if r.form.minima == "none":
    return scale * f(code)
  minimum = f(r.minima[n, g])
  if r.minima_parents is not None:
    minimum *= f(r.minima_parents[n, k // 256])
  return scale * f(code) + minimum


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_numbers_and_their_bytes(form: Grouped):
  r = rows(form)
  values = r.values()
  for n, k in ((0, 0), (3, 17), (N - 1, K - 1), (5, 255), (5, 256), (7, 300)):
    assert values[n, k] == literal(r, n, k)
  w = GroupedArray.from_rows(r, (K, 4, 6), 1)
  assert w.shape == (K, 4, 6)
  assert w.nbytes == form.matrix_bytes(K, N)
  assert 8 * w.nbytes / values.size < form.bits + 2.2
  np.testing.assert_allclose(
    np.asarray(w.dequantize()).reshape(K, N).T, values, rtol=2e-7, atol=1e-7
  )


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_products_and_rows(form: Grouped, monkeypatch: pytest.MonkeyPatch):
  # Blocks of 10 of 24 rows: the last one reaches back.
  monkeypatch.setattr("neurojax.weights.grouped._BLOCK_ELEMENTS", 10 * K)
  r = rows(form)
  w = GroupedArray.from_rows(r, (N, K), -1)
  x_TxK = np.random.default_rng(1).standard_normal((3, K), np.float32)
  ids = jnp.array([[0, 7], [23, 99]])
  y_TxN, taken = jax.jit(lambda w, x, ids: (w.contract("TD,VD->TV", x), w.take(ids)))(w, x_TxK, ids)
  wanted = x_TxK.astype(np.float64) @ r.values().T.astype(np.float64)
  assert np.abs(y_TxN - wanted).max() < 3e-6 * np.abs(wanted).max()
  np.testing.assert_allclose(taken, r.values()[np.minimum(ids, N - 1)], rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize(("k", "planes"), [(256, (4, 1)), (384, (4, 2)), (288, (8,))])
def test_rows_that_do_not_fall_into_parts_are_kept_in_more_bits(k: int, planes: tuple[int, ...]):
  form = Grouped(bits=5, offset=16, group_size=32, scale="float16")
  assert form.planes(k) == planes
  r = rows(form, 4, k)
  w = GroupedArray.from_rows(r, (4, k), -1)
  assert w.nbytes == form.matrix_bytes(k, 4)
  np.testing.assert_array_equal(w.dequantize(), r.values())


@pytest.mark.parametrize("one", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("other", FORMS.values(), ids=FORMS)
def test_a_joint_form_holds_both_without_any_change(one: Grouped, other: Grouped):
  joint = one.join(other)
  assert joint == other.join(one)
  for form in (one, other):
    r = rows(form)
    moved = r.as_form(joint)
    assert moved.form == joint
    assert moved.codes.max() < 1 << joint.bits
    np.testing.assert_array_equal(moved.values(), r.values())


def test_other_shapes_are_refused():
  r = rows(FORMS["8 bits"])
  with pytest.raises(ValueError, match="has 24 channels of 256 elements"):
    GroupedArray.from_rows(r, (256, 24), 1)
  w = GroupedArray.from_rows(r, (K, N), 1)
  stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), w)
  assert stacked.shape == (2, K, N)
  with pytest.raises(ValueError, match="1 axes in front"):
    stacked.contract("TD,DF->TF", np.zeros((1, K), np.float32))
  with pytest.raises(ValueError, match="take needs"):
    w.take(jnp.array([1]))
