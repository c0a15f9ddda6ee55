"""Compare the answers of many requests at the same time with those of each request alone, bit for bit.

python -m experiments.alone_or_together.run [--arch bonsai-8b --layers 2] [--requests 10000]
"""

import argparse
import asyncio
import dataclasses
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from neurojax.api.opening import compiled, open_file, resolve
from neurojax.config import ModelConfig, Sampling, Serving, Span
from neurojax.engine.api import Request
from neurojax.engine.local import LocalEngine
from neurojax.kernels import timing
from neurojax.measure.random_model import random_model
from neurojax.stage.compile import CompiledStage

RESULTS = Path(__file__).with_name("results.csv")
_SHORT, _LONG = 40, 600
_CONTEXT = 768


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One line of results.csv."""

  model: str
  weights: str
  programs: str
  slots: int
  requests: int
  left_early: int
  tokens: int
  differing_requests: int
  cached_tokens: int
  preempted: int
  left_over: int
  device: str
  jax: str
  jaxlib: str
  date: str


def any_request(rng: np.random.Generator, vocab_size: int) -> Request:
  """A request of a kind taken at random."""
  shared = np.arange(int(rng.choice([0, 0, 256, 512]))) * 7 % vocab_size
  own = rng.integers(0, vocab_size, int(rng.integers(1, _SHORT)))
  kind = rng.integers(4)
  sampling = Sampling(
    seed=int(rng.integers(2**63)),
    temperature=0.0 if kind == 0 else 0.9,
    top_p=0.9 if kind == 2 else 1.0,
    top_k=40 if kind == 2 else None,
    frequency_penalty=0.4 if kind == 3 else 0.0,
  )
  return Request(
    prompt=[*shared.tolist(), *own.tolist()],
    max_tokens=int(rng.integers(1, 33)),
    sampling=sampling,
    top_logprobs=int(rng.choice([0, 0, 0, 5])),
    priority=int(rng.choice([0, 0, 0, -1])),
  )


async def answer(engine: LocalEngine, request: Request, *, most: int | None = None) -> list:
  """The tokens of an answer with all that is compared; at most so many."""
  found = []
  stream = engine.generate(request)
  try:
    async for token in stream:
      found.append((token.id, np.float32(token.logprob).view(np.uint32), token.tops))
      if len(found) == most:
        break
  finally:
    await stream.aclose()
  return found


async def together(
  engine: LocalEngine, requests: list[Request], rng: np.random.Generator
) -> tuple[list, int]:
  """All requests, as many at once as the queue takes; every tenth is left after a token or two."""
  places = asyncio.Semaphore(3 * engine.load().slots)
  left = 0

  async def one(index: int, request: Request) -> list:
    nonlocal left
    async with places:
      most = None
      if index % 10 == 9:
        most, left = int(rng.integers(1, 3)), left + 1
      return await answer(engine, request, most=most)

  return list(await asyncio.gather(*(one(*item) for item in enumerate(requests)))), left


async def compare(stage: CompiledStage, requests: list[Request]) -> dict[str, int]:
  """Answer all requests both ways. Returns: What the row says of it."""
  rng = np.random.default_rng(1)
  engine = LocalEngine(stage)
  found, left = await together(engine, requests, rng)
  for _ in range(200):
    load = engine.load()
    if not (load.running or load.queued):
      break
    await asyncio.sleep(0.01)
  await engine.close()
  alone = LocalEngine(stage)
  differing = tokens = 0
  for request, was in zip(requests, found, strict=True):
    wanted = await answer(alone, request, most=len(was))
    tokens += len(was)
    differing += was != wanted
  await alone.close()
  return {
    "left_early": left, "tokens": tokens, "differing_requests": differing,
    "cached_tokens": load.cached_tokens, "preempted": load.preempted,
    "left_over": load.running + load.queued,
  }  # fmt: skip


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--model", default="neurollm")
  parser.add_argument("--arch", help="random ternary weights of an architecture instead of a model")
  parser.add_argument("--layers", type=int, help="so many layers of the architecture")
  parser.add_argument("--requests", type=int, default=200)
  parser.add_argument("--slots", type=int, default=16)
  given = parser.parse_args()
  serving = Serving(context=_CONTEXT, sequences=given.slots, prefix=2048)
  if given.arch:
    config = ModelConfig.named(given.arch)
    config = dataclasses.replace(config, num_layers=given.layers or config.num_layers)
    model = random_model(config, Span.whole(config), dtype=jnp.bfloat16, weights="w2a8")
    stage = CompiledStage(model, context_length=_CONTEXT, slots=given.slots, places=serving.places)
    name, weights = f"{given.arch}, {config.num_layers} layers", "w2a8"
  else:
    with open_file(given.model) as file:
      serving = resolve(file, serving)
      stage, name, weights = compiled(file, serving), given.model, serving.weights
  rng = np.random.default_rng(0)
  requests = [any_request(rng, stage.config.vocab_size) for _ in range(given.requests)]
  counted = asyncio.run(compare(stage, requests))
  origin = {key: value for key, value in timing.origin().items() if key in Row.__annotations__}
  row = Row(
    model=name, weights=weights, programs=stage.programs, slots=given.slots,
    requests=given.requests, **counted, **origin,
  )  # fmt: skip
  timing.append_csv(RESULTS, [row])
  print(
    f"{row.requests} requests, {row.tokens} tokens: {row.differing_requests} requests differ;"
    f" {row.left_early} left early, {row.cached_tokens} tokens cached, {row.preempted} preempted,"
    f" {row.left_over} left over ({row.model}, {row.programs!r} programs, {row.device})"
  )
  return int(row.differing_requests > 0 or row.left_over > 0)


if __name__ == "__main__":
  sys.exit(main())
