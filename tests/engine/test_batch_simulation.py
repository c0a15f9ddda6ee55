"""Thousands of requests that come, fail and go at random: each ends once, as if it had been alone."""

import asyncio
import collections
import contextlib
import dataclasses
import random

import pytest

from neurojax.config import Sampling
from neurojax.engine.api import Busy, EngineError, Request
from neurojax.engine.batch import Batch
from neurojax.engine.fake import FakeSteps
from tests.engine.virtual import VOCAB, batch, expected, expected_scores, run, settle


@dataclasses.dataclass(frozen=True)
class World:
  """How a simulation goes.

  Attributes:
    requests: Number of requests.
    gap_s: Mean time between two of them; a step takes about 1 second.
    cancels: Share of requests that are left at a random moment.
    fails, spoils: Share of steps and of rows that fail.
  """

  seed: int
  requests: int = 1200
  gap_s: float = 4.0
  queue: int = 12
  cancels: float = 0.2
  fails: float = 0.002
  spoils: float = 0.001
  slots: int = 5
  chunks: tuple[int, ...] = (4, 16)
  most_draws: int = 4
  places: int = 24
  ahead: int = 2
  chains: bool = True
  cohorts: int | None = None


WORLDS = [
  World(1),
  World(2, ahead=3, chains=False, most_draws=1, slots=9, gap_s=3.0),
  World(3, places=0, ahead=1, chunks=(8,), gap_s=6.0),
  World(4, cancels=0.9, gap_s=1.5, queue=4),
  World(5, fails=0.03, spoils=0.02, places=200, ahead=4, cohorts=2),
  World(6, slots=1, gap_s=12.0, requests=600),
  # Everybody comes at once.
  World(7, slots=3, gap_s=0.0, queue=2000, cancels=0.3, requests=600),
]


def any_request(rng: random.Random) -> Request:
  shared = [(rng.randrange(3) * 5 + i * i) % VOCAB for i in range(rng.choice([0, 8, 24, 40]))]
  own = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, 3, 9, 30]))]
  stops = rng.sample(range(VOCAB), rng.choice([0, 0, 5]))
  return Request(
    prompt=[*shared, *own],
    max_tokens=rng.choice([1, 2, 5, 20, 60]),
    sampling=Sampling(seed=rng.randrange(2**64)),
    stop_ids=frozenset(stops),
    n=rng.choice([1, 1, 1, 1, 2, 7]),
    top_logprobs=rng.choice([0, 0, 2]),
    prompt_logprobs=rng.choice([None, None, None, 1]),
    priority=rng.choice([0, 0, 0, -1, 2]),
  )


async def ask(engine: Batch, request: Request) -> str:
  """Follow a request to its end, and compare whatever comes."""
  found = collections.defaultdict(list)
  ended = 0
  try:
    async with contextlib.aclosing(engine.generate(request)) as tokens:
      async for token in tokens:
        assert token.index == len(found[token.answer])
        found[token.answer].append((token.id, token.logprob))
        ended += token.finish_reason is not None
    assert ended == request.n
    return "served"
  except Busy:
    assert not found
    return "refused"
  except EngineError as error:
    assert "told to" in str(error) or "lost" in str(error)
    return "failed"
  except asyncio.CancelledError:
    return "left"
  finally:
    for answer, tokens in found.items():
      whole = expected(request, answer)
      assert tokens == whole[: len(tokens)] and (len(tokens) == len(whole) or ended < request.n)


