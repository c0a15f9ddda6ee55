"""Continuous batching over steps that hash: every answer is that of its request alone, and nothing leaks."""

import asyncio
import contextlib
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurojax.config import Sampling
from neurojax.engine.api import Busy, EngineError, Request
from neurojax.engine.fake import FakeSteps
from tests.engine.virtual import (
  VOCAB,
  batch,
  check_clean,
  collect,
  expected,
  expected_scores,
  mask,
  run,
  settle,
)


def prompt(length: int, key: int = 0) -> list[int]:
  return [(key * 31 + i * i + 7 * i) % VOCAB for i in range(length)]


def requests(most: int = 6):
  """Requests that share beginnings, with every kind of need."""
  return st.lists(
    st.builds(
      lambda length, key, max_tokens, seed, stops, n, top, scores, priority: Request(
        prompt=prompt(length, key),
        max_tokens=max_tokens,
        sampling=Sampling(seed=seed),
        stop_ids=frozenset(stops),
        n=n,
        top_logprobs=top,
        prompt_logprobs=scores,
        priority=priority,
      ),
      length=st.integers(1, 40),
      key=st.integers(0, 2),
      max_tokens=st.integers(1, 25),
      seed=st.sampled_from([0, 1, 2**64 - 1]),
      stops=st.lists(st.integers(0, VOCAB - 1), max_size=12),
      n=st.sampled_from([1, 1, 2, 3, 7]),
      top=st.integers(0, 3),
      scores=st.sampled_from([None, None, 0, 2]),
      priority=st.integers(-1, 1),
    ),
    min_size=1,
    max_size=most,
  )


def sizes():
  return st.fixed_dictionaries(
    {
      "slots": st.integers(1, 5),
      "chunks": st.sampled_from([(4,), (4, 8), (5, 10, 40), (64,)]),
      "most_draws": st.integers(1, 6),
      "places": st.sampled_from([0, 1, 3, 20]),
      "ahead": st.integers(1, 4),
      "chains": st.booleans(),
    }
  )


@settings(max_examples=300)
@given(
  sizes(),
  requests(),
  st.sampled_from([None, 1, 2, 3]),
  st.lists(st.integers(0, 30), min_size=6, max_size=6),
)
def test_each_answer_is_that_of_its_request_alone(sizes, asked, cohorts, delays):
  async def work() -> None:
    steps = FakeSteps(latency_s=lambda rows: 1.0, **sizes)
    engine = batch(steps, cohorts=cohorts)

    async def ask(request: Request, delay: int) -> list:
      await asyncio.sleep(delay)
      return await collect(engine, request)

    found = await asyncio.gather(*map(ask, asked, delays))
    await asyncio.sleep(100)
    for request, answers in zip(asked, found, strict=True):
      assert answers == [expected(request, answer) for answer in range(request.n)]
    check_clean(engine, steps)
    load = engine.load()
    assert load.prompt_tokens == sum(len(request.prompt) * request.n for request in asked)
    assert load.answer_tokens == sum(len(answer) for answers in found for answer in answers)

  run(work())


@settings(max_examples=100)
@given(sizes(), st.integers(2, 60), st.integers(0, 4), st.data())
def test_scores_are_those_from_first_on_with_the_likeliest_beside_them(sizes, length, top, data):
  first = data.draw(st.integers(1, length - 1))
  tokens = prompt(length)

  async def work() -> None:
    steps = FakeSteps(**sizes)
    engine = batch(steps)
    scores, _ = await asyncio.gather(
      engine.score(tokens, first=first, top=top),
      collect(engine, Request(prompt=prompt(9), max_tokens=9)),
    )
    await settle(engine, steps)
    assert scores.logprobs.tolist() == expected_scores(tokens, first)
    assert scores.logprobs.dtype == np.float32
    if top:
      assert scores.tops is not None and scores.tops.ids.shape == (length - first, top)
    else:
      assert scores.tops is None

  run(work())


