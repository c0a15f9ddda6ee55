"""The seam between whoever wants tokens and whatever computes them.

An engine speaks token ids; `engine.text` turns them into text. All engines give the same tokens for
the same model, request and seed: with any number of stages, streamed or collected, alone or beside
other requests.
"""

import dataclasses
from collections.abc import AsyncGenerator, Sequence
from typing import Literal, Protocol

import numpy as np

from neurojax.config import Sampling

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """A prompt, and how it is to be answered.

  Attributes:
    prompt: Token ids, at least one.
    max_tokens: Most tokens of the answer, a stop token included.
    sampling: Settings by which each token is drawn.
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
    id: Token id.
    logprob: Natural logarithm of the token's probability under the logits as the model gives them,
      before penalties, temperature and filters.
    index: Place in the answer, from 0.
    finish_reason: Set on the last token: "stop" for a stop id, "length" for max_tokens.
  """

  id: int
  logprob: float
  index: int
  finish_reason: FinishReason | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageReport:
  """The span and memory of one stage, and the mean times of its decode steps.

  Attributes:
    host: Name of the host.
    address: Its "host:port"; empty for this process.
    first_layer: First layer of the stage's span.
    last_layer: Last layer of the span.
    weight_bytes: Bytes of the weights.
    cache_bytes: Bytes of one sequence's cache.
    decode_steps: Decode steps so far.
    step_s: Mean seconds of computing, queueing excluded. None before the first decode step.
    wire_s: Mean seconds from the end of the step before (on the previous stage, or the coordinator)
      to the arrival here; None where nothing crosses a wire. Clocks of other hosts are corrected to
      about half a round trip.
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


class Limits(Protocol):
  """Bounds that every request has to keep."""

  @property
  def vocab_size(self) -> int:
    """Number of token ids."""
    ...

  @property
  def context_length(self) -> int:
    """Positions for prompt and answer together."""
    ...

  @property
  def longest_context(self) -> int:
    """Positions that the model was made for: no engine for it has a longer context."""
    ...


class Engine(Limits, Protocol):
  """Computes answers.

  Methods raise ValueError for a request that can never be served, EngineError (or a subclass) when
  serving it failed. An answer that was begun then ends in the error: no token is ever computed from
  missing weights, a failed stage or the cache of another request.
  """

  def generate(self, request: Request) -> AsyncGenerator[Token, None]:
    """Stream an answer. Closing the generator early frees what it holds."""
    ...

  async def score(self, tokens: Sequence[int], *, first: int = 1) -> np.ndarray:
    """Compute log p(tokens[i] | tokens[:i]) for i from `first` (>= 1) on.

    Returns: float32 [len(tokens) - first], natural logarithms.
    """
    ...

  async def reports(self) -> tuple[StageReport, ...]:
    """One report per stage, in the order of the layers."""
    ...

  async def close(self) -> None:
    """End what runs and free everything; the engine serves nothing afterwards."""
    ...


class EngineError(RuntimeError):
  """Serving a request failed; the message says where and why.

  Example:
    >>> import neurojax as nj
    >>> try:
    ...   nj.connect("127.0.0.1:9")
    ... except nj.EngineError as error:
    ...   print("cannot be reached" in str(error))
    True
  """


def check_request(request: Request, limits: Limits) -> None:
  """Refuse a request that can never be served.

  Raises: ValueError: names the value and the remedy.
  """
  if not request.prompt:
    raise ValueError("the prompt is empty: give at least one token (a BOS token, say)")
  _check_ids("prompt token", request.prompt, limits)
  if not _is_count(request.max_tokens):
    raise ValueError(f"max_tokens = {request.max_tokens!r}: it must be a whole number, at least 1")
  if request.prefill_chunk is not None and request.prefill_chunk < 1:
    raise ValueError(f"prefill_chunk = {request.prefill_chunk}: it must be at least 1")
  total = len(request.prompt) + request.max_tokens
  if total > limits.context_length:
    raise ValueError(
      f"prompt ({len(request.prompt)}) and answer (max_tokens = {request.max_tokens}) need {total} "
      f"positions, the context is {limits.context_length}: shorten one{_or_longer(limits)}"
    )


def _is_count(value: object) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_score(tokens: Sequence[int], first: int, limits: Limits) -> None:
  """Refuse tokens that can never be scored, as `check_request` refuses requests."""
  if not 1 <= first < len(tokens):
    raise ValueError(f"first = {first}: it must be between 1 and {len(tokens) - 1}")
  _check_ids("token", tokens, limits)
  # The last token is only a target: no position is computed for it.
  if len(tokens) - 1 > limits.context_length:
    raise ValueError(
      f"{len(tokens)} tokens to score need {len(tokens) - 1} positions, the context is "
      f"{limits.context_length}: shorten the text{_or_longer(limits)}"
    )


def _check_ids(what: str, ids: Sequence[int], limits: Limits) -> None:
  bad = next((token for token in ids if not 0 <= token < limits.vocab_size), None)
  if bad is not None:
    raise ValueError(f"{what} {bad} is outside the vocabulary of {limits.vocab_size}")


def _or_longer(limits: Limits) -> str:
  if limits.longest_context <= limits.context_length:
    return ""
  return f", or start with a longer context (the model allows {limits.longest_context})"
