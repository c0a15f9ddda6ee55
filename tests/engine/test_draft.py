"""Guesses: what a lookup finds, how guesses are judged, and answers that no guess changes."""

import asyncio
import collections
import random
from collections.abc import Iterable

import pytest

from neurojax.config import Sampling
from neurojax.engine.api import Request
from neurojax.engine.draft import SIZES, Guesses, Lookup
from neurojax.engine.fake import FakeSteps
from neurojax.engine.pace import Pace
from neurojax.stage.step import Row
from tests.engine.virtual import VOCAB, batch, check_clean, collect, expected, mask, run, settle


def searched(tokens: list[int], most: int, lengths: Iterable[int]) -> list[int]:
  """What a lookup proposes, by going through everything."""
  for length in lengths:
    last = tokens[len(tokens) - length :]
    for at in range(len(tokens) - 1, length - 1, -1):
      if tokens[at - length : at] == last:
        draft: list[int] = []
        while len(draft) < most:
          draft.append((tokens[at:] + draft)[len(draft)])
        return draft
  return []


@pytest.mark.parametrize("seed", range(5))
def test_a_lookup_finds_what_a_search_finds(seed: int):
  rng = random.Random(seed)
  longest = rng.randrange(1, 5)
  shortest = rng.randrange(1, longest + 1)
  lookup, tokens = Lookup(longest=longest, shortest=shortest), []
  found = 0
  for _ in range(200):
    part = [rng.randrange(rng.choice([2, 6])) for _ in range(rng.randrange(4))]
    lookup.accept(part)
    tokens += part
    most = rng.randrange(1, 9)
    proposed = lookup.propose(most)
    assert proposed == searched(tokens, most, range(longest, shortest - 1, -1))
    found += bool(proposed)
  assert found > 20


def test_a_lookup_forgets_the_oldest_places():
  lookup = Lookup(longest=2, shortest=2, most=8)
  lookup.accept([1, 2, 3])
  lookup.accept(range(10, 15))
  lookup.accept([1, 2])
  assert lookup.propose(2) == [3, 10]
  lookup.accept(range(20, 40))
  lookup.accept([1, 2])
  assert lookup.propose(2) == []
  assert len(lookup._after) <= 8


class Told:
  """Knows how the answers to some prompts go on, and says so, half or not at all."""

  def __init__(self, answers: dict[tuple[int, ...], list[int]], rng: random.Random):
    self._answers, self._rng = answers, rng
    self._prompt: tuple[int, ...] | None = None
    self._at = 0

  def accept(self, tokens: Iterable[int]) -> None:
    if self._prompt is None:
      self._prompt = tuple(tokens)
    else:
      self._at += len(list(tokens))

  def propose(self, most: int) -> list[int]:
    rng = self._rng
    draft = self._answers[self._prompt][self._at : self._at + rng.randrange(most + 1)]
    if draft and rng.random() < 0.5:
      draft[rng.randrange(len(draft))] = rng.randrange(VOCAB)
    return draft


def any_request(rng: random.Random, number: int) -> Request:
  return Request(
    prompt=[number, *(rng.randrange(VOCAB) for _ in range(rng.choice([1, 5, 20])))],
    max_tokens=rng.choice([1, 2, 3, 9, 40]),
    sampling=Sampling(
      seed=rng.randrange(2**64), presence_penalty=rng.choice([0, 0, 0, 0.5]),
    ),
    stop_ids=frozenset(rng.sample(range(VOCAB), rng.choice([0, 4]))),
    top_logprobs=rng.choice([0, 2]),
    priority=rng.choice([0, 0, 0, -1, 1]),
  )  # fmt: skip


