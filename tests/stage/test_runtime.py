"""A stage by itself: buckets, caches of sequences, and what it refuses."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from neurojax.config import ModelConfig, Sampling, Span
from neurojax.model.neurollm import NeuroLLM
from neurojax.stage.compile import CompiledStage
from neurojax.stage.cut import cut
from neurojax.stage.runtime import StageRuntime
from neurojax.stage.step import StepInput

pytestmark = pytest.mark.optimized

CONFIG = ModelConfig(
  vocab_size=31,
  model_dim=16,
  num_layers=2,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  ffn_dim=24,
  context_length=200,
)


@pytest.fixture(scope="module")
def stage() -> CompiledStage:
  return CompiledStage(NeuroLLM(CONFIG, rngs=nnx.Rngs(0)), context_length=200, buckets=(1, 4, 64))


def tokens(number: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 31, number).astype(np.int32)


def test_buckets_take_what_fits(stage: CompiledStage):
  assert stage.capacity == 256 and stage.buckets == (1, 4, 64)
  assert [stage.bucket(n, 0) for n in (1, 2, 4, 5, 64, 1000)] == [1, 4, 4, 64, 64, 64]
  # Near the end of the cache only a smaller program fits.
  assert stage.bucket(40, 200) == 4 and stage.bucket(2, 255) == 1
  with pytest.raises(ValueError, match="do not fit a cache of 256"):
    stage.bucket(1, 256)


def test_a_context_that_ends_off_every_bucket_is_filled_to_its_last_position():
  """Whatever the bucket at the end, padding never pushes a write back over earlier positions."""
  model = NeuroLLM(CONFIG, rngs=nnx.Rngs(1))
  ids = tokens(128)
  whole, _ = model(jnp.asarray(ids)[None])
  runtime = StageRuntime(CompiledStage(model, context_length=128, buckets=(1, 48)), max_sequences=1)
  runtime.open("s", Sampling())
  targets = np.zeros(128, np.int32)
  scores = runtime.step("s", StepInput(start=0, tokens=ids, targets=targets)).scores
  exact = np.asarray(whole[0], np.float64)
  wanted = exact[:, 0] - np.log(np.exp(exact).sum(-1))
  np.testing.assert_allclose(scores, wanted, atol=1e-5)
  with pytest.raises(ValueError, match="pass the context of 128"):
    runtime.step("s", StepInput(start=128, tokens=ids[:1]))


def test_sequences_keep_their_own_caches(stage: CompiledStage):
  runtime = StageRuntime(stage, max_sequences=2)

  def answer(name: str, ids: np.ndarray) -> tuple[int | None, float | None]:
    output = runtime.step(name, StepInput(start=0, tokens=ids, sample=True))
    return output.token, output.logprob

  for name in ("a", "b"):
    runtime.open(name, Sampling())
  first = answer("a", tokens(9, 1)), answer("b", tokens(9, 2))
  for name in ("a", "b"):
    runtime.close(name)
    runtime.open(name, Sampling())
  # The other way round, in the same places.
  assert (answer("b", tokens(9, 2)), answer("a", tokens(9, 1))) == first[::-1]
  with pytest.raises(ValueError, match=r"all 2 sequence places .*\(sequences, --sequences\)"):
    runtime.open("c", Sampling())
  with pytest.raises(ValueError, match="open already"):
    runtime.open("a", Sampling())
  runtime.close("never opened")
  assert runtime.num_sequences == 2


@pytest.mark.parametrize(
  ("given", "named"),
  [
    (StepInput(start=1, tokens=tokens(1)), "stands at position 0"),
    (StepInput(start=0, tokens=tokens(1).astype(np.int64)), "expected int32"),
    (StepInput(start=0, tokens=tokens(1)[None]), "expected int32"),
    (StepInput(start=0, tokens=tokens(0)), "n > 0"),
    (StepInput(start=0, tokens=tokens(201)), "pass the context"),
    (StepInput(start=0, tokens=np.array([31], np.int32)), "token 31 is outside"),
    (StepInput(start=0, tokens=tokens(2), targets=tokens(1)), "1 targets for 2 tokens"),
    (StepInput(start=0, tokens=tokens(1), targets=np.array([-1], np.int32)), "target -1"),
    (StepInput(start=0, tokens=tokens(1), hidden=np.ones((1, 16), np.float32)), "it takes tokens"),
  ],
)
def test_a_step_that_does_not_fit_is_refused_and_closes_its_sequence(stage, given, named: str):
  runtime = StageRuntime(stage, max_sequences=2)
  for name in ("bad", "good"):
    runtime.open(name, Sampling())
  with pytest.raises(ValueError, match=named):
    runtime.step("bad", given)
  with pytest.raises(ValueError, match="'bad' is not open"):
    runtime.step("bad", StepInput(start=0, tokens=tokens(1)))
  assert runtime.step("good", StepInput(start=0, tokens=tokens(3), sample=True)).token is not None


def test_stages_compiled_apart_give_the_whole_stages_bits():
  model = NeuroLLM(CONFIG, rngs=nnx.Rngs(3))
  ids = tokens(70)
  whole = StageRuntime(CompiledStage(model, context_length=100), max_sequences=1)
  whole.open("s", Sampling())
  wanted = whole.step("s", StepInput(start=0, tokens=ids, sample=True))
  hidden = None
  for layer in range(2):
    part = cut(model, Span(first_layer=layer, last_layer=layer, num_layers=2))
    runtime = StageRuntime(CompiledStage(part, context_length=100), max_sequences=1)
    runtime.open("s", Sampling())
    output = runtime.step("s", StepInput(start=0, tokens=ids, hidden=hidden, sample=True))
    hidden = output.hidden
  assert (output.token, output.logprob) == (wanted.token, wanted.logprob)


@pytest.mark.parametrize(
  ("options", "named"),
  [
    ({"context_length": 0}, "context_length = 0"),
    ({"context_length": 9, "buckets": ()}, "buckets"),
    ({"context_length": 9, "buckets": (2, 4)}, "start with 1"),
    ({"context_length": 9, "buckets": (1, 4, 4)}, "ascend"),
  ],
)
def test_stages_that_cannot_be_are_refused(options: dict, named: str):
  with pytest.raises(ValueError, match=named):
    CompiledStage(NeuroLLM(CONFIG, rngs=nnx.Rngs(0)), **options)


def test_places_must_be_some(stage: CompiledStage):
  with pytest.raises(ValueError, match="max_sequences = 0"):
    StageRuntime(stage, max_sequences=0)
