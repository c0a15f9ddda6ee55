"""TernaryArray: what its codes mean, as a pytree and behind further axes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurojax.weights.quantize import pack_rows
from neurojax.weights.ternary import TernaryArray

shapes = st.lists(st.integers(1, 9), min_size=2, max_size=4).map(tuple)


def make(
  shape: tuple[int, ...],
  contracted_axes: int,
  group_size: int | None,
  seed: int = 0,
  dtype: str = "float16",
) -> tuple[TernaryArray, np.ndarray]:
  """An array and its weight, element by element from what the docstring says."""
  rng = np.random.default_rng(seed)
  c = contracted_axes
  contracted, kept = (shape[:c], shape[c:]) if c > 0 else (shape[c:], shape[:c])
  n, k = math.prod(kept), math.prod(contracted)
  w_NxK = rng.integers(-1, 2, (n, k)).astype(np.int8)
  groups = (1, 1) if group_size is None else (n, -(-k // group_size))
  scales = rng.standard_normal(groups).astype(jnp.dtype(dtype))
  values = np.empty((n, k), np.float32)
  for row, column in np.ndindex(n, k):
    scale = scales[0, 0] if group_size is None else scales[row, column // group_size]
    values[row, column] = w_NxK[row, column] * np.float32(scale)
  weight = (values if c < 0 else values.T).reshape(shape)
  array = TernaryArray.from_rows(
    jnp.asarray(pack_rows(w_NxK)), jnp.asarray(scales), shape, c, group_size=group_size
  )
  return array, weight


@settings(max_examples=25, deadline=None)
@given(
  shape=shapes,
  wide=st.integers(1, 150),
  group_size=st.sampled_from([None, 64, 128, 256]),
  dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
  data=st.data(),
)
def test_dequantized_is_the_weight_of_any_shape(shape, wide, group_size, dtype, data):
  c = data.draw(st.integers(1, len(shape) - 1)) * data.draw(st.sampled_from((1, -1)))
  at = 0 if c > 0 else -1
  shape = (wide, *shape[1:]) if at == 0 else (*shape[:-1], wide)
  array, weight = make(shape, c, group_size, dtype=dtype)
  assert array.shape == shape
  np.testing.assert_array_equal(array.dequantize(), weight)
  k = array.contraction.k
  rows = array.contraction.n
  groups = 1 if group_size is None else rows * -(-k // group_size)
  assert array.nbytes == rows * 16 * -(-k // 64) + groups * jnp.dtype(dtype).itemsize


@pytest.mark.parametrize("group_size", [None, 64])
def test_take_is_rows_of_the_table_with_ids_clamped(group_size):
  array, weight = make((11, 100), -1, group_size)
  ids = jnp.asarray([[0, 10, 3], [99, -5, 7]])
  found = jax.jit(lambda a, i: a.take(i))(array, ids)
  np.testing.assert_array_equal(found, weight[np.clip(np.asarray(ids), 0, 10)])
  np.testing.assert_array_equal(array.take(jnp.int32(4)), weight[4])


@pytest.mark.parametrize("group_size", [None, 64])
def test_layers_in_front_are_scanned_and_indexed(group_size):
  layers = [make((70, 3), 1, group_size, seed)[0] for seed in range(4)]
  weights = np.stack([make((70, 3), 1, group_size, seed)[1] for seed in range(4)])
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
  assert stacked.shape == (4, 70, 3) and stacked.nbytes == 4 * layers[0].nbytes
  np.testing.assert_array_equal(stacked.dequantize(), weights)
  _, scanned = jax.jit(
    lambda s: jax.lax.scan(lambda carry, layer: (carry, layer.dequantize()), 0, s)
  )(stacked)
  np.testing.assert_array_equal(scanned, weights)
  one = jax.tree.map(lambda leaf: leaf[2], stacked)
  np.testing.assert_array_equal(one.dequantize(), weights[2])
  one.check_single()
  with pytest.raises(ValueError, match="1 axes in front"):
    stacked.check_single()
  twice = jax.tree.map(lambda leaf: leaf.reshape(2, 2, *leaf.shape[1:]), stacked)
  np.testing.assert_array_equal(twice.dequantize(), weights.reshape(2, 2, 70, 3))


def test_as_a_pytree_it_is_two_arrays_and_the_rest_is_static():
  array, weight = make((70, 3), 1, 64)
  leaves, tree = jax.tree.flatten(array)
  assert [leaf.shape for leaf in leaves] == [(3, 32), (3, 2)]
  np.testing.assert_array_equal(jax.tree.unflatten(tree, leaves).dequantize(), weight)
  shapes_only = jax.eval_shape(lambda a: a, array)
  assert shapes_only.shape == (70, 3) and shapes_only.nbytes == array.nbytes
  other = dataclasses.replace(array, mode="w2a8")
  assert jax.tree.structure(other) != tree, "a compiled product must not serve the other mode"
  traced = []
  product = jax.jit(lambda a: traced.append(a.mode) or a.dequantize())
  for a in (array, other, array):
    np.testing.assert_array_equal(product(a), weight)
  assert traced == ["w2a16", "w2a8"]


def test_shapes_and_dtypes_that_do_not_fit_are_named():
  array, _ = make((70, 3), 1, 64)
  codes, scales = np.asarray(array.codes), np.asarray(array.scales)

  def build(codes=codes, scales=scales, shape=(70, 3), contracted_axes=1, group_size=64):
    return TernaryArray.from_rows(codes, scales, shape, contracted_axes, group_size=group_size)

  build()
  for wrong in (codes[:, :-1], codes[:2], codes[None], codes.astype(np.int8)):
    with pytest.raises(ValueError, match=r"codes are .* uint8 \(3, 32\)"):
      build(codes=wrong)
  for wrong in (scales[:, :1], scales[:1], scales.astype(np.float64), scales.view(np.int16)):
    with pytest.raises(ValueError, match=r"scales are .* \(3, 2\)"):
      build(scales=wrong)
  with pytest.raises(ValueError, match=r"have \(1, 1\)"):
    build(group_size=None)
  with pytest.raises(ValueError, match="group_size = 96"):
    build(group_size=96)
  for axes in (0, 2, -2):
    with pytest.raises(ValueError, match="contracted_axes"):
      build(contracted_axes=axes)


@pytest.mark.parametrize(("shape", "axes"), [((70, 3), 1), ((3, 5, 7), -1), ((3, 5, 7), -2)])
def test_take_needs_a_table(shape, axes):
  with pytest.raises(ValueError, match="take needs"):
    make(shape, axes, None)[0].take(jnp.zeros((1,), jnp.int32))
