"""Drafts: the tokens and the bits of a sequence are those of one token after the other, whatever is guessed."""

import dataclasses
import itertools
import random

import numpy as np
import pytest
from flax import nnx

from neurojax.config import LayerKind, ModelConfig, Sampling, Span
from neurojax.model.neurollm import NeuroLLM
from neurojax.stage import programs
from neurojax.stage.compile import CompiledStage
from neurojax.stage.cut import cut
from neurojax.stage.runtime import StageRuntime
from neurojax.stage.step import Row, RowOutput

pytestmark = pytest.mark.optimized

VOCAB = 31
CONFIG = ModelConfig(
  vocab_size=VOCAB, model_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, ffn_dim=24,
  context_length=500,
)  # fmt: skip
WINDOWS = dataclasses.replace(
  CONFIG, layer_kinds=(LayerKind(sliding_window=5), LayerKind()), layer_pattern=(0, 1)
)
SLOTS = 8
SAMPLINGS = [
  Sampling(),
  Sampling(temperature=1.0, seed=3),
  Sampling(temperature=0.8, top_k=9, top_p=0.9, seed=4, logit_bias=((3, 2.0),), min_tokens=30),
]


def compiled(config: ModelConfig, span: Span | None = None, **options) -> CompiledStage:
  model = NeuroLLM(config, rngs=nnx.Rngs(0))
  model = model if span is None else cut(model, span)
  options = {"context_length": 500, "buckets": (1, 4, 16), "slots": SLOTS, **options}
  return CompiledStage(model, **options)


def of_one_width(monkeypatch: pytest.MonkeyPatch, **options) -> CompiledStage:
  """A stage whose rows are taken to have the same bits in programs of one width only."""
  with monkeypatch.context() as patch:
    patch.setattr(programs, "rows_agree", lambda model: False)
    return compiled(CONFIG, **options)


@pytest.fixture(scope="module", params=["attention", "windows", "one width"])
def stage(request) -> CompiledStage:
  if request.param == "one width":
    return of_one_width(pytest.MonkeyPatch())
  return compiled(WINDOWS if request.param == "windows" else CONFIG)


@pytest.fixture(scope="module")
def halves() -> list[CompiledStage]:
  spans = [Span(first_layer=layer, last_layer=layer, num_layers=2) for layer in range(2)]
  return [compiled(WINDOWS, span) for span in spans]


class Chain:
  """The stages of a model, one after the other."""

  def __init__(self, *stages: CompiledStage):
    self.runtimes = [StageRuntime(stage) for stage in stages]

  def open(self, slot: int, sampling: Sampling, stop_ids: frozenset[int] = frozenset()) -> None:
    for runtime in self.runtimes:
      runtime.open(slot, sampling, stop_ids=stop_ids)

  def step(self, rows: list[Row]) -> list[RowOutput]:
    for runtime in self.runtimes:
      outputs = runtime.step(rows)
      for output in outputs:
        if output.error:
          raise output.error
      rows = [
        dataclasses.replace(row, hidden=o.hidden) for row, o in zip(rows, outputs, strict=True)
      ]
    return outputs


Drawn = tuple[int, float, list[int]]


@dataclasses.dataclass
class Answer:
  """An answer that goes on in a slot of a chain."""

  slot: int
  prompt: list[int]
  found: list[Drawn] = dataclasses.field(default_factory=list)

  def begin(self, chain: Chain, sampling: Sampling) -> None:
    chain.open(self.slot, sampling, frozenset({5}))
    for at in range(0, len(self.prompt), 16):
      part = np.array(self.prompt[at : at + 16], np.int32)
      is_last = at + 16 >= len(self.prompt)
      [output] = chain.step([Row(slot=self.slot, start=at, tokens=part, draws=int(is_last), top=2)])
    self.take(output)

  def row(self, draft: list[int] | None) -> Row:
    return Row(
      slot=self.slot,
      start=len(self.prompt) + len(self.found) - 1,
      tokens=np.array([self.found[-1][0]], np.int32),
      role="drawn",
      draws=1,
      top=2,
      draft=None if draft is None else np.array(draft, np.int32),
    )

  def take(self, output: RowOutput) -> None:
    columns = output.tokens.tolist(), output.logprobs.tolist(), output.tops.ids.tolist()
    self.found += zip(*columns, strict=True)


def plain(
  stages: list[CompiledStage], prompt: list[int], sampling: Sampling, count: int
) -> list[Drawn]:
  chain, answer = Chain(*stages), Answer(0, prompt)
  answer.begin(chain, sampling)
  while len(answer.found) < count:
    answer.take(chain.step([answer.row(None)])[0])
  return answer.found


def guess(rng: random.Random, truth: list[int]) -> list[int]:
  """Right, half right and wrong drafts of what follows."""
  most = rng.randrange(min(SLOTS - 1, len(truth)) + 1)
  draft = truth[:most]
  if draft and rng.random() < 0.6:
    wrong = rng.randrange(len(draft))
    draft[wrong] = (draft[wrong] + 1 + rng.randrange(VOCAB - 1)) % VOCAB
  return draft


