"""Every matrix behind one protocol: layers, rows, products and sizes, however it is held."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurojax.forms import Grouped, Plain, Scales
from neurojax.model.project import project, project_all
from neurojax.weights import matrix, quantize
from neurojax.weights.build import build
from neurojax.weights.int8 import Int8Array
from neurojax.weights.rows import GroupedRows, TernaryRows

V, D = 6, 128
HELD = ("dense", "int8", "grouped", "ternary")
FORM = Grouped(bits=4, offset=8, group_size=32, scale="float16")


def table(held: str, seed: int = 0):
  """A matrix [V, D] of which products contract D."""
  rng = np.random.default_rng(seed)
  w_VD = rng.standard_normal((V, D)).astype(np.float32)
  match held:
    case "dense":
      return jnp.asarray(w_VD)
    case "int8":
      return Int8Array.quantize(w_VD, contracted_axes=-1)
    case "ternary":
      return quantize.absmean(w_VD, -1, group_size=64)
  return build(FORM, grouped_rows(rng, V), (V, D), -1)


def grouped_rows(rng: np.random.Generator, rows: int) -> GroupedRows:
  codes = rng.integers(0, 16, (rows, D)).astype(np.uint8)
  return GroupedRows(FORM, codes, rng.uniform(0.5, 1, (rows, D // 32)).astype(np.float16))


def values(w) -> np.ndarray:
  return np.asarray(w if isinstance(w, jax.Array) else w.dequantize())


@pytest.mark.parametrize("held", HELD)
def test_a_matrix_multiplies_and_looks_up_what_it_dequantises_to(held: str):
  w = table(held)
  assert w.shape == (V, D) and w.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(w))
  ids = jnp.array([[3, 0], [5, 5]])
  np.testing.assert_array_equal(matrix.take(w, ids), values(w)[np.asarray(ids)])
  x_BTD = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, D)), jnp.float32)
  y_BTV = project("BTD,VD->BTV", x_BTD, w)
  np.testing.assert_allclose(y_BTV, x_BTD @ values(w).T, rtol=1e-4, atol=1e-4)
  both = project_all(x_BTD, ("BTD,VD->BTV", w), ("BTD,VD->BTV", w))
  for y in both:
    np.testing.assert_allclose(y, y_BTV, rtol=1e-6)


@pytest.mark.parametrize("held", HELD)
def test_a_layer_of_stacked_matrices_is_the_matrix(held: str):
  ws = [table(held, seed) for seed in (0, 1, 2)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ws)
  x_TD = jnp.asarray(np.random.default_rng(2).standard_normal((3, D)), jnp.float32)
  experts = jax.tree.map(lambda leaf: leaf[:, None], stacked)
  for index, w in enumerate(ws):
    one = matrix.layer(stacked, jnp.int32(index))
    expert = matrix.StackedLayer(experts, jnp.int32(index)).layer(jnp.int32(0))
    left = matrix.InPlace(w) if matrix.reads_in_place(w) else w
    for found, alone in ((one, w), (expert, left)):
      np.testing.assert_array_equal(
        project("TD,VD->TV", x_TD, found), project("TD,VD->TV", x_TD, alone)
      )
    if left is not w:
      assert matrix.reads_in_place(stacked) and expert.matrix.shape[0] == 3
      np.testing.assert_array_equal(values(expert.taken()), values(w))


def test_a_form_builds_its_own_array():
  rng = np.random.default_rng(3)
  numbers = rng.standard_normal((2, V, D)).astype(np.float32)
  assert build(Plain("float16"), numbers, (V, D), -1, experts=2) is numbers
  int8 = build("int8", numbers, (V, D), -1, experts=2)
  grouped = build(FORM, grouped_rows(rng, 2 * V), (V, D), -1, experts=2)
  packed = quantize.absmean(numbers.reshape(2 * V, D), -1, group_size=64)
  rows = TernaryRows(np.asarray(packed.codes), np.asarray(packed.scales), 64)
  ternary = build(Scales(64, 2), rows, (V, D), -1, experts=2, mode="w2a8")
  assert int8.shape == grouped.shape == ternary.shape == (2, V, D) and ternary.mode == "w2a8"
  on_device = jax.tree.map(jnp.asarray, ternary)
  np.testing.assert_array_equal(values(on_device).reshape(2 * V, D), values(packed))
  whole = TernaryRows(rows.codes, np.ones((1, 1), np.float16), None)
  assert [part.scales.shape for part in whole.split(2)] == [(1, 1), (1, 1)]
  with pytest.raises(ValueError, match="channels"):
    build(FORM, grouped_rows(rng, V + 1), (V, D), -1)
