"""One answer, or the scoring of one text, on its way through a batch: its next row, its last output."""

import dataclasses
import math
from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Literal

import numpy as np

from neurojax.config import Sampling
from neurojax.engine.api import (
  Constraint,
  EngineError,
  FinishReason,
  Request,
  RequestTimes,
  Scores,
  Token,
  Usage,
)
from neurojax.engine.draft import Guesses, MakeDrafter
from neurojax.engine.prefix import Block, block_keys
from neurojax.engine.ticket import Ticket
from neurojax.model.sample import counts_tokens
from neurojax.stage.step import Row, RowOutput, Tops

Phase = Literal["queued", "waiting", "opening", "prompt", "answer"]
"""Where a sequence is: without a slot; in a slot that is not open yet; being opened; in its prompt; in
its answer, which begins when the last row of the prompt is given."""


@dataclasses.dataclass(frozen=True)
class Part:
  """A row that was given, whose it is and which blocks it keeps.

  Attributes:
    is_guessing: Whether it would have had drafts, had there been a guess.
  """

  sequence: "Sequence"
  row: Row
  blocks: Items[Block] = ()
  is_guessing: bool = False


class Sequence:
  """Gives the rows of one sequence in order and takes their outputs.

  One that had to leave its slot begins anew with its prompt, and what it had drawn either is drawn once
  more or, if `replays`, given in one row but for the last token, which spares a round trip for each. Both
  run the program that drew it at first. Whatever is drawn twice has to be equal, to the last bit of its
  log-probability.

  Attributes:
    ticket: The request that it belongs to.
    answer: Number of the answer.
    prompt: int32 ids.
    keys: Names of the prompt's whole blocks.
    block: Tokens of a block.
    last_block: Position at which the row begins that ends the prompt.
    slot: None without one.
    at: Positions that were given.
    flying: Steps under way with a row of it.
    given: Tokens of the answer that were asked for since it has its slot.
    holds: Sequences that are being opened as a copy of it.
    is_over: Whether it has ended.
    is_preempted: Whether it has to leave its slot and go back to the queue.
    guessed: Drafts under way, of which it is not known how many are right.
    guesses: Guesses of its answer; None: it takes no drafts.
    passed: Prompt rows of others that went before its own.
    turn: Number of the last step with a row of it.
  """

  def __init__(
    self,
    ticket: "Ticket[Sequence]",
    prompt: np.ndarray,
    *,
    block: int,
    answer: int = 0,
    max_tokens: int = 0,
    sampling: Sampling = Sampling(),
    stop_ids: frozenset[int] = frozenset(),
    top: int = 0,
    targets: np.ndarray | None = None,
    first: int = 1,
    score_top: int = 0,
    constrain: Callable[[], Constraint] | None = None,
    replays: bool = False,
    make_drafter: MakeDrafter | None = None,
  ):
    self.ticket, self.answer, self.prompt, self.block = ticket, answer, prompt, block
    self.max_tokens, self.sampling, self.stop_ids, self.top = max_tokens, sampling, stop_ids, top
    self.targets, self.first, self.score_top = targets, first, score_top
    self.constraint, self._constrain = constrain() if constrain else None, constrain
    self._replays = replays
    # Penalties count what was drawn before, and a constraint wants to see it.
    is_free = constrain is None and not counts_tokens(sampling)
    self._make_drafter = make_drafter if is_free else None
    self.guesses: Guesses | None = None
    # What is only scored keeps nothing: a text is seldom scored twice.
    self.keys = block_keys(prompt, block) if max_tokens else ()
    self.last_block = (len(prompt) - 1) // block * block
    self.phase: Phase = "queued"
    self.slot: int | None = None
    self.is_over = self.is_preempted = False
    self.tokens: list[int] = []
    self._logprobs: list[float] = []
    self.holds = self.passed = self.turn = 0
    self.cached: int | None = None
    self._prompt_scores: Scores | None = None
    self._admitted_s: float | None = None
    self._first_s = self._last_s = 0.0
    self._greatest_gap_s = 0.0
    self.reset()

  @property
  def order(self) -> tuple[int, int, int]:
    """Sequences go in this order where it is free to choose."""
    return self.ticket.priority, self.ticket.number, self.answer

  @property
  def is_leaving(self) -> bool:
    """Whether it gives no rows any more and its slot is to be freed."""
    return self.is_over or self.is_preempted

  @property
  def reads_cache(self) -> bool:
    """Whether what was computed for others may stand for its prompt; not while that is to be scored."""
    return self.targets is None or self._prompt_scores is not None

  @property
  def wants_draws(self) -> bool:
    """Whether rows of its answer are still to be given."""
    return self.phase == "answer" and not self.is_leaving and self.given < self.max_tokens

  @property
  def knows_last(self) -> bool:
    """Whether the tokens that were asked for have all come."""
    return self._came >= self.given

  def reset(self) -> None:
    """Begin anew in another slot.

    Raises: what the constraint raises.
    """
    self.phase, self.slot, self.is_preempted = "queued", None, False
    self.at = self.flying = self.given = self.guessed = 0
    self._to_replay = max(0, len(self.tokens) - 1) if self._replays else 0
    self._came = self._to_replay
    self._unseen: np.ndarray | None = None
    self._scored: list[RowOutput] = []
    if self._constrain is not None and self.tokens:
      self.constraint = self._constrain()
      for token in self.tokens[: self._came]:
        self.constraint.accept(token)

  def admit(self, slot: int, now_s: float) -> None:
    self.phase, self.slot = "waiting", slot
    if self._admitted_s is None:
      self._admitted_s = now_s

  def opened(self, position: int) -> None:
    """Its slot is open and holds positions that were computed for other sequences."""
    self.phase, self.at = "prompt", position
    self._unseen = self.prompt[:position] if position else None
    if self.cached is None:
      self.cached = position

  # ---- rows

  def prompt_row(self, length: int, keep: tuple[int, ...]) -> Row:
    """The next row of the prompt; the last one draws the first token."""
    start, stop = self.at, self.at + length
    is_last = stop == len(self.prompt)
    draws = int(is_last and self.max_tokens > 0 and not self._to_replay)
    scores = self.targets is not None and self._prompt_scores is None and stop >= self.first
    row = Row(
      slot=self._slot(),
      start=start,
      tokens=self.prompt[start:stop],
      draws=draws,
      top=max(self.top if draws else 0, self.score_top if scores else 0),
      targets=self.targets[start:stop] if scores and self.targets is not None else None,
      keep=keep,
      seen=self._unseen,
      allowed=self._mask() if draws else None,
    )
    self.at, self._unseen, self.given = stop, None, draws
    if is_last:
      self.phase = "answer"
      if self._make_drafter is not None and self.max_tokens > 1 and self.guesses is None:
        self.guesses = Guesses(self._make_drafter(), self.prompt.tolist())
    return row

  def guess(self, most: int) -> list[int]:
    """Guess up to `most` tokens after the last one; [] if that is not known here, or was drawn before."""
    if self.guesses is None or not self.given == self._came == len(self.tokens):
      return []
    most = min(most, self.max_tokens - self.given - 1)
    return self.guesses.propose(most) if most > 0 else []

  def answer_row(self, draws: int, draft: Items[int] | None = None) -> Row:
    """The next row of the answer, which draws up to `draws` tokens, or one after the last and each draft."""
    count = self._to_replay
    if count:
      tokens, self.given, self._to_replay = np.array(self.tokens[:count], np.int32), count, 0
    else:
      tokens = np.array([self.tokens[self.given - 1]], np.int32) if self.knows_last else None
    draws = min(1 if self.constraint else draws, self.max_tokens - self.given)
    row = Row(
      slot=self._slot(),
      start=self.at,
      tokens=tokens,
      role="replayed" if count else "drawn",
      draws=draws,
      top=self.top,
      allowed=self._mask(),
      draft=None if draft is None else np.array(draft, np.int32),
    )
    self.at += row.length + draws - 1 + row.drafts
    self.given += draws + row.drafts
    self.guessed = row.drafts
    return row

  def _slot(self) -> int:
    assert self.slot is not None
    return self.slot

  def _mask(self) -> np.ndarray | None:
    """What may be drawn next."""
    return self.constraint.allowed(self.tokens[: self.given]) if self.constraint else None

  # ---- outputs

  def take(self, row: Row, output: RowOutput, now_s: float) -> None:
    """Hand on what a row gave.

    Raises: EngineError: it is not what was asked for, or not what it was before a preemption.
    """
    if row.targets is not None:
      if output.scores is None or len(output.scores) != row.length:
        raise EngineError("a step gave no scores for a row that has targets")
      self._scored.append(output)
    if row.role == "prompt" and row.start + row.length == len(self.prompt):
      self._end_prompt()
    if not row.draws:
      return
    count = 0 if output.tokens is None or output.logprobs is None else len(output.tokens)
    if not row.draws <= count <= row.draws + row.drafts:
      raise EngineError(f"a step did not give the {row.draws} tokens that a row asked for")
    assert output.tokens is not None and output.logprobs is not None
    ids, logprobs = output.tokens.tolist(), output.logprobs.tolist()
    wrong = row.draws + row.drafts - count
    self.at, self.given = self.at - wrong, self.given - wrong
    self.guessed = 0 if row.drafts else self.guessed
    for i, (token, logprob) in enumerate(zip(ids, logprobs, strict=True)):
      if self.constraint is not None:
        self.constraint.accept(token)
      if self._came < len(self.tokens):
        self._compare(self._came, token, logprob)
      else:
        self._emit(token, logprob, _tops(output.tops, i, self.top), now_s)
      self._came += 1
      if self.is_over:
        return

  def _end_prompt(self) -> None:
    if self.targets is not None and self._prompt_scores is None:
      self._prompt_scores = self._scores()
    if not self.max_tokens:
      self.is_over = True
      assert self._prompt_scores is not None
      self.ticket.post(self._prompt_scores)

  def _scores(self) -> Scores:
    """The scores of all rows, from `first` on and as far as there are targets."""
    last = len(self.prompt) - (1 if self.max_tokens else 0)
    rows = [output.scores for output in self._scored if output.scores is not None]
    count = last - (self.first - 1)
    end = last - len(self.prompt) or None
    scores = np.concatenate(rows)[:end] if rows else np.empty(0, np.float32)
    tops = None
    if self.score_top and self._scored:
      k = self.score_top
      parts = [output.score_tops for output in self._scored if output.score_tops is not None]
      if len(parts) != len(rows):
        raise EngineError("a step named no likeliest tokens for a row that asked for them")
      ids = np.concatenate([part.ids[:, :k] for part in parts])[:end]
      logprobs = np.concatenate([part.logprobs[:, :k] for part in parts])[:end]
      tops = Tops(ids[len(ids) - count :], logprobs[len(ids) - count :])
    return Scores(scores[len(scores) - count :], tops)

  def _compare(self, index: int, token: int, logprob: float) -> None:
    was, was_logprob = self.tokens[index], self._logprobs[index]
    if (token, logprob) != (was, was_logprob):
      raise EngineError(
        f"token {index} of an answer came out as {token} ({logprob}) after a preemption, and was"
        f" {was} ({was_logprob}) before"
      )

  def _emit(self, token: int, logprob: float, tops: tuple, now_s: float) -> None:
    if math.isnan(logprob):
      raise EngineError("a step gave a log-probability that is not a number")
    index = len(self.tokens)
    if index:
      self._greatest_gap_s = max(self._greatest_gap_s, now_s - self._last_s)
    else:
      self._first_s = now_s
    self._last_s = now_s
    self.tokens.append(token)
    if self.guesses is not None:
      self.guesses.accept(token)
    self._logprobs.append(logprob)
    reason = self._finish(token)
    self.is_over = reason is not None
    self.ticket.post(
      Token(
        token,
        logprob,
        index,
        reason,
        self.answer,
        tops,
        None if index else self._prompt_scores,
        self.usage if reason else None,
        self._times() if reason else None,
      )
    )

  def _finish(self, token: int) -> FinishReason | None:
    if token in self.stop_ids:
      return "stop"
    return "length" if len(self.tokens) == self.max_tokens else None

  @property
  def usage(self) -> Usage:
    return Usage(
      prompt_tokens=len(self.prompt),
      cached_tokens=self.cached or 0,
      answer_tokens=len(self.tokens),
    )

  def _times(self) -> RequestTimes:
    gaps, arrived_s = len(self.tokens) - 1, self.ticket.arrived_s
    admitted_s = self._admitted_s or arrived_s
    return RequestTimes(
      queued_s=admitted_s - arrived_s,
      prefill_s=self._first_s - admitted_s,
      first_token_s=self._first_s - arrived_s,
      mean_gap_s=(self._last_s - self._first_s) / gaps if gaps else None,
      greatest_gap_s=self._greatest_gap_s if gaps else None,
    )


