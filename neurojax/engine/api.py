"""The seam between whoever wants tokens and whatever computes them.

An engine speaks token ids; `engine.text` turns them into text. All engines give the same tokens for
the same model, request and seed: with any number of stages, streamed or collected, alone or beside
other requests.
"""

import dataclasses
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Literal, Protocol

import numpy as np

from neurojax.config import Sampling
from neurojax.config.sampling import MOST_STOP_IDS
from neurojax.stage.step import Tops

FinishReason = Literal["stop", "length"]
MOST_ANSWERS = 128
"""Answers that one request may ask for."""
MOST_TOPS = 20
"""Likeliest tokens that may be named beside a token."""


class Constraint(Protocol):
  """Says which tokens may come next in one answer, such as those that keep it in a grammar."""

  def allowed(self, tokens: Sequence[int]) -> np.ndarray | None:
    """The tokens that may follow.

    Args:
      tokens: Ids of the answer so far; each of them was accepted.
    Returns: uint32 [ceil(V / 32)], a bit for each id, the lowest first; None: all may follow.
    """
    ...

  def accept(self, token: int) -> None:
    """Take note of the token that was drawn."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """A prompt, and how it is to be answered.

  Attributes:
    prompt: Token ids, at least one.
    max_tokens: Most tokens of the answer, a stop token included.
    sampling: Settings by which each token is drawn.
    stop_ids: Ids that end the answer; the one that does is its last token.
    n: Answers of the one prompt, which is computed once where there are slots for it. Answer i is drawn
      with the seed `(sampling.seed + i) % 2**64`, and is that of a request of its own with that seed.
    top_logprobs: Likeliest tokens to name beside each token of an answer, 20 at most.
    prompt_logprobs: Likeliest tokens to name beside each token of the prompt, whose log-probabilities
      are computed too; None computes none.
    priority: Requests with a lower number go first.
    constraint: Makes what decides, for one answer, which tokens may come next.
    id: Names the request in logs and traces; made if absent.
  """

  prompt: Sequence[int]
  max_tokens: int
  sampling: Sampling = Sampling()
  stop_ids: frozenset[int] = frozenset()
  n: int = 1
  top_logprobs: int = 0
  prompt_logprobs: int | None = None
  priority: int = 0
  constraint: Callable[[], Constraint] | None = None
  id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex, compare=False)


@dataclasses.dataclass(frozen=True)
class Scores:
  """Log-probabilities of given tokens, each after those before it.

  Attributes:
    logprobs: float32 [m], natural logarithms under the logits as the model gives them.
    tops: The likeliest tokens at the same m places, if they were asked for.
  """

  logprobs: np.ndarray
  tops: Tops | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
  """What an answer took.

  Attributes:
    prompt_tokens: Tokens of the prompt.
    cached_tokens: Those of them that were not computed for this answer.
    answer_tokens: Tokens of the answer.
  """

  prompt_tokens: int
  cached_tokens: int
  answer_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestTimes:
  """How long an answer took, in seconds.

  Attributes:
    queued_s: From the request to its slot.
    prefill_s: From the slot to the first token.
    first_token_s: From the request to the first token.
    mean_gap_s, greatest_gap_s: Between two tokens as they arrived here, where several arrive with one
      step; None for an answer of one token.
  """

  queued_s: float
  prefill_s: float
  first_token_s: float
  mean_gap_s: float | None = None
  greatest_gap_s: float | None = None


@dataclasses.dataclass(frozen=True)
class Token:
  """One token of an answer.

  Attributes:
    id: Token id.
    logprob: Natural logarithm of the token's probability under the logits as the model gives them,
      before penalties, temperature and filters.
    index: Place in the answer, from 0.
    finish_reason: Set on the last token: "stop" for a stop id, "length" for max_tokens.
    answer: Number of the answer, from 0 to `Request.n` - 1.
    tops: The likeliest tokens at this place and their log-probabilities, in falling order.
    prompt_scores: Set on the first token of answer 0 if the request has `prompt_logprobs`: the scores
      of the prompt's tokens but the first.
    usage, times: Set on the last token. Two tokens are equal whatever they took.
  """

  id: int
  logprob: float
  index: int
  finish_reason: FinishReason | None = None
  answer: int = 0
  tops: tuple[tuple[int, float], ...] = ()
  prompt_scores: Scores | None = dataclasses.field(default=None, compare=False)
  usage: Usage | None = dataclasses.field(default=None, compare=False)
  times: RequestTimes | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineLoad:
  """What an engine is busy with.

  Attributes:
    slots: Sequences that can run at the same time.
    running: Slots that are taken.
    queued: Requests that wait for their first slot.
    places: Blocks of prompts that can be kept.
    blocks: Blocks of prompts that are kept.
    refused: Requests that found the queue full, so far.
    preempted: Times that an answer had to make room for a better priority, so far.
    prompt_tokens, cached_tokens, answer_tokens: Tokens of ended answers, so far.
    drafts, right_drafts: Guesses of the next tokens that were computed, and how many were right, so far.
  """

  slots: int
  running: int = 0
  queued: int = 0
  places: int = 0
  blocks: int = 0
  refused: int = 0
  preempted: int = 0
  prompt_tokens: int = 0
  cached_tokens: int = 0
  answer_tokens: int = 0
  drafts: int = 0
  right_drafts: int = 0


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

  def generate(self, request: Request) -> AsyncGenerator[Token, int | None]:
    """Stream the answers of a request, the tokens of each in order. Closing the generator early frees
    what it holds; sending it the number of an answer (`asend`) ends that answer, and the others go on.

    Raises: Busy: the queue is full.
    """
    ...

  async def score(self, tokens: Sequence[int], *, first: int = 1, top: int = 0) -> Scores:
    """Compute log p(tokens[i] | tokens[:i]) for i from `first` (>= 1) on.

    Args:
      top: Likeliest tokens to name at each of these places.
    Returns: Scores of len(tokens) - first places.
    """
    ...

  def load(self) -> EngineLoad:
    """What the engine is busy with now."""
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


class Busy(EngineError):
  """The queue is full: the same request may be served a little later.

  Attributes:
    queued: Requests that wait.
  """

  def __init__(self, queued: int):
    super().__init__(f"busy: {queued} requests wait already, as many as may; try again later")
    self.queued = queued


def check_request(request: Request, limits: Limits) -> None:
  """Refuse a request that can never be served.

  Raises: ValueError: names the value and the remedy.
  """
  if not request.prompt:
    raise ValueError("the prompt is empty: give at least one token (a BOS token, say)")
  _check_ids("prompt token", request.prompt, limits)
  if not _is_count(request.max_tokens):
    raise ValueError(f"max_tokens = {request.max_tokens!r}: it must be a whole number, at least 1")
  _check_range("n", request.n, 1, MOST_ANSWERS)
  _check_range("top_logprobs", request.top_logprobs, 0, MOST_TOPS)
  if request.prompt_logprobs is not None:
    _check_range("prompt_logprobs", request.prompt_logprobs, 0, MOST_TOPS)
  _check_range("priority", request.priority, -(2**31), 2**31 - 1)
  _check_ids("token of logit_bias", [token for token, _ in request.sampling.logit_bias], limits)
  if request.sampling.min_tokens:
    _check_ids("stop id", sorted(request.stop_ids), limits)
    if len(request.stop_ids) > MOST_STOP_IDS:
      raise ValueError(
        f"{len(request.stop_ids)} stop ids with min_tokens: give at most {MOST_STOP_IDS}"
      )
  total = len(request.prompt) + request.max_tokens
  if total > limits.context_length:
    raise ValueError(
      f"prompt ({len(request.prompt)}) and answer (max_tokens = {request.max_tokens}) need {total} "
      f"positions, the context is {limits.context_length}: shorten one{_or_longer(limits)}"
    )


def _is_count(value: object) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_range(name: str, value: object, least: int, most: int) -> None:
  if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
    raise ValueError(f"{name} = {value!r}: it must be a whole number from {least} to {most}")


def check_score(tokens: Sequence[int], first: int, limits: Limits, top: int = 0) -> None:
  """Refuse tokens that can never be scored, as `check_request` refuses requests."""
  _check_range("top", top, 0, MOST_TOPS)
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
