"""A stage by itself: lengths, rows in slots, and what it refuses."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from neurojax.config import LayerKind, ModelConfig, Sampling, Span
from neurojax.model.neurollm import NeuroLLM
from neurojax.stage.compile import CompiledStage
from neurojax.stage.cut import cut
from neurojax.stage.runtime import StageRuntime
from neurojax.stage.step import Row, RowOutput

pytestmark = pytest.mark.optimized

CONFIG = ModelConfig(
  vocab_size=31, model_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, ffn_dim=24,
  context_length=200,
)  # fmt: skip
MIXED = dataclasses.replace(
  CONFIG, num_layers=3, layer_kinds=(
    LayerKind(mixer="convolution"), LayerKind(sliding_window=20), LayerKind(),
  ), layer_pattern=(0, 1, 2), conv_width=3,
)  # fmt: skip
GREEDY = Sampling()
PLAIN = Sampling(temperature=1.0, seed=3)
FULL = Sampling(temperature=0.9, top_p=0.8, repetition_penalty=1.2, frequency_penalty=0.3, seed=4)


def compiled(config: ModelConfig = CONFIG, **options) -> CompiledStage:
  model = NeuroLLM(config, rngs=nnx.Rngs(0))
  return CompiledStage(model, **{"context_length": 200, "buckets": (1, 4, 16), **options})


@pytest.fixture(scope="module")
def stage() -> CompiledStage:
  return compiled(slots=3, places=4)


@pytest.fixture(scope="module", params=[CONFIG, MIXED], ids=["attention", "mixed"])
def any_stage(request) -> CompiledStage:
  return compiled(request.param, slots=3, places=4)


def tokens(number: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 31, number).astype(np.int32)


def one(runtime: StageRuntime, row: Row) -> RowOutput:
  [output] = runtime.step([row])
  if output.error:
    raise output.error
  return output


def prefill(
  runtime: StageRuntime, slot: int, ids: np.ndarray, *, start: int = 0, **last
) -> RowOutput:
  """Run a prompt on the grid; the last row draws a token."""
  grid = runtime.stage.chunks[0]
  for at in range(start, len(ids), grid):
    is_last = at + grid >= len(ids)
    row = Row(slot=slot, start=at, tokens=ids[at : at + grid], draws=int(is_last))
    output = one(runtime, dataclasses.replace(row, **last) if is_last else row)
  return output


Answer = list[tuple[int, float]]


def pairs(output: RowOutput) -> Answer:
  return list(zip(output.tokens.tolist(), output.logprobs.tolist(), strict=True))


def answer(
  runtime: StageRuntime, slot: int, ids: np.ndarray, sampling: Sampling, count: int = 9
) -> Answer:
  """The tokens and log-probabilities of a prompt's answer, drawn one by one."""
  runtime.open(slot, sampling)
  found = pairs(prefill(runtime, slot, ids))
  for position in range(len(ids), len(ids) + count - 1):
    last = np.array([found[-1][0]], np.int32)
    row = Row(slot=slot, start=position, tokens=last, role="drawn", draws=1)
    found += pairs(one(runtime, row))
  runtime.close(slot)
  return found


def test_lengths_are_padded_to_what_fits(stage: CompiledStage):
  assert stage.capacity == 256 and stage.buckets == (1, 4, 16) and stage.chunks == (16,)
  assert [stage.bucket(n, 0) for n in (1, 2, 4, 5, 16)] == [1, 4, 4, 16, 16]
  # Near the end of the cache padding has no room.
  assert stage.bucket(5, 248) == 8 and stage.bucket(1, 255) == 1
  with pytest.raises(ValueError, match="do not fit a cache of 256"):
    stage.bucket(1, 256)
  with pytest.raises(ValueError, match="17 inputs in a row of a prompt: at most 16"):
    stage.bucket(17, 0)


def test_a_context_that_ends_off_every_bucket_is_filled_to_its_last_position():
  """Whatever the bucket at the end, padding never pushes a write back over earlier positions."""
  model = NeuroLLM(CONFIG, rngs=nnx.Rngs(1))
  ids = tokens(128)
  whole, _ = model(jnp.asarray(ids)[None])
  runtime = StageRuntime(CompiledStage(model, context_length=128, buckets=(1, 48)))
  runtime.open(0, GREEDY)
  scores = []
  for start in range(0, 128, 48):
    part = ids[start : start + 48]
    row = Row(slot=0, start=start, tokens=part, targets=np.zeros_like(part))
    scores.append(one(runtime, row).scores)
  exact = np.asarray(whole[0], np.float64)
  wanted = exact[:, 0] - np.log(np.exp(exact).sum(-1))
  np.testing.assert_allclose(np.concatenate(scores), wanted, atol=1e-5)
  with pytest.raises(ValueError, match="pass the context of 128"):
    one(runtime, Row(slot=0, start=128, tokens=ids[:1]))


