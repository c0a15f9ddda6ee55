"""The seam between whoever wants tokens and whatever computes them. Imports no JAX.

An engine speaks token ids; text is `engine.text`'s business. All engines give the same tokens for
the same model, request and seed: however many stages, streamed or collected, alone or beside others.
"""

import dataclasses
from collections.abc import AsyncGenerator, Sequence
from typing import Literal, Protocol

import numpy as np

from neurojax.config import Sampling

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """One answer wanted.

  Attributes:
    prompt: Token ids, at least one.
    max_tokens: Tokens of the answer at most, a stop token included.
    stop_ids: Ids that end the answer; the one that does is its last token.
    prefill_chunk: Prompt tokens per step; None leaves it to the engine.
  """

  prompt: Sequence[int]
  max_tokens: int
  sampling: Sampling = Sampling()
  stop_ids: frozenset[int] = frozenset()
  prefill_chunk: int | None = None


@dataclasses.dataclass(frozen=True)
class Token:
  """One token of an answer.

  Attributes:
    logprob: Natural logarithm of its probability under the untouched logits.
    finish_reason: Set on the last token: "stop" is a stop id, "length" is max_tokens.
  """

  id: int
  logprob: float
  index: int
  finish_reason: FinishReason | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageReport:
  """What one stage holds and how long its steps took; times are means over decode steps.

  Attributes:
    wire_s: From the end of the step before (the stage before, or the coordinator) to the arrival
      here; None where nothing crosses a wire. Clocks of other hosts are corrected to about half a
      round trip.
    step_s: Computing, queueing excluded. None before the first decode step.
  """

  host: str
  address: str
  first_layer: int
  last_layer: int
  weight_bytes: int
  cache_bytes: int
  decode_steps: int = 0
  step_s: float | None = None
  wire_s: float | None = None


class Engine(Protocol):
  """Computes answers. Methods raise ValueError for a request that cannot be served, EngineError
  (or a subclass) when serving it failed; an answer that was begun ends in the error, never in
  tokens computed from something missing."""

  @property
  def vocab_size(self) -> int: ...

  @property
  def context_length(self) -> int:
    """Positions that prompt and answer share."""
    ...

  def generate(self, request: Request) -> AsyncGenerator[Token, None]:
    """Stream an answer. Closing the generator early frees what it holds."""
    ...

  async def score(self, tokens: Sequence[int], *, first: int = 1) -> np.ndarray:
    """float32 [len(tokens) - first]: log p(tokens[i] | tokens[:i]) for i from `first` (>= 1) on."""
    ...

  async def reports(self) -> tuple[StageReport, ...]:
    """One per stage, in the order of the layers."""
    ...

  async def close(self) -> None:
    """End what runs and free everything; the engine serves nothing afterwards."""
    ...


class EngineError(RuntimeError):
  """Serving a request failed; the message says where and why."""


def check_request(request: Request, *, vocab_size: int, context_length: int) -> None:
  """Raises: ValueError: the request can never be served; names the value and the remedy."""
  if not request.prompt:
    raise ValueError("the prompt is empty: give at least one token (a BOS token, say)")
  bad = next((t for t in request.prompt if not 0 <= t < vocab_size), None)
  if bad is not None:
    raise ValueError(f"prompt token {bad} is outside the vocabulary of {vocab_size}")
  if request.max_tokens < 1:
    raise ValueError(f"max_tokens = {request.max_tokens}: it must be at least 1")
  if request.prefill_chunk is not None and request.prefill_chunk < 1:
    raise ValueError(f"prefill_chunk = {request.prefill_chunk}: it must be at least 1")
  total = len(request.prompt) + request.max_tokens
  if total > context_length:
    raise ValueError(
      f"prompt ({len(request.prompt)}) and answer (max_tokens = {request.max_tokens}) need {total} "
      f"positions, the context is {context_length}: shorten one, or start with a longer context"
    )