def _tops(tops: Tops | None, place: int, count: int) -> tuple[tuple[int, float], ...]:
  if not count:
    return ()
  if tops is None:
    raise EngineError("a step named no likeliest tokens for a row that asked for them")
  ids, logprobs = tops.ids[place, :count].tolist(), tops.logprobs[place, :count].tolist()
  return tuple(zip(ids, logprobs, strict=True))


def answers(
  ticket: Ticket[Sequence],
  request: Request,
  *,
  block: int,
  replays: bool,
  make_drafter: MakeDrafter | None = None,
) -> list[Sequence]:
  """The sequences of a request, one for each of its answers."""
  prompt = np.asarray(request.prompt, np.int32)
  sampling = request.sampling
  scored = None if request.prompt_logprobs is None else np.append(prompt[1:], np.int32(0))
  return [
    Sequence(
      ticket,
      prompt,
      block=block,
      answer=answer,
      max_tokens=request.max_tokens,
      sampling=dataclasses.replace(sampling, seed=(sampling.seed + answer) % 2**64),
      stop_ids=request.stop_ids,
      top=request.top_logprobs,
      targets=scored if answer == 0 else None,
      score_top=request.prompt_logprobs or 0,
      constrain=request.constraint,
      replays=replays,
      make_drafter=make_drafter,
    )
    for answer in range(request.n)
  ]