def check(stages: list[CompiledStage], rng: random.Random, *, count: int) -> set[int]:
  """Several answers with drafts, some of them beside each other; returns how many tokens rows gave."""
  prompts = [[rng.randrange(VOCAB) for _ in range(rng.choice([1, 5, 30]))] for _ in SAMPLINGS]
  truths = [
    plain(stages, prompt, sampling, count + SLOTS)
    for prompt, sampling in zip(prompts, SAMPLINGS, strict=True)
  ]
  chain = Chain(*stages)
  slots = rng.sample(range(SLOTS), len(prompts))
  answers = [Answer(slot, prompt) for slot, prompt in zip(slots, prompts, strict=True)]
  for answer, sampling in zip(answers, SAMPLINGS, strict=True):
    answer.begin(chain, sampling)
  gave = set()
  while going := [i for i, answer in enumerate(answers) if len(answer.found) < count]:
    chosen = rng.sample(going, rng.randint(1, len(going)))
    rows = []
    for i in chosen:
      truth = [token for token, _, _ in truths[i][len(answers[i].found) :]]
      rows.append(answers[i].row(None if rng.random() < 0.2 else guess(rng, truth)))
    for i, row, output in zip(chosen, rows, chain.step(rows), strict=True):
      assert 1 <= len(output.tokens) <= 1 + row.drafts
      gave.add(len(output.tokens))
      answers[i].take(output)
  for answer, truth in zip(answers, truths, strict=True):
    assert answer.found == truth[: len(answer.found)]
  return gave


@pytest.mark.parametrize("seed", range(2))
def test_tokens_and_bits_are_those_without_drafts(stage: CompiledStage, seed: int):
  assert check([stage], random.Random(seed), count=60) >= {1, 2, 5}


def test_later_stages_go_back_to_the_drafts_that_were_right(halves: list[CompiledStage]):
  assert check(halves, random.Random(2), count=40) >= {1, 2, 4}


def test_drafts_go_round_a_ring_of_positions():
  """The rejected ones overwrote positions that are too old for every window."""
  stage = compiled(WINDOWS, context_length=500)
  [ring] = [cache for cache in stage.new_state().cache.values() if cache.is_ring]
  assert ring.capacity < 450
  rng = random.Random(7)
  prompt = [rng.randrange(VOCAB) for _ in range(ring.capacity - 20)]
  truth = plain([stage], prompt, SAMPLINGS[1], 80)
  chain, answer = Chain(stage), Answer(3, prompt)
  answer.begin(chain, SAMPLINGS[1])
  while len(answer.found) < 60:
    right = [token for token, _, _ in truth[len(answer.found) :]][: rng.randrange(3)]
    wrong = [rng.randrange(VOCAB) for _ in range(SLOTS - 1 - len(right))]
    answer.take(chain.step([answer.row(right + wrong)])[0])
  assert answer.found == truth[: len(answer.found)]


def test_a_row_may_leave_out_the_token_that_was_drawn_last(stage: CompiledStage):
  truth = plain([stage], [1, 2, 3], SAMPLINGS[1], 30)
  chain, answer = Chain(stage), Answer(1, [1, 2, 3])
  answer.begin(chain, SAMPLINGS[1])
  for draft in itertools.cycle([[], [truth[1][0]], [9, 9], None]):
    answer.take(chain.step([dataclasses.replace(answer.row(draft), tokens=None)])[0])
    if len(answer.found) > 20:
      break
  assert answer.found == truth[: len(answer.found)]


def test_rows_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch):
  def error(stage: CompiledStage, sampling: Sampling = Sampling(), **changed) -> str:
    runtime = StageRuntime(stage)
    runtime.open(0, sampling)
    runtime.step([Row(slot=0, start=0, tokens=np.array([1], np.int32), draws=1)])
    row = Row(slot=0, start=1, tokens=None, role="drawn", draws=1, draft=np.array([2], np.int32))
    [output] = runtime.step([dataclasses.replace(row, **changed)])
    assert isinstance(output.error, ValueError) and not runtime.num_sequences
    return str(output.error)

  stage = compiled(CONFIG)
  assert "expected int32" in error(stage, draft=np.array([2]))
  assert "draft 31 is outside" in error(stage, draft=np.array([31], np.int32))
  assert "8 drafts in a row: at most 7" in error(stage, draft=np.zeros(8, np.int32))
  assert "draws = 1" in error(stage, draws=2)
  assert "penalties or a mask" in error(stage, Sampling(presence_penalty=0.5))
  assert "penalties or a mask" in error(stage, allowed=np.array([2**31 - 1], np.uint32))
  mixed = dataclasses.replace(
    CONFIG,
    layer_kinds=(LayerKind(mixer="convolution"), LayerKind()),
    layer_pattern=(0, 1),
    conv_width=3,
  )
  assert "at most 0 here, as a convolution" in error(compiled(mixed))
  experts = dataclasses.replace(CONFIG, num_experts=4, experts_per_token=2)
  assert "experts" in error(compiled(experts))
  assert "programs of one width" in error(of_one_width(monkeypatch, slots=1))
  assert "'quick' programs" in error(of_one_width(monkeypatch, programs="quick"))


def test_the_next_row_waits_for_the_tokens_or_goes_back_by_drafts_at_most(
  stage: CompiledStage, halves: list[CompiledStage]
):
  one = np.array([1], np.int32)
  row = Row(slot=0, start=1, tokens=one, role="drawn", draws=1, draft=np.array([2, 3], np.int32))
  runtime = StageRuntime(stage)
  runtime.open(0, Sampling())
  runtime.step([Row(slot=0, start=0, tokens=one, draws=1)])
  pending = runtime.dispatch([row])
  [output] = runtime.step([dataclasses.replace(row, start=4)])
  assert "under way: wait" in str(output.error)
  assert pending.result()[0].error is None
  for start, fits in [(1, False), (2, True), (4, True), (5, False)]:
    first = StageRuntime(halves[0])
    first.open(0, Sampling())
    first.step(
      [
        Row(slot=0, start=0, tokens=one, draws=1),
      ]
    )
    assert first.step([row])[0].hidden.shape == (3, 16)
    [output] = first.step([dataclasses.replace(row, start=start)])
    assert (output.error is None) == fits, output.error