@given(sizes(), st.integers(1, 50), st.sampled_from([0, 1, 3]), st.integers(1, 3))
def test_a_prompt_is_scored_beside_its_answers(sizes, length, top, n):
  request = Request(prompt=prompt(length), max_tokens=3, prompt_logprobs=top, n=n, top_logprobs=2)

  async def work() -> None:
    steps = FakeSteps(**sizes)
    engine = batch(steps)
    # Blocks that are kept already are computed once more, for their scores.
    await collect(engine, Request(prompt=prompt(length), max_tokens=1))
    tokens = [token async for token in engine.generate(request)]
    scored = [token for token in tokens if token.prompt_scores is not None]
    assert [(token.answer, token.index) for token in scored] == [(0, 0)]
    scores = scored[0].prompt_scores
    assert scores.logprobs.tolist() == expected_scores(request.prompt)
    assert (scores.tops is None) == (top == 0)
    if top:
      assert scores.tops.logprobs.shape == scores.tops.ids.shape == (length - 1, top)
    assert all(len(token.tops) == 2 for token in tokens)
    await settle(engine, steps)

  run(work())


class EveryThird:
  """Allows the ids that leave a remainder, which moves on with each token."""

  def __init__(self) -> None:
    self.accepted: list[int] = []

  @staticmethod
  def ids(tokens) -> set[int]:
    return {token for token in range(VOCAB) if token % 3 == len(tokens) % 3}

  def allowed(self, tokens):
    # One object serves an answer from its beginning to its end, or to the point where it began anew.
    assert list(tokens) == self.accepted
    return None if len(tokens) == 2 else mask(self.ids(tokens))

  def accept(self, token: int) -> None:
    self.accepted.append(token)


def constrained(tokens) -> set[int]:
  return set(range(VOCAB)) if len(tokens) == 2 else EveryThird.ids(tokens)


@given(sizes(), st.integers(1, 20), st.integers(1, 12), st.integers(1, 3))
def test_a_constraint_says_what_may_come_next_in_its_answer_alone(sizes, length, most, n):
  bound = Request(prompt=prompt(length), max_tokens=most, n=n, constraint=EveryThird)
  free = Request(prompt=prompt(length), max_tokens=most)
  # It preempts the others, whose masks then have to be the same.
  urgent = Request(prompt=prompt(5, 1), max_tokens=4, priority=-1, n=5)

  async def work() -> None:
    steps = FakeSteps(latency_s=lambda rows: 1.0, **sizes)
    engine = batch(steps)

    async def later():
      await asyncio.sleep(9)
      return await collect(engine, urgent)

    found = await asyncio.gather(collect(engine, bound), collect(engine, free), later())
    assert found[0] == [expected(bound, answer, constrained) for answer in range(n)]
    assert found[1] == [expected(free)]
    assert found[2] == [expected(urgent, answer) for answer in range(5)]
    await settle(engine, steps)

  run(work())


def test_a_constraint_that_fails_ends_its_request_alone():
  class Broken(EveryThird):
    def allowed(self, tokens):
      if len(tokens) == 3:
        raise KeyError("no such state")
      return super().allowed(tokens)

  async def work() -> None:
    steps = FakeSteps()
    engine = batch(steps)
    bound = Request(prompt=prompt(9), max_tokens=9, constraint=Broken)
    free = Request(prompt=prompt(9), max_tokens=30)
    failed, found = await asyncio.gather(
      collect(engine, bound), collect(engine, free), return_exceptions=True
    )
    assert isinstance(failed, EngineError) and "no such state" in str(failed)
    assert found == [expected(free)]
    await settle(engine, steps)

  run(work())


@given(sizes(), st.integers(1, 90))
def test_the_rows_of_a_prompt_lie_on_the_grid_and_its_positions_are_given_once(sizes, length):
  steps = FakeSteps(**sizes | {"places": 0})
  request = Request(prompt=prompt(length), max_tokens=5)
  assert run(collect(batch(steps), request)) == [expected(request)]
  rows = [row for rows in steps.given for row in rows]
  prompts = [row for row in rows if row.role == "prompt"]
  assert np.concatenate([row.tokens for row in prompts]).tolist() == request.prompt
  chunks = sizes["chunks"]
  # It is alone, so the longest rows that fit are taken.
  for row in prompts:
    fitting = [chunk for chunk in chunks if chunk <= length - row.start]
    assert row.length == (fitting[-1] if fitting else length - row.start)
  assert sum(row.draws for row in rows) == 5
  assert [row.draws for row in prompts] == [0] * (len(prompts) - 1) + [1]


