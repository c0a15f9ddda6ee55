"""The fake steps notice whatever breaks a rule of the seam; the fake engine does all that an engine does."""

import asyncio
import math

import numpy as np
import pytest

from neurojax.config import Sampling
from neurojax.engine.api import Busy, EngineError, Request
from neurojax.engine.fake import FakeEngine, FakeSteps
from neurojax.stage.step import Row
from tests.engine.virtual import expected, run


def row(start: int = 0, *tokens: int, slot: int = 0, **changes) -> Row:
  return Row(slot=slot, start=start, tokens=np.array(tokens, np.int32), **changes)


PROMPT = row(0, 1, 2, 3, 4, draws=1)
"""A prompt of one block that draws a token."""


def after(*rows: Row, **open_options):
  """Steps in which slot 0 is open and these rows were given, each in a step."""

  async def work() -> FakeSteps:
    steps = FakeSteps(places=2)
    await steps.open(0, Sampling(), **open_options)
    for one in rows:
      await steps.step([one])
    assert steps.broken == []
    return steps

  return asyncio.run(work())


DRAWN = expected(Request(prompt=[1, 2, 3, 4], max_tokens=9))
FIRST, SECOND = DRAWN[0][0], DRAWN[1][0]
MASK = np.full(4, 2**32 - 1, np.uint32)


@pytest.mark.parametrize(
  ("before", "bad", "named"),
  [
    ([], [], "no rows"),
    ([], [PROMPT, PROMPT], "two rows of a slot"),
    ([], [row(0, 1, slot=1)], "not open"),
    ([], [row(4, 1)], "starts at 4, the slot holds 0"),
    ([], [row(0, 1, 2, 3, 4, 5)], "has 5 tokens"),
    ([row(0, 1, 2)], [row(2, 3)], "starts at 2"),
    ([], [row(0, 1, draws=2)], "draws 2"),
    ([], [row(0, 1, keep=(0,))], "1 places for 0 blocks"),
    ([], [row(0, 1, 2, 3, 4, keep=(9,))], "place 9"),
    ([], [row(0, 1, 2, targets=np.array([1], np.int32))], "targets"),
    ([PROMPT], [row(4, 5)], "after its answer began"),
    ([PROMPT], [row(4, FIRST, role="drawn", draws=5)], "draws 5"),
    ([PROMPT], [row(4, FIRST, role="drawn", draws=0)], "draws 0"),
    ([PROMPT], [row(4, FIRST + 1, role="drawn", draws=1)], "was drawn"),
    ([PROMPT], [row(4, FIRST, role="drawn", draws=2, allowed=MASK)], "with a mask"),
    ([PROMPT], [row(4, FIRST, role="replayed", draws=1)], "replayed after one was drawn"),
    ([row(0, 1, 2, 3, 4)], [row(4, FIRST, role="drawn", draws=1)], "was not drawn"),
    ([row(0, 1, 2, 3, 4)], [row(4, FIRST + 1, role="replayed", draws=1)], "is replayed"),
    ([], [row(0, 1, seen=np.array([7], np.int32), draws=1)], "was told"),
  ],
)
def test_what_breaks_a_rule_is_noted_and_raised(before, bad, named):
  steps = after(*before)
  with pytest.raises(AssertionError, match=named):
    asyncio.run(steps.step(bad))
  assert len(steps.broken) == 1 and named in steps.broken[0]


def test_slots_and_places_are_checked_when_a_slot_is_opened():
  steps = after(row(0, 1, 2, 3, 4, keep=(1,)))
  for options, named in [
    ({"slot": 0}, "opened twice"),
    ({"slot": 9}, "there are 4"),
    ({"slot": 1, "restore": [0]}, "nothing is kept in place 0"),
    ({"slot": 1, "restore": [1, 1]}, "holds the block at 0"),
    ({"slot": 1, "copy": (3, 4)}, "not open"),
    ({"slot": 1, "copy": (0, 5)}, "5 positions are copied of fewer"),
  ]:
    with pytest.raises(AssertionError, match=named):
      asyncio.run(steps.open(sampling=Sampling(), **options))
  assert len(steps.broken) == 6


def test_kept_and_copied_positions_give_the_same_tokens():
  async def work() -> list[list[int]]:
    steps = FakeSteps(places=1)
    for slot, options in [(0, {}), (1, {"restore": [0]}), (2, {"copy": (0, 4)})]:
      await steps.open(slot, Sampling(), **options)
      if not slot:
        await steps.step([row(0, 1, 2, 3, 4, keep=(0,))])
    told = np.array([1, 2, 3, 4], np.int32)
    rows = [row(4, 5, slot=i, draws=1, seen=told if i else None) for i in range(3)]
    outputs = await steps.step(rows)
    assert steps.broken == []
    return [output.tokens.tolist() for output in outputs]

  first, *others = run(work())
  assert others == [first, first]
  assert first == [expected(Request(prompt=[1, 2, 3, 4, 5], max_tokens=1))[0][0]]


def test_a_replayed_token_goes_on_as_the_drawn_one_did():
  drawn = after(PROMPT, Row(slot=0, start=4, tokens=None, role="drawn", draws=3))
  replayed = after(row(0, 1, 2, 3, 4), row(4, FIRST, SECOND, role="replayed", draws=2))
  assert drawn.open_slots[0].states == replayed.open_slots[0].states
  assert drawn.open_slots[0].drawn == replayed.open_slots[0].drawn


def test_the_fake_engine_does_all_that_an_engine_does():
  async def work() -> None:
    engine = FakeEngine(vocab_size=10, slots=2)
    request = Request(prompt=[4, 5], max_tokens=3, n=3, top_logprobs=2, prompt_logprobs=1)
    tokens = [token async for token in engine.generate(request)]
    for answer in range(3):
      own = [token for token in tokens if token.answer == answer]
      assert [token.id for token in own] == [9, 0, 1]
      assert own[-1].usage.answer_tokens == 3 and own[-1].times.first_token_s >= 0
      assert all(token.tops == ((0, own[0].logprob), (1, own[0].logprob)) for token in own)
    assert tokens[0].logprob == pytest.approx(-math.log(10))
    assert tokens[0].prompt_scores.logprobs.shape == (1,)
    scores = await engine.score([1, 2, 3], top=4)
    assert scores.tops.ids.shape == (2, 4)
    assert engine.load().slots == 2 and engine.load().queued == 0
    await engine.close()
    with pytest.raises(EngineError, match="closed"):
      await engine.score([1, 2])

  asyncio.run(work())


def test_the_fake_engine_can_be_busy():
  async def work() -> None:
    engine = FakeEngine(slots=1, queue=0, delay_s=0.001)
    tokens = engine.generate(Request(prompt=[1], max_tokens=9))
    await anext(tokens)
    with pytest.raises(Busy):
      await engine.score([1, 2])
    await tokens.aclose()
    await engine.score([1, 2])

  asyncio.run(work())
