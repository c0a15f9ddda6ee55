"""Measures an engine under load: many requests at once, beside what its programs do with nobody waiting."""

import asyncio
import contextlib
import dataclasses
import datetime
import time
from collections.abc import AsyncIterator, Callable, Sequence

import jax
import numpy as np

from neurojax.config import Sampling
from neurojax.engine.api import Engine, Request
from neurojax.kernels import timing
from neurojax.stage.compile import CompiledStage
from neurojax.stage.runtime import StageRuntime
from neurojax.stage.step import Row as StepRow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One line of results.csv.

  Attributes:
    model: Name of the model or architecture.
    weights: The user's choice of weights.
    dtype: Floating-point type of activations.
    programs: "model" or "fused".
    sampling: "greedy", or temperature and filters.
    arrivals: "closed": a new request as soon as one has ended; else the mean number of requests that
      arrive in a second, at random (Poisson).
    concurrent: Requests at once; with random arrivals at most.
    requests: Requests in all.
    prompt: Mean tokens of a prompt.
    answer: Tokens of an answer.
    tokens_per_s: Tokens of answers in a second, from the first request to the last token.
    decode_tokens_per_s: The same while so many requests were answered at once: from the moment when the last
      of the first ones has its first token to the moment when the first of the last ones ends. None
      where there is no such time.
    loop_tokens_per_s: Tokens in a second of the same programs when they are called again and again and
      nobody reads what they draw; None where they are not in this process.
    share: decode_tokens_per_s, else tokens_per_s, over loop_tokens_per_s.
    first_p50_ms, first_p99_ms: Time from a request to its first token.
    gap_p50_ms, gap_p99_ms: Time between two tokens as they arrive.
    device, jax, jaxlib, date: Where and when.
  """

  model: str
  weights: str
  dtype: str
  programs: str
  sampling: str
  arrivals: str
  concurrent: int
  requests: int
  prompt: int
  answer: int
  tokens_per_s: float
  decode_tokens_per_s: float | None
  loop_tokens_per_s: float | None
  share: float | None
  first_p50_ms: float
  first_p99_ms: float
  gap_p50_ms: float
  gap_p99_ms: float
  device: str
  jax: str
  jaxlib: str
  date: str


COLUMNS: dict[str, Callable[[Row], str]] = {
  "at once": lambda row: str(row.concurrent),
  "arrivals": lambda row: row.arrivals,
  "prompt": lambda row: str(row.prompt),
  "answer": lambda row: str(row.answer),
  "  tok/s": lambda row: f"{row.tokens_per_s:,.1f}",
  "decoding": lambda row: _show(row.decode_tokens_per_s, ",.1f"),
  "programs": lambda row: _show(row.loop_tokens_per_s, ",.1f"),
  "share": lambda row: _show(row.share, ".1%"),
  "first ms": lambda row: f"{row.first_p50_ms:.1f}",
  "   p99": lambda row: f"{row.first_p99_ms:.1f}",
  "gap ms": lambda row: f"{row.gap_p50_ms:.2f}",
  " p99": lambda row: f"{row.gap_p99_ms:.2f}",
}


def headline(row: Row) -> str:
  """The model of a row and where it ran."""
  return (
    f"{row.model}, {row.weights}, {row.dtype}, {row.programs!r} programs, {row.sampling};"
    f" {row.device}, jax {row.jax}, {row.date}"
  )


def _show(value: float | None, form: str) -> str:
  return "-" if value is None else format(value, form)


@dataclasses.dataclass
class _Answer:
  """When a request came, and its tokens."""

  asked_s: float
  arrived_s: list[float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
  """Requests to measure with.

  Attributes:
    concurrent: Requests at once.
    requests: Requests in all.
    prompts: Lengths of prompts, taken in turn; their tokens are random.
    answer: Tokens of each answer.
    sampling: Settings of all; request i has its own seed.
    rate: Mean arrivals in a second; None: a new request as soon as one has ended.
  """

  concurrent: int
  requests: int
  prompts: Sequence[int]
  answer: int
  sampling: Sampling = Sampling()
  rate: float | None = None


async def measure(engine: Engine, traffic: Traffic, *, seed: int = 0) -> list[_Answer]:
  """Send requests, and note when each token arrives.

  Raises: EngineError: a request failed.
  """
  rng = np.random.default_rng(seed)
  requests = []
  for index in range(traffic.requests):
    length = traffic.prompts[index % len(traffic.prompts)]
    requests.append(
      Request(
        prompt=rng.integers(0, engine.vocab_size, length).tolist(),
        max_tokens=traffic.answer,
        sampling=dataclasses.replace(traffic.sampling, seed=index),
      )
    )
  places = asyncio.Semaphore(traffic.concurrent)

  async def one(request: Request) -> _Answer:
    answer = _Answer(time.perf_counter(), [])
    async with contextlib.aclosing(engine.generate(request)) as stream:
      async for _ in stream:
        answer.arrived_s.append(time.perf_counter())
    places.release()
    return answer

  tasks = []
  async for request in _arriving(requests, traffic, places, rng):
    tasks.append(asyncio.create_task(one(request)))
  return await asyncio.gather(*tasks)


async def _arriving(
  requests: Sequence[Request],
  traffic: Traffic,
  places: asyncio.Semaphore,
  rng: np.random.Generator,
) -> AsyncIterator[Request]:
  for request in requests:
    if traffic.rate is not None:
      await asyncio.sleep(rng.exponential(1 / traffic.rate))
    await places.acquire()
    yield request


def row(
  answers: Sequence[_Answer],
  traffic: Traffic,
  *,
  loop_tokens_per_s: float | None,
  **names: str,
) -> Row:
  """Sum up what was measured. names: The row's fields that say what ran."""
  began_s = min(answer.asked_s for answer in answers)
  ended_s = max(answer.arrived_s[-1] for answer in answers)
  tokens = sum(len(answer.arrived_s) for answer in answers)
  speed = tokens / (ended_s - began_s)
  steady = _steady(answers, traffic)
  firsts = [answer.arrived_s[0] - answer.asked_s for answer in answers]
  gaps = [gap for answer in answers for gap in np.diff(answer.arrived_s)] or [0.0]
  device = timing.origin()
  share = None if loop_tokens_per_s is None else (steady or speed) / loop_tokens_per_s
  sampling = traffic.sampling
  return Row(
    sampling="greedy"
    if sampling.temperature == 0
    else f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}",
    arrivals="closed" if traffic.rate is None else f"{traffic.rate:g}/s",
    concurrent=traffic.concurrent,
    requests=traffic.requests,
    prompt=round(float(np.mean(traffic.prompts))),
    answer=traffic.answer,
    tokens_per_s=speed,
    decode_tokens_per_s=steady,
    loop_tokens_per_s=loop_tokens_per_s,
    share=share,
    first_p50_ms=1e3 * float(np.percentile(firsts, 50)),
    first_p99_ms=1e3 * float(np.percentile(firsts, 99)),
    gap_p50_ms=1e3 * float(np.percentile(gaps, 50)),
    gap_p99_ms=1e3 * float(np.percentile(gaps, 99)),
    device=device["device"],
    jax=device["jax"],
    jaxlib=device["jaxlib"],
    date=datetime.date.today().isoformat(),
    **names,
  )


