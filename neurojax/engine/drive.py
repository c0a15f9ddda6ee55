"""From a request to steps: the one generation loop that local and distributed engines share."""

import abc
import asyncio
import itertools
import uuid
from collections.abc import AsyncGenerator, Sequence

import numpy as np

from neurojax.config import Sampling
from neurojax.engine.api import Request, StageReport, Token, check_request
from neurojax.forms import PREFILL
from neurojax.stage.step import StepInput, StepOutput

# Holds the tasks, which the event loop itself does not.
_CLOSING: set[asyncio.Future[None]] = set()


class DrivenEngine(abc.ABC):
  """An `engine.api.Engine` for whatever can open a sequence, step it and close it."""

  @property
  @abc.abstractmethod
  def vocab_size(self) -> int: ...

  @property
  @abc.abstractmethod
  def context_length(self) -> int: ...

  @abc.abstractmethod
  async def reports(self) -> tuple[StageReport, ...]: ...

  @abc.abstractmethod
  async def close(self) -> None: ...

  @abc.abstractmethod
  async def _open(self, sequence: str, sampling: Sampling) -> None:
    """Make room on every stage."""

  @abc.abstractmethod
  async def _step(self, sequence: str, given: StepInput) -> StepOutput | None:
    """Advance a sequence through every stage.

    A step that asks for nothing may return None before it is done; steps of one sequence are
    carried out in order, and a failure is raised by this or a later step.
    """

  @abc.abstractmethod
  async def _close(self, sequence: str) -> None:
    """Free a sequence on every stage that can be reached."""

  async def _release(self, sequence: str) -> None:
    """`_close`, to its end even if whoever waits for it is cancelled."""
    closing = asyncio.ensure_future(self._close(sequence))
    _CLOSING.add(closing)
    closing.add_done_callback(_CLOSING.discard)
    await asyncio.shield(closing)

  async def generate(self, request: Request) -> AsyncGenerator[Token, None]:
    check_request(request, vocab_size=self.vocab_size, context_length=self.context_length)
    sequence = uuid.uuid4().hex
    prompt = np.asarray(request.prompt, np.int32)
    chunk = min(request.prefill_chunk or PREFILL, PREFILL)
    try:
      await self._open(sequence, request.sampling)
      for start in range(0, len(prompt), chunk):
        part = prompt[start : start + chunk]
        is_last = start + chunk >= len(prompt)
        output = await self._step(sequence, StepInput(start=start, tokens=part, sample=is_last))
      for index in itertools.count():
        assert output is not None and output.token is not None and output.logprob is not None
        token = Token(output.token, output.logprob, index, _finish(request, output.token, index))
        yield token
        if token.finish_reason:
          return
        given = StepInput(
          start=len(prompt) + index,
          tokens=np.array([token.id], np.int32),
          is_answer=True,
          sample=True,
        )
        output = await self._step(sequence, given)
    finally:
      await self._release(sequence)

  async def score(self, tokens: Sequence[int], *, first: int = 1) -> np.ndarray:
    if not 1 <= first < len(tokens):
      raise ValueError(f"first = {first}: it must be between 1 and {len(tokens) - 1}")
    # The last token is only a target, so `len(tokens) - 1` positions are computed.
    check_request(
      Request(prompt=tokens[:-1], max_tokens=1),
      vocab_size=self.vocab_size,
      context_length=self.context_length + 1,
    )
    if not 0 <= tokens[-1] < self.vocab_size:
      raise ValueError(f"token {tokens[-1]} is outside the vocabulary of {self.vocab_size}")
    ids = np.asarray(tokens, np.int32)
    sequence = uuid.uuid4().hex
    scores = []
    try:
      await self._open(sequence, Sampling())
      for start in range(0, len(ids) - 1, PREFILL):
        part = ids[start : min(start + PREFILL, len(ids) - 1)]
        wanted = start + len(part) >= first
        targets = ids[start + 1 : start + 1 + len(part)] if wanted else None
        output = await self._step(sequence, StepInput(start=start, tokens=part, targets=targets))
        if wanted:
          assert output is not None and output.scores is not None
          scores.append(output.scores[max(0, first - 1 - start) :])
    finally:
      await self._release(sequence)
    return np.concatenate(scores)


def _finish(request: Request, token: int, index: int):
  if token in request.stop_ids:
    return "stop"
  return "length" if index + 1 == request.max_tokens else None