async def rate(engine: Batch, tokens: list[int]) -> str:
  try:
    scores = await engine.score(tokens, first=3, top=1)
    assert scores.logprobs.tolist() == expected_scores(tokens, 3)
    return "served"
  except Busy:
    return "refused"
  except EngineError as error:
    assert "told to" in str(error) or "lost" in str(error)
    return "failed"
  except asyncio.CancelledError:
    return "left"


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: f"seed {world.seed}")
def test_every_request_ends_once_and_nothing_leaks(world: World):
  rng = random.Random(world.seed)
  steps = FakeSteps(
    vocab_size=VOCAB,
    slots=world.slots,
    chunks=world.chunks,
    most_draws=world.most_draws,
    places=world.places,
    ahead=world.ahead,
    chains=world.chains,
    latency_s=lambda rows: rng.choice([0.0, 0.5, 1.0, 2.0]),
    fails=lambda number: rng.random() < world.fails,
    spoils=lambda number, row: rng.random() < world.spoils,
  )

  async def leave(task: asyncio.Task[str], after_s: float) -> None:
    await asyncio.sleep(after_s)
    task.cancel()

  async def work() -> collections.Counter[str]:
    engine = batch(steps, queue=world.queue, cohorts=world.cohorts)
    tasks, leavers = [], []
    for _ in range(world.requests):
      await asyncio.sleep(rng.expovariate(1 / world.gap_s) if world.gap_s else 0)
      request = any_request(rng)
      is_score = rng.random() < 0.1 and len(request.prompt) > 3
      job = rate(engine, [*request.prompt]) if is_score else ask(engine, request)
      tasks.append(asyncio.create_task(job))
      if rng.random() < world.cancels:
        after_s = rng.choice([0, rng.uniform(0, 10), rng.uniform(0, 200)])
        leavers.append(asyncio.create_task(leave(tasks[-1], after_s)))
      load = engine.load()
      assert load.queued <= world.queue and load.running <= world.slots
      assert load.blocks <= world.places
    ends = collections.Counter(await asyncio.gather(*tasks))
    await asyncio.gather(*leavers)
    await settle(engine, steps)
    ends["preempted"] = engine.load().preempted
    ends["cached"] = engine.load().cached_tokens
    return ends

  ends = run(work())
  assert sum(ends[end] for end in ("served", "refused", "failed", "left")) == world.requests
  # The world is one in which all of it happens.
  assert ends["served"] > 20 and ends["left"] > 20 and ends["failed"] > 0
  assert ends["preempted"] > 0 and ends["cached"] > 0
  assert ends["refused"] > 0 or world.queue > 1000


@pytest.mark.parametrize("ahead", [1, 3])
def test_no_prompt_starves_however_many_short_ones_come(ahead: int):
  """Two slots go to short prompts for ever; the long one must end after about twice its own rows."""
  steps = FakeSteps(slots=3, ahead=ahead, latency_s=lambda rows: 1.0)
  long = Request(prompt=[i % VOCAB for i in range(80)], max_tokens=1)

  async def work() -> None:
    engine = batch(steps)

    async def short(key: int) -> None:
      while True:
        async for _ in engine.generate(Request(prompt=[key, 1], max_tokens=1)):
          pass

    others = [asyncio.create_task(short(key)) for key in range(8)]
    await asyncio.sleep(20)
    before = len(steps.given)
    async for _ in engine.generate(long):
      pass
    assert len(steps.given) - before <= 8 + 2 * 20 + 3
    for other in others:
      other.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await settle(engine, steps)

  run(work())


def test_who_waits_gets_a_slot_in_the_order_of_arrival():
  rng = random.Random(0)
  steps = FakeSteps(slots=4, latency_s=lambda rows: rng.choice([0.5, 1.0]))
  asked = [
    Request(prompt=[number % VOCAB, 1], max_tokens=rng.choice([1, 30])) for number in range(200)
  ]

  async def work() -> list[float]:
    engine = batch(steps, queue=500)

    async def queued_s(request: Request) -> float:
      times = [token.times async for token in engine.generate(request)][-1]
      assert times is not None
      return times.queued_s

    return await asyncio.gather(*map(queued_s, asked))

  waits = run(work())
  assert waits == sorted(waits) and waits[:4] == [0.0] * 4 and waits[4] > 0