def test_answers_go_on_beside_a_long_prompt():
  steps = FakeSteps(chunks=(4, 32), slots=3, most_draws=8, latency_s=lambda rows: 1.0)
  answer = Request(prompt=prompt(3), max_tokens=240)
  long = Request(prompt=prompt(400, 1), max_tokens=1)

  async def work() -> None:
    engine = batch(steps)

    async def later() -> list:
      await asyncio.sleep(10)
      return await collect(engine, long)

    found = await asyncio.gather(collect(engine, answer), later())
    assert found == [[expected(answer)], [expected(long)]]

  run(work())
  roles = [{row.role for row in rows} for rows in steps.given]
  first = next(i for i, rows in enumerate(steps.given) if rows[0].slot == 1)
  last = max(i for i, rows in enumerate(steps.given) if rows[0].slot == 1)
  beside = roles[first : last + 1]
  decoded = [i for i, role in enumerate(beside) if role == {"drawn"}]
  assert len(decoded) > 30
  # While the answer goes on, rows of the prompt are short and never two in a row.
  assert decoded == list(range(1, decoded[-1] + 1, 2))
  during = steps.given[first : first + decoded[-1]]
  assert {rows[0].length for rows in during if rows[0].role == "prompt"} == {4}
  assert {rows[0].draws for rows in during if rows[0].role == "drawn"} == {2}
  assert {row.length for rows in steps.given[first + decoded[-1] + 1 :] for row in rows} >= {32}
  # Nothing waits at first: rows draw as much as they may.
  assert {rows[0].draws for rows in steps.given[1 : first - 3]} == {8}


def test_the_shortest_prompt_goes_first_and_the_better_priority_before_it():
  steps = FakeSteps(slots=4, latency_s=lambda rows: 1.0)
  asked = [
    Request(prompt=prompt(length, length), max_tokens=1, priority=priority)
    for length, priority in [(40, 0), (12, 0), (3, 0), (60, -1)]
  ]

  async def work() -> None:
    engine = batch(steps)
    await asyncio.gather(*(collect(engine, request) for request in asked))

  run(work())
  # The first is open a moment before the others.
  slots = [rows[0].slot for rows in steps.given]
  assert slots == [0] * 2 + [3] * 15 + [2] + [1] * 3 + [0] * 8


def test_a_step_holds_the_answers_of_all_whatever_they_need():
  steps = FakeSteps(slots=6, most_draws=4, latency_s=lambda rows: 1.0)
  asked = [
    Request(prompt=prompt(3, i), max_tokens=30 + i, top_logprobs=i, sampling=Sampling(seed=i))
    for i in range(5)
  ]
  asked.append(Request(prompt=prompt(3, 5), max_tokens=10, constraint=EveryThird))

  async def work() -> None:
    engine = batch(steps)
    await asyncio.gather(*(collect(engine, request) for request in asked))

  run(work())
  widest = max(steps.given, key=len)
  assert len(widest) == 6 and {row.draws for row in widest} == {4, 1}
  assert [row.top for row in widest] == [0, 1, 2, 3, 4, 0]
  assert steps.most_under_way == 2


def test_cohorts_keep_each_answer_in_one_step_at_a_time():
  steps = FakeSteps(slots=7, most_draws=1, ahead=3, chains=False, latency_s=lambda rows: 1.0)

  async def work() -> None:
    engine = batch(steps)
    asked = [Request(prompt=prompt(3, i), max_tokens=40) for i in range(7)]
    found = await asyncio.gather(*(collect(engine, request) for request in asked))
    assert found == [[expected(request)] for request in asked]

  run(work())
  together = [rows for rows in steps.given if rows[0].role == "drawn"]
  assert all(len(rows) <= 3 for rows in together)
  middle = together[20:-20]
  for trio in zip(middle, middle[1:], middle[2:], strict=False):
    slots = [row.slot for rows in trio for row in rows]
    assert len({*slots}) == len(slots) == 7
  assert all(row.tokens is not None for rows in middle for row in rows)


