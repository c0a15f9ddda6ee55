"""An engine that a person can compute by hand, for testing what stands above engines."""

import asyncio
import math
from collections.abc import AsyncGenerator, Sequence

import numpy as np

from neurojax.engine.api import (
  EngineError,
  Request,
  StageReport,
  Token,
  check_request,
  check_score,
)


class FakeEngine:
  """Token i of an answer is (sum of the prompt + i) % vocab_size, and all tokens are equally likely.

  Args:
    longest_context: Positions that the pretended model allows; context_length if absent.
    fail_at: Raise EngineError in place of the token of this index.
    delay_s: Seconds to wait before each token.
  """

  def __init__(
    self,
    *,
    vocab_size: int = 256,
    context_length: int = 64,
    longest_context: int | None = None,
    fail_at: int | None = None,
    delay_s: float = 0.0,
  ):
    self.vocab_size, self.context_length = vocab_size, context_length
    self.longest_context = longest_context or context_length
    self.fail_at, self.delay_s = fail_at, delay_s

  async def generate(self, request: Request) -> AsyncGenerator[Token, None]:
    check_request(request, self)
    for index in range(request.max_tokens):
      await asyncio.sleep(self.delay_s)
      if index == self.fail_at:
        raise EngineError(f"the fake engine fails at token {index}, as it was told to")
      token = (sum(request.prompt) + index) % self.vocab_size
      stopped = token in request.stop_ids
      reason = "stop" if stopped else "length" if index + 1 == request.max_tokens else None
      yield Token(token, -math.log(self.vocab_size), index, reason)
      if stopped:
        return

  async def score(self, tokens: Sequence[int], *, first: int = 1) -> np.ndarray:
    check_score(tokens, first, self)
    return np.full(len(tokens) - first, -math.log(self.vocab_size), np.float32)

  async def reports(self) -> tuple[StageReport, ...]:
    return ()

  async def close(self) -> None:
    return None
