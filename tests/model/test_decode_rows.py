"""A decode step of several sequences on a CPU gives each of them the bits that it gets alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurojax.config import ModelConfig, Span
from neurojax.kernels.native import library
from neurojax.measure.random_model import random_model
from neurojax.model.project import rows_agree

pytestmark = [
  pytest.mark.optimized,
  pytest.mark.skipif(library.unavailable() is not None, reason=str(library.unavailable())),
]
CONFIG = ModelConfig(
  vocab_size=300, model_dim=128, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32,
  ffn_dim=192, rope_base=10000.0, norm_eps=1e-5, tied_embedding=True, context_length=256,
)  # fmt: skip


@pytest.mark.parametrize("weights", ("dense", "int8", "w2a8", "w2a16"))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_a_sequence_beside_others_gets_its_own_bits(weights, dtype):
  model = random_model(CONFIG, Span.whole(CONFIG), dtype=dtype, weights=weights)
  assert rows_agree(model.embedding_VD, "cpu")
  rng = np.random.default_rng(0)
  start = np.array([0, 130, 64, 3, 200, 77, 12, 255], np.int32)
  tokens = rng.integers(0, 300, (8, 1)).astype(np.int32)
  empty = model.new_cache(batch=8, capacity=256)
  cache = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), empty)
  step = jax.jit(lambda cache, tokens, start: model(tokens, cache=cache, start_B=start))
  together, after = step(cache, tokens, start)
  for rows in ([0], [5], [7, 1], [2, 3, 4]):
    some = np.array(rows)
    part = jax.tree.map(lambda leaf, some=some: leaf[:, some], cache)
    alone, own = step(part, tokens[some], start[some])
    np.testing.assert_array_equal(alone, together[some])
    for mine, all_of in zip(jax.tree.leaves(own), jax.tree.leaves(after), strict=True):
      np.testing.assert_array_equal(
        np.asarray(mine, np.float32), np.asarray(all_of[:, some], np.float32)
      )