def test_the_queue_is_bounded_and_ordered_by_priority_and_arrival():
  steps = FakeSteps(slots=1, latency_s=lambda rows: 1.0)

  async def work() -> None:
    engine = batch(steps, queue=3)
    ended: list[int] = []

    async def ask(name: int, priority: int) -> None:
      await collect(engine, Request(prompt=prompt(3, name), max_tokens=9, priority=priority))
      ended.append(name)

    tasks = [asyncio.create_task(ask(0, -5))]
    await asyncio.sleep(2)
    for name, priority in [(1, 1), (2, 0), (3, 0)]:
      tasks.append(asyncio.create_task(ask(name, priority)))
    await asyncio.sleep(1)
    assert engine.load().queued == 3
    with pytest.raises(Busy, match=r"3 requests wait already.*try again later") as busy:
      await collect(engine, Request(prompt=[1], max_tokens=1, priority=-9))
    assert busy.value.queued == 3
    with pytest.raises(Busy):
      await engine.score([1, 2, 3])
    await asyncio.gather(*tasks)
    assert ended == [0, 2, 3, 1] and engine.load().refused == 2
    await settle(engine, steps)

  run(work())


@pytest.mark.parametrize("ahead", [1, 2, 4])
@pytest.mark.parametrize("chunks", [(4,), (64,)])
@pytest.mark.parametrize("chains", [True, False])
def test_a_better_priority_takes_the_slot_of_the_worst_which_goes_on_later(ahead, chunks, chains):
  steps = FakeSteps(
    slots=2, ahead=ahead, chunks=chunks, places=3, chains=chains, latency_s=lambda rows: 1.0
  )
  slow = [Request(prompt=prompt(11, i), max_tokens=200, priority=i) for i in (1, 2)]
  urgent = [Request(prompt=prompt(5, i), max_tokens=20) for i in (3, 4, 5)]

  async def work() -> None:
    engine = batch(steps)
    ended: list[Request] = []

    async def ask(request: Request) -> list:
      found = await collect(engine, request)
      ended.append(request)
      return found

    tasks = [asyncio.create_task(ask(request)) for request in slow]
    await asyncio.sleep(20)
    tasks.append(asyncio.create_task(ask(urgent[0])))
    await asyncio.sleep(6)
    assert engine.load().preempted == 1
    tasks += [asyncio.create_task(ask(request)) for request in urgent[1:]]
    found = await asyncio.gather(*tasks)
    assert found == [[expected(request)] for request in [*slow, *urgent]]
    assert {*map(id, ended[:3])} == {*map(id, urgent)} and ended[-1] is slow[1]
    assert engine.load().preempted == 2
    # Where a step can go on from the last one, tokens are drawn once more; else given in one row.
    replayed = [row for rows in steps.given for row in rows if row.role == "replayed"]
    assert len(replayed) == (0 if chains else 2)
    draws = sum(row.draws for rows in steps.given for row in rows)
    assert (draws > 2 * 200 + 3 * 20) and (chains or draws <= 2 * 200 + 3 * 20 + 2)
    await settle(engine, steps)

  run(work())


@pytest.mark.parametrize("chains", [True, False])
def test_what_comes_out_otherwise_after_a_preemption_is_an_error(chains: bool):
  class Fickle(FakeSteps):
    def draw(self, slot):
      token, logprob = super().draw(slot)
      return token, logprob - (len(self.given) > 25)

  steps = Fickle(slots=1, chains=chains, latency_s=lambda rows: 1.0)

  async def work() -> None:
    engine = batch(steps)
    slow = asyncio.create_task(
      collect(engine, Request(prompt=prompt(3), max_tokens=80, priority=1))
    )
    await asyncio.sleep(12)
    await collect(engine, Request(prompt=prompt(3), max_tokens=80))
    with pytest.raises(EngineError, match="after a preemption"):
      await slow
    await settle(engine, steps)

  run(work())


# ---- the prefix cache


def computed(steps: FakeSteps) -> int:
  return sum(row.length for rows in steps.given for row in rows if row.role == "prompt")


@pytest.mark.parametrize("chunks", [(4,), (4, 16)])
def test_a_second_turn_computes_only_what_is_new(chunks):
  steps = FakeSteps(chunks=chunks, places=30)
  first = Request(prompt=prompt(50), max_tokens=6)
  longer = Request(prompt=[*prompt(50), *prompt(10, 2)], max_tokens=6)

  async def work() -> None:
    engine = batch(steps)
    assert await collect(engine, first) == [expected(first)]
    assert computed(steps) == 50
    tokens = [token async for token in engine.generate(longer)]
    assert [(token.id, token.logprob) for token in tokens] == expected(longer)
    assert tokens[-1].usage == dataclasses.replace(
      tokens[-1].usage, prompt_tokens=60, cached_tokens=48, answer_tokens=6
    )
    assert computed(steps) == 50 + 12
    # One token is computed even of a prompt that is kept to its end.
    exact = Request(prompt=prompt(48), max_tokens=6)
    assert await collect(engine, exact) == [expected(exact)]
    assert computed(steps) == 62 + 4
    await settle(engine, steps)
    assert engine.load().blocks == 12 + 3

  run(work())


