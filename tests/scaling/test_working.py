import pytest

from neurojax.config import ModelConfig, Span
from neurojax.scaling.working import working_bytes
from neurojax.stage.compile import BUCKETS, CompiledStage
from neurojax.stage.random import random_model


@pytest.mark.parametrize("weights", ["dense", "int8", "w2a16", "w2a8"])
@pytest.mark.parametrize(
  ("model_dim", "ffn_dim", "num_heads", "head_dim"), [(256, 1024, 4, 64), (512, 768, 4, 128)]
)
def test_working_memory_is_about_what_the_compiler_says(
  model_dim: int, ffn_dim: int, num_heads: int, head_dim: int, weights
):
  config = ModelConfig(
    vocab_size=64,
    model_dim=model_dim,
    num_layers=4,
    num_heads=num_heads,
    num_kv_heads=2,
    head_dim=head_dim,
    ffn_dim=ffn_dim,
  )
  middle = random_model(config, Span(first_layer=1, last_layer=2, num_layers=4), weights=weights)
  stage = CompiledStage(middle, context_length=512, buckets=(1, BUCKETS[-1]))
  predicted = working_bytes(config, dtype="float32", weights=weights, tokens=BUCKETS[-1])
  assert 0.75 < predicted / stage.working_bytes < 1.33