# ---- a row's bits depend on its own sequence alone


@pytest.mark.parametrize("sampling", [GREEDY, PLAIN, FULL], ids=["greedy", "plain", "full"])
def test_rows_beside_others_in_any_slot_give_the_bits_of_one_alone(any_stage, sampling: Sampling):
  ids = tokens(21, 1)
  wanted = answer(StageRuntime(any_stage), 0, ids, sampling)
  assert len(set(wanted)) > 1
  runtime = StageRuntime(any_stage)
  others = [(tokens(5, 2), FULL), (tokens(33, 3), PLAIN)]
  for slot, (_, settings) in zip((2, 0), others, strict=True):
    runtime.open(slot, settings)
  runtime.open(1, sampling)
  found = {1: pairs(prefill(runtime, 1, ids))}
  for slot, (prompt, _) in zip((2, 0), others, strict=True):
    found[slot] = pairs(prefill(runtime, slot, prompt))
  lengths = {1: len(ids), 2: 5, 0: 33}
  while len(found[1]) < len(wanted):
    rows = [
      Row(slot=slot, start=lengths[slot], tokens=np.array([got[-1][0]], np.int32), role="drawn", draws=1)
      for slot, got in found.items()
      if slot != 2 or len(found[1]) % 2
    ]  # fmt: skip
    for row, output in zip(rows, runtime.step(rows), strict=True):
      found[row.slot] += pairs(output)
      lengths[row.slot] += 1
  assert found[1] == wanted


@pytest.mark.parametrize("sampling", [GREEDY, FULL], ids=["greedy", "full"])
@pytest.mark.parametrize("draws", [(8,), (1, 7), (3, 2, 3), (8, 8)])
def test_tokens_drawn_in_one_call_are_those_drawn_one_by_one(
  any_stage, sampling: Sampling, draws: tuple[int, ...]
):
  """And the next step need not be told the last one."""
  ids = tokens(7, 4)
  wanted = answer(StageRuntime(any_stage), 0, ids, sampling, 1 + sum(draws))
  runtime = StageRuntime(any_stage)
  runtime.open(2, sampling)
  runtime.open(1, PLAIN)
  found = pairs(prefill(runtime, 2, ids))
  beside = pairs(prefill(runtime, 1, ids))
  position = len(ids)
  pending = []
  for index, count in enumerate(draws):
    row = Row(slot=2, start=position, tokens=None, role="drawn", draws=count)
    rows = [row]
    if index == 0:
      other = np.array([beside[-1][0]], np.int32)
      rows.insert(0, Row(slot=1, start=position, tokens=other, role="drawn", draws=1))
    pending.append((len(rows) - 1, runtime.dispatch(rows)))
    position += count
  for place, step in pending:
    found += pairs(step.result()[place])
  assert found == wanted


@pytest.mark.parametrize("replayed", [1, 4, 8, 9, 20])
def test_a_replayed_answer_goes_on_as_if_it_had_never_stopped(any_stage, replayed: int):
  ids = tokens(19, 5)
  wanted = answer(StageRuntime(any_stage), 0, ids, FULL, replayed + 6)
  runtime = StageRuntime(any_stage)
  runtime.open(1, FULL)
  for start in range(0, len(ids), 16):
    one(runtime, Row(slot=1, start=start, tokens=ids[start : start + 16]))
  drawn = np.array([token for token, _ in wanted[:replayed]], np.int32)
  # In two rows where there are enough: the first one draws nothing.
  first = replayed // 2
  if first:
    one(runtime, Row(slot=1, start=len(ids), tokens=drawn[:first], role="replayed"))
  row = Row(slot=1, start=len(ids) + first, tokens=drawn[first:], role="replayed", draws=2)
  found = pairs(one(runtime, row))
  position = len(ids) + replayed + 1
  found += pairs(one(runtime, Row(slot=1, start=position, tokens=None, role="drawn", draws=4)))
  assert found == wanted[replayed:]


