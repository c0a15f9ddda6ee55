"""Answers of a real model among others, with preemptions, kept prompts, copies and drafts, are those they have alone."""

import asyncio
import dataclasses
import random

import numpy as np
import pytest
from flax import nnx

from neurojax.config import LayerKind, ModelConfig, Sampling
from neurojax.engine.api import Request
from neurojax.engine.local import LocalEngine
from neurojax.model.neurollm import NeuroLLM
from neurojax.stage.compile import CompiledStage

VOCAB = 31
CONFIG = ModelConfig(
  vocab_size=VOCAB, model_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, ffn_dim=24,
  context_length=200,
)  # fmt: skip
MIXED = dataclasses.replace(
  CONFIG, num_layers=3, layer_kinds=(
    LayerKind(mixer="convolution"), LayerKind(sliding_window=20), LayerKind(),
  ), layer_pattern=(0, 1, 2), conv_width=3,
)  # fmt: skip


@pytest.fixture(scope="module", params=[CONFIG, MIXED], ids=["attention", "mixed"])
def stage(request) -> CompiledStage:
  model = NeuroLLM(request.param, rngs=nnx.Rngs(0))
  return CompiledStage(model, context_length=200, buckets=(1, 4, 16), slots=3, places=5)


class Odd:
  """Allows odd ids only."""

  def allowed(self, tokens):
    return np.array([0xAAAAAAAA], np.uint32)

  def accept(self, token: int) -> None:
    assert token % 2


def any_request(rng: random.Random) -> Request:
  shared = [(5 + i * i) % VOCAB for i in range(rng.choice([0, 16, 33, 80]))]
  return Request(
    prompt=[*shared, *(rng.randrange(VOCAB) for _ in range(rng.choice([1, 4, 15, 16])))],
    max_tokens=rng.choice([1, 5, 20, 60]),
    sampling=Sampling(
      seed=rng.randrange(2**64),
      temperature=rng.choice([0.7, 1.0]),
      repetition_penalty=rng.choice([1.0, 1.3]),
      frequency_penalty=rng.choice([0.0, 0.5]),
    ),
    stop_ids=frozenset(rng.sample(range(VOCAB), rng.choice([0, 2]))),
    n=rng.choice([1, 1, 2, 4]),
    top_logprobs=3,
    prompt_logprobs=rng.choice([None, None, 2]),
    priority=rng.choice([0, 0, -1, 1]),
    constraint=rng.choice([None, None, None, Odd]),
  )


async def answers(engine: LocalEngine, request: Request) -> list:
  found: list[list] = [[] for _ in range(request.n)]
  async for token in engine.generate(request):
    scores = token.prompt_scores
    scored = scores and (scores.logprobs.tolist(), scores.tops.ids.tolist())
    found[token.answer].append((token.id, token.logprob, token.tops, token.finish_reason, scored))
  return found


async def together(engine: LocalEngine, asked: list[Request]) -> list[list | None]:
  """Ask for everything while three answers of worse priority have all slots; leave every fifth early."""
  all_run = asyncio.Event()
  waiting = 3

  async def slow(key: int) -> None:
    nonlocal waiting
    request = Request(prompt=[key], max_tokens=150, priority=9, top_logprobs=3)
    async for token in engine.generate(request):
      waiting -= token.index == 0
      if not waiting:
        all_run.set()

  async def ask(number: int, request: Request) -> list | None:
    await all_run.wait()
    if number % 5 != 4:
      return await answers(engine, request)
    async for _ in engine.generate(request):
      break
    return None

  jobs = [ask(number, request) for number, request in enumerate(asked)]
  return (await asyncio.gather(*map(slow, range(3)), *jobs))[3:]


async def alone(engine: LocalEngine, request: Request) -> list:
  found = []
  for answer in range(request.n):
    own = (request.sampling.seed + answer) % 2**64
    sampling = dataclasses.replace(request.sampling, seed=own)
    scored = None if answer else request.prompt_logprobs
    one = dataclasses.replace(request, n=1, sampling=sampling, prompt_logprobs=scored)
    found += await answers(engine, one)
  return found


@pytest.mark.parametrize("seed", range(3))
def test_answers_have_the_same_bits(stage: CompiledStage, seed: int):
  rng = random.Random(seed)
  asked = [any_request(rng) for _ in range(20)]

  async def work() -> None:
    engine = LocalEngine(stage, speculate="lookup" if seed else "off")
    found = await together(engine, asked)
    load = engine.load()
    assert load.preempted >= 3 and load.cached_tokens > 0
    assert bool(load.drafts) == bool(seed and stage.most_drafts)
    await engine.close()
    for request, was in zip(asked, found, strict=True):
      cold = LocalEngine(stage)
      assert was is None or was == await alone(cold, request)
      await cold.close()

  asyncio.run(work())
