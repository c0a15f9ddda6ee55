"""The decode step in plain JAX: it is the float64 oracle, and the kernel is it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurojax.kernels.attention.api import rotation
from neurojax.kernels.decode import api, bench
from neurojax.kernels.decode.shapes import SHAPES, Shape
from tests.kernels.decode import oracle

CAPACITY, POSITION, LAYERS, VOCAB = 128, 70, 2, 77


def problem(shape: Shape):
  """Arguments of `api.decode`, and what float64 makes of them."""
  s = shape
  w = oracle.weights(s, layers=LAYERS, group=64, qk_norm=True, seed=1)
  rng = np.random.default_rng(2)
  head = oracle.matrix(rng, n=VOCAB, k=s.d, group=64)
  final_norm = rng.normal(1, 0.1, s.d).astype(np.float32)
  x = rng.normal(size=s.d).astype(np.float32)
  cache = rng.normal(size=(2, LAYERS, 1, s.k, CAPACITY, s.h)).astype(np.float32)
  angle = POSITION * 1e4 ** (-np.arange(0, s.h, 2) / s.h)
  cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
  wanted = oracle.step(x, w, *cache, cos, sin, POSITION, final_norm, head)
  turn = rotation(jnp.array([POSITION]), s.h, base=1e4, style="half")
  w, head = jax.tree.map(jnp.asarray, (w, head))
  args = (jnp.asarray(x), w, *jnp.asarray(cache), turn, jnp.int32(POSITION))
  return args, {"final_norm": jnp.asarray(final_norm), "head": head}, wanted


def close(got, wanted, most: float) -> None:
  for a, b in zip(got, wanted, strict=True):
    assert np.linalg.norm(np.asarray(a, np.float64) - b) < most * np.linalg.norm(b)


SMALL = {name: shape.smaller(16) for name, shape in SHAPES.items()}
"""Every benchmarked shape, narrower: float64 and the interpreter take a while for the whole width."""


@pytest.mark.parametrize("name", SMALL)
def test_the_reference_is_float64s_step_and_the_kernel_is_the_reference(name: str, nothing_ahead):
  args, kwargs, wanted = problem(SMALL[name])
  reference = jax.jit(functools.partial(api.decode, implementation="reference"))(*args, **kwargs)
  # An activation may round to the other neighbour, which moves a result by a part of 127.
  close(reference, wanted, 2e-3)
  kernel = functools.partial(api.decode, implementation="triton", interpret=True)
  kernel = jax.jit(kernel)(*args, **kwargs)
  close(kernel, wanted, 2e-3)


def test_a_cpu_takes_the_reference():
  args, kwargs, _ = problem(SMALL["tinyllama-1.1b"])
  chosen = api.decode(*args, **kwargs)
  named = api.decode(*args, **kwargs, implementation="reference")
  for a, b in zip(chosen, named, strict=True):
    np.testing.assert_array_equal(a, b)


def test_smaller_shapes_keep_how_heads_share_keys():
  for name, shape in SHAPES.items():
    small = SMALL[name]
    assert (small.g, small.h) == (shape.g, shape.h)
    assert small.d < shape.d and small.d % 64 == small.f % 64 == 0


def test_the_benchmark_has_its_bound_and_a_baseline():
  from neurojax.kernels import timing

  rates = timing.Rates(1e9, 1e9, 1e9)
  [row] = bench.run(
    {"small": Shape(128, 256, 2, 1, 64, 1e-6)}, (16,), layers=1, rates=rates, runs=1
  )
  assert (row.implementation, row.speedup) == ("reference", 1)
  assert row.bytes_per_s == pytest.approx(row.read_fraction * 1e9)
  assert "small" in bench.report([row])