@pytest.mark.parametrize("places", [0, 20])
@pytest.mark.parametrize("chunks", [(4,), (4, 16)])
@pytest.mark.parametrize(("length", "shared"), [(41, 40), (48, 44), (3, 0)])
def test_many_answers_of_a_prompt_compute_it_once_but_its_last_block(
  places, chunks, length, shared
):
  steps = FakeSteps(slots=5, places=places, chunks=chunks, latency_s=lambda rows: 1.0)
  request = Request(prompt=prompt(length), max_tokens=9, n=5, sampling=Sampling(seed=2**64 - 2))
  found = run(collect(batch(steps), request))
  assert found == [expected(request, answer) for answer in range(5)]
  assert len({tuple(answer) for answer in found}) == 5
  assert computed(steps) == shared + 5 * (length - shared)


def test_requests_that_share_a_beginning_wait_for_it_rather_than_compute_it_again():
  steps = FakeSteps(slots=4, places=40, latency_s=lambda rows: 1.0)
  asked = [Request(prompt=[*prompt(40), *prompt(5, i)], max_tokens=9) for i in range(4)]

  async def work() -> None:
    engine = batch(steps)
    found = await asyncio.gather(*(collect(engine, request) for request in asked))
    assert found == [[expected(request)] for request in asked]

  run(work())
  assert computed(steps) == 40 + 4 * 5


@pytest.mark.parametrize("places", [1, 2, 9, 10, 20])
def test_nobody_waits_for_blocks_that_cannot_be_kept_or_are_kept(places):
  steps = FakeSteps(places=places, latency_s=lambda rows: 1.0)
  long = Request(prompt=prompt(41), max_tokens=400)
  short = Request(prompt=prompt(41), max_tokens=1)

  async def work() -> None:
    engine = batch(steps)
    first = asyncio.create_task(collect(engine, long))
    await asyncio.sleep(0)
    assert await collect(engine, short) == [expected(short)]
    assert asyncio.get_running_loop().time() < 40 and not first.done()
    assert await first == [expected(long)]
    await settle(engine, steps)

  run(work())


def test_nobody_waits_for_what_a_worse_priority_computes():
  steps = FakeSteps(places=40, latency_s=lambda rows: 1.0)

  async def work() -> None:
    engine = batch(steps)
    slow = asyncio.create_task(
      collect(engine, Request(prompt=prompt(41), max_tokens=1, priority=1))
    )
    await asyncio.sleep(3)
    await collect(engine, Request(prompt=prompt(41), max_tokens=1))
    assert not slow.done()
    await slow
    await settle(engine, steps)

  run(work())
  slots = [rows[0].slot for rows in steps.given]
  first = slots.index(1)
  # It begins with what is kept by then, and its rows go first.
  assert 0 < first < 8 and slots == [0] * first + [1] * slots.count(1) + [0] * (11 - first)
  assert steps.given[first][0].start > 0


def test_what_a_stage_lost_is_computed_again():
  steps = FakeSteps(places=20)
  request = Request(prompt=prompt(30), max_tokens=5)

  async def work() -> None:
    engine = batch(steps)
    assert await collect(engine, request) == [expected(request)]
    steps._forgotten |= steps._kept.keys()
    steps._kept.clear()
    assert await collect(engine, request) == [expected(request)]
    assert computed(steps) == 60
    await settle(engine, steps)

  run(work())


# ---- failures and ends


def test_a_row_that_fails_ends_its_request_alone():
  steps = FakeSteps(slots=3, spoils=lambda number, row: row.slot == 1 and row.role == "drawn")
  asked = [Request(prompt=prompt(9, i), max_tokens=30) for i in range(3)]

  async def work() -> None:
    engine = batch(steps)
    found = await asyncio.gather(
      *(collect(engine, request) for request in asked), return_exceptions=True
    )
    assert isinstance(found[1], EngineError)
    assert [found[0], found[2]] == [[expected(asked[0])], [expected(asked[2])]]
    await settle(engine, steps)

  run(work())


