import jax
import jax.numpy as jnp
import pytest

from neurojax.config import ModelConfig, Serving, Span
from neurojax.count.serving import Load, stage_bytes
from neurojax.count.working import working
from neurojax.forms import PREFILL
from neurojax.kernels.rows import api, attend
from neurojax.measure.random_model import random_model
from neurojax.stage.compile import BUCKETS, CompiledStage


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
  """Products and attention of few rows are XLA's, which copies what kernels read in place."""
  for module in (api, attend):
    monkeypatch.setattr(module, "why_not", lambda *args: "left to XLA")


def compiled(config: ModelConfig, span: Span, dtype: str, weights, context: int) -> CompiledStage:
  model = random_model(config, span, dtype=jnp.dtype(dtype), weights=weights)
  return CompiledStage(model, context_length=context, buckets=(1, PREFILL), programs="model")


def check(config: ModelConfig, span: Span, dtype: str, weights, context: int, most: float) -> None:
  stage = compiled(config, span, dtype, weights, context)
  counted = working(config, dtype=dtype, weights=weights, capacity=stage.capacity, kind="cpu")
  predicted = counted.stage(len(span), is_last=span.is_last)
  assert 1 <= predicted / stage.working_bytes < most


@pytest.mark.parametrize("weights", ["dense", "int8", "w2a16", "w2a8"])
@pytest.mark.parametrize(
  ("model_dim", "ffn_dim", "num_heads", "head_dim", "context"),
  [(256, 1024, 4, 64, 256), (512, 512, 4, 128, 2048), (256, 256, 16, 64, 512)],
)
@pytest.mark.usefixtures("without_kernels")
def test_working_memory_is_no_less_than_the_compiler_takes_and_not_much_more(
  model_dim: int, ffn_dim: int, num_heads: int, head_dim: int, context: int, weights
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
  span = Span(first_layer=1, last_layer=2, num_layers=4)
  check(config, span, "float32", weights, context, 1.7)


def test_kernels_need_no_more():
  config = ModelConfig(
    vocab_size=64,
    model_dim=512,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=128,
    ffn_dim=512,
  )
  for weights in ("dense", "int8", "w2a16"):
    check(config, Span.whole(config), "float32", weights, 2048, 3)


@pytest.mark.parametrize(("weights", "layers"), [("dense", 3), ("w2a8", 3), ("dense", 1)])
@pytest.mark.usefixtures("without_kernels")
def test_so_it_is_in_bfloat16_which_a_cpu_widens_and_at_the_ends(weights, layers: int):
  config = ModelConfig(
    vocab_size=8192,
    model_dim=256,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    ffn_dim=512,
  )
  span = Span(first_layer=3 - layers, last_layer=2, num_layers=3)
  # From jax 0.11 on XLA widens a layer at a time; what is counted is not less than either needs.
  check(
    config, span, "bfloat16", weights, 1024, 1.7 if jax.version.__version_info__ < (0, 11) else 3.5
  )


def test_it_is_part_of_a_stage_that_asks_for_it():
  assert BUCKETS[-1] == PREFILL
  config = ModelConfig.named("tinyllama-1.1b")
  whole = Span.whole(config)
  serving = Serving(dtype="bfloat16", weights="dense", context=2048, sequences=1)
  held = stage_bytes(config, whole, Load(serving=serving, working=False))
  on = {kind: stage_bytes(config, whole, Load(serving=serving), kind) for kind in ("cuda", "cpu")}
  # A GPU copies a layer; a CPU all of them and the head, in float32.
  assert held < on["cuda"] < 1.1 * held and 2.7 * held < on["cpu"] < 3.3 * held