@pytest.mark.parametrize("is_always", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_answers_are_those_without_guesses(seed: int, is_always: bool):
  rng = random.Random(seed)
  asked = [any_request(rng, number) for number in range(60)]
  truths = {
    tuple(r.prompt): [token for token, _ in expected(r)] + [rng.randrange(VOCAB)] * 20
    for r in asked
  }
  steps = FakeSteps(
    vocab_size=VOCAB, slots=rng.choice([1, 3, 5]), most_drafts=7, ahead=rng.choice([1, 2]),
    places=8, latency_s=lambda rows: 0.1 + max(row.draws for row in rows),
  )  # fmt: skip

  async def ask(engine, number: int, request: Request) -> None:
    await asyncio.sleep(rng.random() * 40)
    if number % 6:
      assert await collect(engine, request) == [expected(request)]
      return
    async for _ in engine.generate(request):
      break

  async def work() -> None:
    engine = batch(steps, make_drafter=lambda: Told(truths, rng), always_drafts=is_always)
    await asyncio.gather(*(ask(engine, *given) for given in enumerate(asked)))
    await settle(engine, steps)
    assert engine.load().preempted
    check_clean(engine, steps)
    await engine.close()

  run(work())
  drafted = [row for rows in steps.given for row in rows if row.drafts]
  assert len(drafted) > (50 if is_always else 5) and max(row.drafts for row in drafted) > 2


def test_a_constraint_goes_on_without_guesses_beside_others():
  class Even:
    def allowed(self, tokens):
      return mask(range(0, VOCAB, 2))

    def accept(self, token: int) -> None:
      assert token % 2 == 0

  free = Request(prompt=[1, 2], max_tokens=60, sampling=Sampling(seed=5))
  bound = Request(prompt=[3], max_tokens=60, sampling=Sampling(seed=6), constraint=Even)
  truths = {(1, 2): [token for token, _ in expected(free)]}
  steps = FakeSteps(vocab_size=VOCAB, most_drafts=7, latency_s=lambda rows: 1.0)

  async def work() -> None:
    engine = batch(steps, make_drafter=lambda: Told(truths, random.Random(0)), always_drafts=True)
    found = await asyncio.gather(collect(engine, free), collect(engine, bound))
    allowed = lambda drawn: range(0, VOCAB, 2)  # noqa: E731
    assert found == [[expected(free)], [expected(bound, allowed=allowed)]]
    await engine.close()

  run(work())
  assert any(row.drafts for rows in steps.given if len(rows) == 2 for row in rows)


def spent(
  wide_s: float, is_right: bool, *, count: int = 1, drafts: bool = True
) -> tuple[float, int]:
  """Seconds that long answers take, and the number of drafts; a draft beside a row takes `wide_s` more."""
  asked = [
    Request(prompt=[number, 1], max_tokens=1500, sampling=Sampling(seed=number))
    for number in range(count)
  ]
  truths = {tuple(r.prompt): [token for token, _ in expected(r)] for r in asked}

  class Sure(Told):
    def propose(self, most: int) -> list[int]:
      draft = self._answers[self._prompt][self._at : self._at + most]
      return draft if is_right else [(token + 1) % VOCAB for token in draft]

  def latency_s(rows) -> float:
    return max(row.draws for row in rows) + wide_s * sum(row.drafts for row in rows)

  steps = FakeSteps(vocab_size=VOCAB, most_drafts=7, slots=4, most_draws=8, latency_s=latency_s)

  async def work() -> float:
    engine = batch(steps, make_drafter=(lambda: Sure(truths, random.Random(0))) if drafts else None)
    began_s = asyncio.get_running_loop().time()
    await asyncio.gather(*(collect(engine, request) for request in asked))
    took_s = asyncio.get_running_loop().time() - began_s
    await engine.close()
    return took_s

  took_s = run(work())
  return took_s, sum(row.drafts for rows in steps.given for row in rows)


def test_guesses_that_are_right_and_cheap_are_given():
  plain_s, none = spent(0.1, True, drafts=False)
  took_s, drafts = spent(0.1, True)
  # Eight tokens a step of 1.7 seconds.
  assert none == 0 and drafts > 1000 and took_s < 0.3 * plain_s
  took_s, _ = spent(0.1, True, count=3)
  assert took_s < 0.7 * spent(0.1, True, count=3, drafts=False)[0]


@pytest.mark.parametrize("wide_s, is_right", [(0.1, False), (1.0, True), (1.0, False), (3.0, True)])
@pytest.mark.parametrize("count", [1, 3])
def test_guesses_that_do_not_pay_cost_little(wide_s: float, is_right: bool, count: int):
  plain_s, _ = spent(wide_s, is_right, count=count, drafts=False)
  took_s, _ = spent(wide_s, is_right, count=count)
  assert took_s < plain_s / 0.97


def test_the_rows_that_drafts_leave_no_room_for_have_none():
  pace = Pace(3)
  right = Guesses(Told({(): list(range(90))}, random.Random(0)), [])
  for _ in range(20):
    right.accept(0)
  for rows in range(1, 8):
    size = Pace(3, always=True).size([right] * rows)
    assert (size in SIZES and rows + size <= 4) if rows < 4 else size == 0
  assert pace.size([right]) == 0  # Nothing is measured yet.
  plain = Row(slot=0, start=1, tokens=None, role="drawn", draws=8)
  for _ in range(2):
    pace.took([plain], 8.0)
  assert pace.size([None]) == 0


def test_guesses_are_judged_as_steps_would_have_judged_them():
  prompt = [1, 2, 3, 4, 5, 6, 7, 8] * 2
  guesses = Guesses(Lookup(), prompt)
  for token in (prompt * 8)[: 16 * 5]:
    guesses.accept(token)
  assert guesses.share == 1 and [guesses.right(size) for size in SIZES] == pytest.approx(SIZES)
  counts: collections.Counter[int] = collections.Counter()
  strange = Guesses(Lookup(), prompt)
  for token in range(100, 150):
    strange.accept(token)
    counts[token] += 1
  assert strange.share < 0.05 and strange.right(1) == 0
