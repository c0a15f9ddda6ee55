"""The one generation loop that local and distributed engines share: it turns requests into steps."""

import asyncio
import itertools
import uuid
from collections.abc import AsyncGenerator, Sequence

import numpy as np

from neurojax.config import Sampling
from neurojax.engine.api import (
  FinishReason,
  Limits,
  Request,
  Token,
  check_request,
  check_score,
)
from neurojax.engine.steps import Steps
from neurojax.forms import PREFILL
from neurojax.stage.step import StepInput

# Holds the tasks, which the event loop itself does not.
_CLOSING: set[asyncio.Future[None]] = set()


async def generate(steps: Steps, request: Request, limits: Limits) -> AsyncGenerator[Token, None]:
  """Stream an answer, as `engine.api.Engine.generate` promises it."""
  check_request(request, limits)
  sequence = uuid.uuid4().hex
  prompt = np.asarray(request.prompt, np.int32)
  chunk = min(request.prefill_chunk or PREFILL, PREFILL)
  try:
    await steps.open(sequence, request.sampling)
    for start in range(0, len(prompt), chunk):
      part = prompt[start : start + chunk]
      is_last = start + chunk >= len(prompt)
      output = await steps.step(sequence, StepInput(start=start, tokens=part, sample=is_last))
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
      output = await steps.step(sequence, given)
  finally:
    await _release(steps, sequence)


async def score(
  steps: Steps, tokens: Sequence[int], limits: Limits, *, first: int = 1
) -> np.ndarray:
  """Score tokens after those before them, as `engine.api.Engine.score` promises it."""
  check_score(tokens, first, limits)
  ids = np.asarray(tokens, np.int32)
  sequence = uuid.uuid4().hex
  scores = []
  try:
    await steps.open(sequence, Sampling())
    for start in range(0, len(ids) - 1, PREFILL):
      part = ids[start : min(start + PREFILL, len(ids) - 1)]
      wanted = start + len(part) >= first
      targets = ids[start + 1 : start + 1 + len(part)] if wanted else None
      output = await steps.step(sequence, StepInput(start=start, tokens=part, targets=targets))
      if wanted:
        assert output is not None and output.scores is not None
        scores.append(output.scores[max(0, first - 1 - start) :])
  finally:
    await _release(steps, sequence)
  return np.concatenate(scores)


async def _release(steps: Steps, sequence: str) -> None:
  """Close a sequence, to the end even if whoever waits for it is cancelled."""
  closing = asyncio.ensure_future(steps.close(sequence))
  _CLOSING.add(closing)
  closing.add_done_callback(_CLOSING.discard)
  await asyncio.shield(closing)


def _finish(request: Request, token: int, index: int) -> FinishReason | None:
  if token in request.stop_ids:
    return "stop"
  return "length" if index + 1 == request.max_tokens else None