def test_kept_blocks_and_copies_are_as_good_as_computed_ones(any_stage):
  """The kept blocks of a prompt are restored into another slot, and that slot is copied."""
  ids = tokens(60, 6)
  wanted = answer(StageRuntime(any_stage), 0, ids, FULL)
  runtime = StageRuntime(any_stage)
  runtime.open(0, GREEDY)
  for block, place in enumerate((3, 0, 1)):
    part = ids[16 * block : 16 * block + 16]
    one(runtime, Row(slot=0, start=16 * block, tokens=part, keep=(place,)))
  runtime.close(0)
  # What used the slot in between leaves no trace.
  answer(runtime, 0, tokens(50, 7), PLAIN)
  for restored in (3, 1):
    runtime.open(2, FULL, restore=(3, 0, 1)[:restored])
    runtime.open(0, FULL, copy=(2, 16 * restored))
    for slot in (0, 2):
      found, seen = [], ids[: 16 * restored]
      for start in range(16 * restored, len(ids), 16):
        is_last = start + 16 >= len(ids)
        row = Row(
          slot=slot, start=start, tokens=ids[start : start + 16], draws=int(is_last), seen=seen
        )
        output, seen = one(runtime, row), None
      found = pairs(output)
      row = Row(slot=slot, start=len(ids), tokens=None, role="drawn", draws=8)
      found += pairs(one(runtime, row))
      assert found == wanted
      runtime.close(slot)


def test_stages_compiled_apart_give_the_whole_stages_bits(any_stage):
  model = NeuroLLM(any_stage.config, rngs=nnx.Rngs(0))
  ids = tokens(21, 8)
  wanted = answer(StageRuntime(any_stage), 0, ids, FULL)
  number = model.config.num_layers
  parts = []
  for layer in range(number):
    part = cut(model, Span(first_layer=layer, last_layer=layer, num_layers=number))
    parts.append(StageRuntime(CompiledStage(part, context_length=200, buckets=(1, 4, 16), slots=3)))
    parts[-1].open(1, FULL)

  def through(row: Row) -> RowOutput:
    for runtime in parts:
      output = one(runtime, row)
      row = dataclasses.replace(row, hidden=output.hidden)
    return output

  through(Row(slot=1, start=0, tokens=ids[:16]))
  found = pairs(through(Row(slot=1, start=16, tokens=ids[16:], draws=1)))
  while len(found) < len(wanted):
    last = np.array([found[-1][0]], np.int32)
    row = Row(slot=1, start=20 + len(found), tokens=last, role="drawn", draws=1)
    found += pairs(through(row))
  assert found == wanted
  # The same once more as a replay.
  for runtime in parts:
    runtime.close(1)
    runtime.open(1, FULL)
  through(Row(slot=1, start=0, tokens=ids[:16]))
  through(Row(slot=1, start=16, tokens=ids[16:]))
  drawn = np.array([token for token, _ in wanted[:-1]], np.int32)
  row = Row(slot=1, start=21, tokens=drawn, role="replayed", draws=1)
  assert pairs(through(row)) == wanted[-1:]


def test_the_likeliest_tokens_are_those_of_the_logits(stage: CompiledStage):
  ids = tokens(9, 9)
  runtime = StageRuntime(stage)
  runtime.open(0, GREEDY)
  targets = tokens(9, 10)
  output = one(runtime, Row(slot=0, start=0, tokens=ids, targets=targets, top=3, draws=1))
  logits, _ = NeuroLLM(CONFIG, rngs=nnx.Rngs(0))(jnp.asarray(ids)[None])
  exact = np.asarray(logits[0], np.float64)
  logprobs = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
  order = np.argsort(-logprobs, axis=-1, kind="stable")[:, :3]
  np.testing.assert_array_equal(output.score_tops.ids, order)
  np.testing.assert_allclose(
    output.score_tops.logprobs, np.take_along_axis(logprobs, order, 1), atol=1e-5
  )
  np.testing.assert_allclose(output.scores, logprobs[np.arange(9), targets], atol=1e-5)
  assert output.tops.ids.tolist() == order[-1:].tolist() and output.tokens[0] == order[-1, 0]


def test_only_allowed_tokens_are_drawn(stage: CompiledStage):
  runtime = StageRuntime(stage)
  mask = np.zeros(1, np.uint32)
  for token in (3, 30):
    mask[0] |= np.uint32(1 << token)
  for slot, settings in ((0, GREEDY), (1, PLAIN)):
    runtime.open(slot, settings)
    output = prefill(runtime, slot, tokens(20, 11), allowed=mask)
    assert output.tokens[0] in (3, 30)
  rows = [
    Row(slot=slot, start=20, tokens=None, role="drawn", draws=1, allowed=allowed)
    for slot, allowed in ((0, None), (1, mask))
  ]
  free, bound = runtime.step(rows)
  assert bound.tokens[0] in (3, 30) and free.error is None