@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize("number", [0, 2, 4, 9])
def test_a_step_that_fails_ends_those_in_it_and_later_requests_are_served(ahead, number):
  steps = FakeSteps(slots=2, ahead=ahead, places=9, fails=lambda step: step == number)
  asked = [Request(prompt=prompt(9, i), max_tokens=40) for i in range(3)]

  async def work() -> None:
    engine = batch(steps)
    found = await asyncio.gather(
      *(collect(engine, request) for request in asked), return_exceptions=True
    )
    failed = [error for error in found if isinstance(error, EngineError)]
    assert 1 <= len(failed) <= 2 and all("told to" in str(error) for error in failed)
    for request, answers in zip(asked, found, strict=True):
      assert isinstance(answers, EngineError) or answers == [expected(request)]
    for request in asked:
      assert await collect(engine, request) == [expected(request)]
    await settle(engine, steps)

  run(work())


def test_a_step_that_fails_ends_those_in_the_steps_behind_it():
  steps = FakeSteps(slots=2, chains=False, most_draws=1, places=9, fails=lambda step: step == 12)
  asked = [Request(prompt=prompt(9, i), max_tokens=40) for i in range(2)]

  async def work() -> None:
    engine = batch(steps)
    found = await asyncio.gather(
      *(collect(engine, request) for request in asked), return_exceptions=True
    )
    # Each step has a row of one of them.
    assert [{row.slot for row in rows} for rows in steps.given[12:14]] in ([{0}, {1}], [{1}, {0}])
    assert all(isinstance(error, EngineError) and "told to" in str(error) for error in found)
    await settle(engine, steps)

  run(work())


def test_a_slot_that_could_not_be_closed_is_closed_before_it_is_used_again(caplog):
  class Stubborn(FakeSteps):
    refusals = 2

    async def close(self, slot: int) -> None:
      if self.refusals:
        self.refusals -= 1
        raise EngineError("the stage cannot be reached")
      await super().close(slot)

  steps = Stubborn(slots=1)
  request = Request(prompt=prompt(9), max_tokens=5)

  async def work() -> None:
    engine = batch(steps)
    assert await collect(engine, request) == [expected(request)]
    with pytest.raises(EngineError, match="cannot be reached"):
      await collect(engine, request)
    assert await collect(engine, request) == [expected(request)]
    await settle(engine, steps)

  run(work())
  assert "slot 0 could not be closed" in caplog.text


@settings(max_examples=200)
@given(sizes(), st.integers(0, 60), st.booleans(), requests(4))
def test_a_request_that_is_left_frees_its_slots_whenever_that_is(sizes, moment, is_task, asked):
  async def work() -> None:
    steps = FakeSteps(latency_s=lambda rows: 1.0, **sizes)
    engine = batch(steps)
    others = [asyncio.create_task(collect(engine, request)) for request in asked[1:]]
    if is_task:
      task = asyncio.create_task(collect(engine, asked[0]))
      await asyncio.sleep(moment / 2)
      task.cancel()
      with contextlib.suppress(asyncio.CancelledError):
        await task
    else:
      async with contextlib.aclosing(engine.generate(asked[0])) as tokens:
        for _ in range(moment):
          if await anext(tokens, None) is None:
            break
    for request, other in zip(asked[1:], others, strict=True):
      assert await other == [expected(request, answer) for answer in range(request.n)]
    await settle(engine, steps)

  run(work())


def test_what_is_left_is_free_when_closing_it_returns():
  async def work() -> None:
    steps = FakeSteps(latency_s=lambda rows: 1.0)
    engine = batch(steps)
    async with contextlib.aclosing(
      engine.generate(Request(prompt=prompt(9), max_tokens=90))
    ) as tokens:
      await anext(tokens)
      assert engine.load().running == 1 and steps.open_slots
    assert engine.load().running == 0 and not steps.open_slots
    await asyncio.sleep(0)
    check_clean(engine, steps)

  run(work())


def test_closing_what_has_ended_does_not_wait_for_its_slot():
  async def work() -> None:
    steps = FakeSteps(latency_s=lambda rows: 100.0)
    engine = batch(steps)
    [(stop, _)] = expected(Request(prompt=prompt(3), max_tokens=1))
    request = Request(prompt=prompt(3), max_tokens=90, stop_ids=frozenset([stop]))
    async with contextlib.aclosing(engine.generate(request)) as tokens:
      assert (await anext(tokens)).finish_reason == "stop"
    # A step behind the stop is under way.
    assert asyncio.get_running_loop().time() == 100.0 and engine.load().running == 1
    await settle(engine, steps)

  run(work())


