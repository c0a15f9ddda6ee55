"""The generation loop over steps that only count: what it asks for, and that it closes what it opens."""

import asyncio
import contextlib
import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurojax.config import Sampling
from neurojax.engine import loop
from neurojax.engine.api import EngineError, Request, Token
from neurojax.forms import PREFILL
from neurojax.stage.step import StepInput, StepOutput


@dataclasses.dataclass(frozen=True)
class Limits:
  vocab_size: int = 1000
  context_length: int = 700
  longest_context: int = 700


class Counting:
  """Draws the last token plus 1, scores target t by -t; keeps every step and who is open."""

  def __init__(self, fail_at: int | None = None):
    self.fail_at = fail_at
    self.steps: list[StepInput] = []
    self.open_now: set[str] = set()
    self.opened = 0

  async def open(self, sequence: str, sampling: Sampling) -> None:
    self.open_now.add(sequence)
    self.opened += 1

  async def step(self, sequence: str, given: StepInput) -> StepOutput | None:
    assert sequence in self.open_now
    if len(self.steps) == self.fail_at:
      raise EngineError("told to fail")
    self.steps.append(given)
    await asyncio.sleep(0)
    if given.targets is not None:
      return StepOutput(scores=-given.targets.astype(np.float32))
    return StepOutput(token=int(given.tokens[-1]) + 1, logprob=-1.0) if given.sample else None

  async def close(self, sequence: str) -> None:
    await asyncio.sleep(0)
    self.open_now.discard(sequence)


def collect(steps: Counting, request: Request) -> list[Token]:
  async def work() -> list[Token]:
    return [token async for token in loop.generate(steps, request, Limits())]

  return asyncio.run(work())


@given(length=st.integers(1, 600), chunk=st.one_of(st.none(), st.integers(1, 400)))
def test_every_position_is_stepped_once_and_in_order(length: int, chunk: int | None):
  steps = Counting()
  prompt = [i % 100 for i in range(length)]
  tokens = collect(steps, Request(prompt=prompt, max_tokens=3, prefill_chunk=chunk))
  assert [token.id for token in tokens] == [prompt[-1] + i for i in (1, 2, 3)]
  assert [token.finish_reason for token in tokens] == [None, None, "length"]
  at = 0
  for step in steps.steps:
    assert step.start == at and 1 <= len(step.tokens) <= min(chunk or PREFILL, PREFILL)
    at += len(step.tokens)
  # The last token is drawn and never fed.
  fed = np.concatenate([step.tokens for step in steps.steps]).tolist()
  assert fed == [*prompt, *(token.id for token in tokens[:-1])]
  assert [step.is_answer for step in steps.steps[-3:]] == [False, True, True]
  assert [step.sample for step in steps.steps] == [
    step.start + len(step.tokens) >= length for step in steps.steps
  ]


@given(length=st.integers(2, 600), data=st.data())
def test_scores_are_those_of_the_tokens_from_first_on(length: int, data):
  first = data.draw(st.integers(1, length - 1))
  tokens = [i % 100 for i in range(length)]
  steps = Counting()
  found = asyncio.run(loop.score(steps, tokens, Limits(), first=first))
  assert found.tolist() == [-float(token) for token in tokens[first:]]
  assert not steps.open_now


@pytest.mark.parametrize("fail_at", [0, 1, 3])
def test_a_step_that_fails_ends_the_answer_and_closes_the_sequence(fail_at: int):
  steps = Counting(fail_at)
  with pytest.raises(EngineError, match="told to fail"):
    collect(steps, Request(prompt=[1] * 10, max_tokens=5, prefill_chunk=5))
  assert steps.opened == 1 and not steps.open_now


def test_an_answer_that_is_left_early_is_closed():
  steps = Counting()

  async def work() -> None:
    stream = loop.generate(steps, Request(prompt=[1], max_tokens=5), Limits())
    async with contextlib.aclosing(stream):
      await anext(stream)
      assert steps.open_now

  asyncio.run(work())
  assert steps.opened == 1 and not steps.open_now


def test_closing_goes_to_its_end_even_if_who_waits_is_cancelled():
  steps = Counting()

  async def work() -> None:
    async def consume() -> None:
      async for _ in loop.generate(steps, Request(prompt=[1], max_tokens=500), Limits()):
        pass

    task = asyncio.ensure_future(consume())
    for _ in range(20):
      await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
      await task
    for _ in range(5):
      await asyncio.sleep(0)
    assert steps.opened == 1 and not steps.open_now

  asyncio.run(work())


def test_what_can_never_be_served_opens_nothing():
  steps = Counting()
  with pytest.raises(ValueError, match="need 701 positions"):
    collect(steps, Request(prompt=[1] * 700, max_tokens=1))
  with pytest.raises(ValueError, match="need 701 positions"):
    asyncio.run(loop.score(steps, [1] * 702, Limits()))
  assert steps.opened == 0