def _steady(answers: Sequence[_Answer], traffic: Traffic) -> float | None:
  """Tokens in a second while all places were taken by answers."""
  if traffic.rate is not None or len(answers) < traffic.concurrent:
    return None
  begins_s = max(answer.arrived_s[0] for answer in answers[: traffic.concurrent])
  ends_s = min(answer.arrived_s[-1] for answer in answers[-traffic.concurrent :])
  count = sum(begins_s < at_s <= ends_s for answer in answers for at_s in answer.arrived_s)
  return count / (ends_s - begins_s) if ends_s > begins_s and count else None


def loop_tokens_per_s(
  stage: CompiledStage, rows: int, context: int, *, sampling: Sampling = Sampling(), steps: int = 64
) -> float:
  """Tokens in a second of a stage's own programs, called again and again without reading what they draw.

  Args:
    stage: Holds all layers.
    rows: Sequences at once.
    context: Positions of each before the first step.
    steps: Tokens of each sequence that are timed.
  """
  runtime = StageRuntime(stage)
  draws = runtime.most_draws
  rng = np.random.default_rng(0)
  for slot in range(rows):
    runtime.open(slot, dataclasses.replace(sampling, seed=slot))
    prompt = rng.integers(0, stage.config.vocab_size, context).astype(np.int32)
    for start in range(0, context, stage.chunks[0]):
      part = prompt[start : start + stage.chunks[0]]
      is_last = start + len(part) == context
      runtime.step([StepRow(slot=slot, start=start, tokens=part, draws=int(is_last))])

  def run(calls: int, start: int) -> float:
    began_s = time.perf_counter()
    for call in range(calls):
      pending = runtime.dispatch(
        [
          StepRow(slot=slot, start=start + call * draws, tokens=None, role="drawn", draws=draws)
          for slot in range(rows)
        ]
      )
    for output in pending.result():
      if output.error is not None:
        raise output.error
    return time.perf_counter() - began_s

  warm = 2
  run(warm, context)
  calls = max(2, steps // draws)
  took_s = run(calls, context + warm * draws)
  return rows * calls * draws / took_s


def positions(prompts: Sequence[int], answer: int) -> int:
  """Positions that a context needs for this traffic and for `loop_tokens_per_s` of as many tokens."""
  return max(prompts) + max(answer, 64 + 4 * 8) + 1


def names(stage: CompiledStage, model: str, weights: str) -> dict[str, str]:
  """Fields of a row that say what ran."""
  return {
    "model": model, "weights": weights, "dtype": str(jax.numpy.dtype(stage.dtype)),
    "programs": stage.programs,
  }  # fmt: skip