def test_a_row_that_fails_hurts_no_other():
  """Infinite weights of one token make the rows that hold it fail."""
  config = dataclasses.replace(CONFIG, tied_embedding=False)
  model = NeuroLLM(config, rngs=nnx.Rngs(0))
  model.embedding_VD.set_value(model.embedding_VD.get_value().at[13].set(np.nan))
  runtime = StageRuntime(CompiledStage(model, context_length=100, buckets=(1, 16), slots=3))
  ids = np.array([4, 5, 6], np.int32)
  wanted = answer(StageRuntime(runtime.stage), 0, ids, GREEDY, 3)
  for slot in range(2):
    runtime.open(slot, GREEDY)
    prefill(runtime, slot, ids)
  rows = [
    Row(slot=slot, start=3, tokens=np.array([token], np.int32), role="drawn", draws=1)
    for slot, token in ((0, wanted[0][0]), (1, 13))
  ]
  good, bad = runtime.step(rows)
  assert pairs(good) == wanted[1:2]
  assert isinstance(bad.error, FloatingPointError) and "NaN" in str(bad.error)
  assert runtime.num_sequences == 1
  with pytest.raises(ValueError, match="slot 1 is not open"):
    one(runtime, dataclasses.replace(rows[1], start=4))


# ---- what is refused


@pytest.mark.parametrize(
  ("given", "named"),
  [
    ({"start": 1}, "stands at position 0"),
    ({"tokens": tokens(1).astype(np.int64)}, "expected int32"),
    ({"tokens": tokens(1)[None]}, "expected int32"),
    ({"tokens": tokens(0)}, "n > 0"),
    ({"tokens": tokens(201)}, "pass the context"),
    ({"tokens": tokens(17)}, "17 inputs in a row"),
    ({"tokens": np.array([31], np.int32)}, "token 31 is outside"),
    ({"tokens": None, "role": "drawn", "draws": 1}, "no token was drawn"),
    ({"targets": tokens(1)}, "1 targets for 2 tokens"),
    ({"targets": np.array([-1, 0], np.int32)}, "target -1"),
    ({"hidden": np.ones((2, 16), np.float32)}, "it takes tokens"),
    ({"draws": 2}, "draws = 2 in a row of role 'prompt': 0 to 1"),
    ({"role": "drawn", "draws": 1}, "2 drawn tokens in a row"),
    ({"role": "drawn", "draws": 0}, "draws = 0 in a row of role 'drawn': 1 to 8"),
    ({"role": "replayed", "draws": 9}, "0 to 8"),
    ({"keep": (0,)}, "whole blocks of 16"),
    ({"keep": (4,), "tokens": tokens(16)}, "place 4: this stage has 4 places"),
    ({"allowed": np.zeros(1, np.uint32)}, "needs draws = 1"),
    ({"allowed": np.zeros(2, np.uint32), "draws": 1}, "a bit for each token"),
  ],
)
def test_a_row_that_does_not_fit_is_refused_and_closes_its_slot(stage, given: dict, named: str):
  runtime = StageRuntime(stage)
  for slot in (0, 2):
    runtime.open(slot, GREEDY)
  row = Row(**{"slot": 2, "start": 0, "tokens": tokens(2), **given})
  good, bad = runtime.step([Row(slot=0, start=0, tokens=tokens(3), draws=1), row])
  assert good.tokens is not None
  with pytest.raises(ValueError, match=named):
    raise bad.error
  with pytest.raises(ValueError, match="slot 2 is not open"):
    one(runtime, Row(slot=2, start=0, tokens=tokens(1)))


def test_slots_and_places_that_are_not_there_are_refused(stage: CompiledStage):
  runtime = StageRuntime(stage)
  runtime.open(1, GREEDY)
  for options, named in (
    ({"slot": 1}, "slot 1 is open already"),
    ({"slot": 3}, r"slots 0\.\.2"),
    ({"slot": -1}, r"slots 0\.\.2"),
    ({"slot": 0, "restore": (4,)}, "place 4"),
    ({"slot": 0, "copy": (1, 5)}, "slot 1, which holds 0"),
    ({"slot": 0, "copy": (2, 0)}, "slot 2 is not open"),
  ):
    slot = options.pop("slot")
    with pytest.raises(ValueError, match=named):
      runtime.open(slot, GREEDY, **options)
  runtime.close(2)
  assert runtime.num_sequences == 1


@pytest.mark.parametrize(
  ("options", "named"),
  [
    ({"context_length": 0}, "context_length = 0"),
    ({"buckets": ()}, "buckets"),
    ({"buckets": (2, 4)}, "start with 1"),
    ({"buckets": (1, 4, 4)}, "ascend"),
    ({"slots": 0}, "slots = 0"),
    ({"places": -1}, "places = -1"),
  ],
)
def test_stages_that_cannot_be_are_refused(options: dict, named: str):
  with pytest.raises(ValueError, match=named):
    compiled(**options)


def test_any_number_of_stop_ids_ends_answers_where_none_is_held_back(stage: CompiledStage):
  runtime = StageRuntime(stage)
  runtime.open(0, GREEDY, stop_ids=frozenset(range(1000)))
  assert prefill(runtime, 0, tokens(5, 12)).tokens is not None
