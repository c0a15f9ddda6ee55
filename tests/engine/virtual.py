"""An event loop whose clock jumps to the next thing that happens, and what a fake model answers."""

import asyncio
import dataclasses
import itertools
from collections.abc import Coroutine
from typing import Any, TypeVar

import numpy as np

from neurojax.engine.api import Request
from neurojax.engine.batch import Batch
from neurojax.engine.fake import FakeSlot, FakeSteps

T = TypeVar("T")
VOCAB = 97
CONTEXT = 4096


class VirtualLoop(asyncio.SelectorEventLoop):
  """Waiting takes no time; what is due at the same moment happens in the order in which it was asked for."""

  now_s = 0.0

  def time(self) -> float:
    return self.now_s

  def _run_once(self) -> None:
    if not self._ready and self._scheduled:
      self.now_s = max(self.now_s, self._scheduled[0]._when)
    super()._run_once()


def run(work: Coroutine[Any, Any, T]) -> T:
  with asyncio.Runner(loop_factory=VirtualLoop) as runner:
    return runner.run(work)


@dataclasses.dataclass(frozen=True)
class Limits:
  vocab_size: int = VOCAB
  context_length: int = CONTEXT
  longest_context: int = CONTEXT


def batch(steps: FakeSteps, **options: Any) -> Batch:
  return Batch(steps, Limits(), clock=lambda: asyncio.get_running_loop().time(), **options)


MODEL = FakeSteps(vocab_size=VOCAB)


def expected(request: Request, answer: int = 0, allowed=None) -> list[tuple[int, float]]:
  """Tokens and log-probabilities of an answer, computed one position after another.

  Args:
    allowed: Ids that may follow the answer so far; None: all.
  """
  seed = (request.sampling.seed + answer) % 2**64
  slot = FakeSlot(dataclasses.replace(request.sampling, seed=seed), request.stop_ids)
  for token in request.prompt:
    MODEL._feed(slot, "prompt", token)
  found: list[tuple[int, float]] = []
  while len(found) < request.max_tokens:
    token, logprob = MODEL.draw(slot)
    if allowed is not None:
      while token not in allowed(slot.drawn):
        token = (token + 1) % VOCAB
    found.append((token, logprob))
    if token in request.stop_ids:
      break
    slot.drawn.append(token)
    MODEL._feed(slot, "drawn", token)
  return found


def expected_scores(tokens, first: int = 1) -> list[float]:
  slot = FakeSlot(Request(prompt=[1], max_tokens=1).sampling, frozenset())
  found = []
  for token, target in itertools.pairwise(tokens):
    MODEL._feed(slot, "prompt", token)
    found.append(MODEL.score(slot.states[-1], target))
  return found[first - 1 :]


def mask(ids) -> np.ndarray:
  bits = np.zeros(-(-VOCAB // 32), np.uint32)
  for token in ids:
    bits[token // 32] |= np.uint32(1 << token % 32)
  return bits


async def collect(engine: Batch, request: Request) -> list[list[tuple[int, float]]]:
  """The tokens and log-probabilities of each answer; their places and ends are checked."""
  found: list[list[tuple[int, float]]] = [[] for _ in range(request.n)]
  ended = [False] * request.n
  async for token in engine.generate(request):
    assert token.index == len(found[token.answer]) and not ended[token.answer]
    found[token.answer].append((token.id, token.logprob))
    ended[token.answer] = token.finish_reason is not None
    is_stop = token.id in request.stop_ids
    is_last = token.index + 1 == request.max_tokens
    assert token.finish_reason == ("stop" if is_stop else "length" if is_last else None)
    assert (token.usage is None) == (token.finish_reason is None) == (token.times is None)
  assert all(ended)
  return found


def check_clean(engine: Batch, steps: FakeSteps) -> None:
  """Nothing is left of what ran, and no rule was broken."""
  assert steps.broken == [] and steps.most_under_way <= steps.ahead
  assert steps.open_slots == {}
  load = engine.load()
  assert (load.running, load.queued) == (0, 0)
  assert engine._line == [] and not engine._tickets and not engine._helpers
  assert sorted(engine._free) == list(range(steps.slots))
  index = engine._index
  assert index.free + len(index) == steps.places and not index._claims
  assert all(block.pins == 0 and block.is_written for block in index._blocks.values())
  assert {block.place for block in index._blocks.values()} <= steps._kept.keys()


async def settle(engine: Batch, steps: FakeSteps) -> None:
  """Wait until steps under way came back; nothing is left then."""
  await asyncio.sleep(1000)
  check_clean(engine, steps)