def test_steps_that_are_cancelled_from_within_end_their_requests():
  class Ending(FakeSteps):
    has_ended = False

    async def open(self, slot: int, sampling: Sampling, **how) -> None:
      if self.has_ended:
        raise asyncio.CancelledError
      await super().open(slot, sampling, **how)

    async def step(self, rows):
      if len(self.given) == 9:
        self.has_ended = True
        raise asyncio.CancelledError
      return await super().step(rows)

  steps = Ending(slots=2)

  async def work() -> None:
    engine = batch(steps)
    asked = [Request(prompt=prompt(9, i), max_tokens=90) for i in range(4)]
    found = await asyncio.gather(
      *(collect(engine, request) for request in asked), return_exceptions=True
    )
    assert all(isinstance(error, EngineError) for error in found)
    await settle(engine, steps)

  run(work())


def test_closing_ends_every_request_with_an_error():
  async def work() -> None:
    steps = FakeSteps(slots=2, latency_s=lambda rows: 1.0)
    engine = batch(steps)
    asked = [Request(prompt=prompt(9, i), max_tokens=90, n=2) for i in range(4)]
    tasks = [asyncio.create_task(collect(engine, request)) for request in asked]
    await asyncio.sleep(9)
    await engine.close()
    await engine.close()
    check_clean(engine, steps)
    for found in await asyncio.gather(*tasks, return_exceptions=True):
      assert isinstance(found, EngineError) and "engine is closed" in str(found)
    with pytest.raises(EngineError, match="engine is closed"):
      await collect(engine, asked[0])

  run(work())


def test_closing_does_not_wait_for_ever_for_a_step_that_hangs():
  async def work() -> None:
    steps = FakeSteps(latency_s=lambda rows: 1e9)
    engine = batch(steps, close_s=7.0)
    task = asyncio.create_task(collect(engine, Request(prompt=[1], max_tokens=1)))
    await asyncio.sleep(1)
    await engine.close()
    assert asyncio.get_running_loop().time() == 8.0
    with pytest.raises(EngineError, match="engine is closed"):
      await task

  run(work())


def test_it_serves_in_a_new_event_loop_after_one_that_ended_in_the_middle():
  steps = FakeSteps(slots=2, places=5)
  engine = batch(steps)
  request = Request(prompt=prompt(9), max_tokens=50, stop_ids=frozenset(range(0, VOCAB, 5)))

  async def leave() -> None:
    asyncio.create_task(collect(engine, Request(prompt=[1], max_tokens=500)))  # noqa: RUF006
    await collect(engine, request)

  for _ in range(4):
    run(leave())
  assert run(collect(engine, request)) == [expected(request)]
  assert steps.broken == []


def test_what_can_never_be_served_opens_nothing():
  async def work() -> None:
    steps = FakeSteps()
    engine = batch(steps)
    with pytest.raises(ValueError, match="need 4097 positions"):
      await collect(engine, Request(prompt=[1] * 4096, max_tokens=1))
    with pytest.raises(ValueError, match="need 4097 positions"):
      await engine.score([1] * 4098)
    check_clean(engine, steps)
    assert steps.given == []

  run(work())


def test_times_are_those_of_the_clock():
  steps = FakeSteps(slots=1, most_draws=2, ahead=1, latency_s=lambda rows: 1.0)

  async def work() -> None:
    engine = batch(steps)
    first = Request(prompt=prompt(4), max_tokens=1)
    second = Request(prompt=prompt(8), max_tokens=5)

    async def ask(request: Request) -> list:
      return [token async for token in engine.generate(request)]

    (one,), five = await asyncio.gather(ask(first), ask(second))
    assert (one.times.queued_s, one.times.prefill_s, one.times.first_token_s) == (0, 1, 1)
    assert one.times.mean_gap_s is None and one.times.greatest_gap_s is None
    times = five[-1].times
    assert (times.queued_s, times.prefill_s, times.first_token_s) == (1, 2, 3)
    assert (times.mean_gap_s, times.greatest_gap_s) == (0.5, 1)

  run(work())
