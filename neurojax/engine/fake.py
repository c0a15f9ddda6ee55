"""Steps and an engine that a person can compute by hand, for testing what stands above them."""

import asyncio
import contextlib
import dataclasses
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import numpy as np

from neurojax.config import Sampling
from neurojax.engine.api import EngineError, EngineLoad, Request, Scores, StageReport, Token
from neurojax.engine.batch import Batch
from neurojax.stage.step import Row, RowOutput, Tops

Rows = Sequence[Row]


@dataclasses.dataclass
class FakeSlot:
  """What a slot of `FakeSteps` holds.

  Attributes:
    tokens: The token at each position.
    states: A number for the tokens before each position, and for how they came there.
    prompt: Positions that hold the prompt.
    told: Tokens of the prompt that the sampler was told.
    drawn: Tokens that the sampler counted.
    last: The token that was drawn and is at no position yet.
    error: Why it computes nothing any more.
  """

  sampling: Sampling
  stop_ids: frozenset[int]
  tokens: list[int] = dataclasses.field(default_factory=list)
  states: list[int] = dataclasses.field(default_factory=lambda: [1])
  prompt: int = 0
  told: list[int] = dataclasses.field(default_factory=list)
  drawn: list[int] = dataclasses.field(default_factory=list)
  last: int | None = None
  error: EngineError | None = None


class FakeSteps:
  """The `engine.steps.Steps` of a model whose next token is a hash of all tokens and of how they came.

  Every rule of the protocol is checked: what breaks one is noted in `broken`, and raised.

  Args:
    latency_s: Seconds that a step of these rows takes; the steps are carried out one after another.
    fails: Whether the step of this number, from 0, raises. All that was kept is lost then.
    spoils: Whether a row of the step of this number gives an error in place of an output.

  Attributes:
    given: The rows of every step so far.
    closed: Number of slots that were closed.
    broken: What broke a rule.
    most_under_way: Most steps that were ever under way at the same time.
  """

  def __init__(
    self,
    *,
    vocab_size: int = 97,
    slots: int = 4,
    chunks: tuple[int, ...] = (4,),
    most_draws: int = 4,
    most_drafts: int = 0,
    places: int = 0,
    ahead: int = 2,
    chains: bool = True,
    latency_s: Callable[[Rows], float] = lambda rows: 0.0,
    fails: Callable[[int], bool] = lambda number: False,
    spoils: Callable[[int, Row], bool] = lambda number, row: False,
  ):
    self.vocab_size, self.slots, self.chunks = vocab_size, slots, chunks
    self.most_draws, self.places, self.ahead, self.chains = most_draws, places, ahead, chains
    self.most_drafts = most_drafts
    self._latency_s, self._fails, self._spoils = latency_s, fails, spoils
    self.given: list[tuple[Row, ...]] = []
    self.broken: list[str] = []
    self.closed = self.most_under_way = self._under_way = 0
    self.open_slots: dict[int, FakeSlot] = {}
    self._lost: set[int] = set()
    # A place holds the tokens and the states of its block, and the position where that begins.
    self._kept: dict[int, tuple[int, list[int], list[int]]] = {}
    self._forgotten: set[int] = set()
    # What was drawn from a state under a mask, which is not told when it is replayed.
    self._masked: dict[tuple[int, int], set[int]] = {}
    self._tail: asyncio.Future[None] | None = None

  # ---- the protocol

  async def open(
    self,
    slot: int,
    sampling: Sampling,
    *,
    stop_ids: frozenset[int] = frozenset(),
    restore: Sequence[int] = (),
    copy: tuple[int, int] | None = None,
  ) -> None:
    async with self._turn():
      self._rule(0 <= slot < self.slots, f"slot {slot} is opened, there are {self.slots}")
      self._rule(slot not in self.open_slots, f"slot {slot} is opened twice")
      made = FakeSlot(sampling, stop_ids)
      for number, place in enumerate(restore):
        self._restore(made, number, place)
      if copy is not None:
        self._copy(made, *copy)
      made.prompt = len(made.tokens)
      self._lost.discard(slot)
      self.open_slots[slot] = made

  async def step(self, rows: Rows) -> list[RowOutput]:
    number = len(self.given)
    self.given.append(tuple(rows))
    self._under_way += 1
    self.most_under_way = max(self.most_under_way, self._under_way)
    try:
      self._rule(self._under_way <= self.ahead, f"{self._under_way} steps are under way")
      self._rule(len(rows) > 0, "a step has no rows")
      slots = [row.slot for row in rows]
      self._rule(len({*slots}) == len(slots), f"a step has two rows of a slot: {slots}")
      drafts = sum(row.drafts for row in rows)
      fits = not drafts or len(rows) + drafts <= self.most_drafts + 1
      self._rule(fits, f"a step of {len(rows)} rows has {drafts} drafts")
      async with self._turn():
        await asyncio.sleep(self._latency_s(rows))
        if self._fails(number):
          self._fail(slots)
          raise EngineError(f"the fake step {number} fails, as it was told to")
        return [self._advance(number, row) for row in rows]
    finally:
      self._under_way -= 1

  async def close(self, slot: int) -> None:
    async with self._turn():
      self._lost.discard(slot)
      if self.open_slots.pop(slot, None) is not None:
        self.closed += 1

  # ---- what a model would do

  def draw(self, slot: FakeSlot) -> tuple[int, float]:
    """The next token of a slot and its log-probability, if nothing is forbidden."""
    x = _mix(_mix(slot.states[-1], slot.sampling.seed), len(slot.drawn))
    return (x >> 33) % self.vocab_size, float(np.float32(-((x >> 20) % 4096) / 256))

  def score(self, state: int, target: int) -> float:
    """The log-probability of a token in a state."""
    return float(np.float32(-(_mix(state, target) >> 40) / 2**20))

  def tops(self, state: int, count: int) -> tuple[list[int], list[float]]:
    """The likeliest tokens in a state and their log-probabilities."""
    first = _mix(state, 7) >> 33
    return [(first + i) % self.vocab_size for i in range(count)], [-0.5 * i for i in range(count)]

  # ---- how

  @contextlib.asynccontextmanager
  async def _turn(self) -> AsyncGenerator[None, None]:
    """Wait for the calls before this one."""
    loop = asyncio.get_running_loop()
    before, self._tail = self._tail, loop.create_future()
    mine = self._tail
    try:
      if before is not None and before.get_loop() is loop:
        await asyncio.wait({before})
      else:
        await asyncio.sleep(0)
      yield
    finally:
      mine.set_result(None)

  def _rule(self, holds: bool, otherwise: str) -> None:
    if not holds:
      self.broken.append(otherwise)
      raise AssertionError(otherwise)

  def _fail(self, slots: Sequence[int]) -> None:
    for slot in slots:
      self.open_slots.pop(slot, None)
      self._lost.add(slot)
    self._forgotten |= self._kept.keys()
    self._kept.clear()

  def _restore(self, slot: FakeSlot, number: int, place: int) -> None:
    if place not in self._kept and place in self._forgotten:
      raise EngineError(f"what was kept in place {place} is lost")
    self._rule(place in self._kept, f"nothing is kept in place {place}")
    start, tokens, states = self._kept[place]
    self._rule(start == number * self.chunks[0], f"place {place} holds the block at {start}")
    self._rule(states[0] == slot.states[-1], f"place {place} holds a block of another prompt")
    slot.tokens += tokens
    slot.states += states[1:]

  def _copy(self, slot: FakeSlot, source: int, positions: int) -> None:
    if source in self._lost:
      raise EngineError(f"slot {source} is lost")
    self._rule(source in self.open_slots, f"slot {source} is copied and is not open")
    other = self.open_slots[source]
    self._rule(positions <= len(other.tokens), f"{positions} positions are copied of fewer")
    self._rule(positions <= other.prompt, "positions of an answer are copied")
    slot.tokens = other.tokens[:positions]
    slot.states = other.states[: positions + 1]

  def _advance(self, number: int, row: Row) -> RowOutput:
    if row.slot in self._lost:
      return RowOutput(error=EngineError(f"slot {row.slot} was lost"))
    self._rule(row.slot in self.open_slots, f"slot {row.slot} has a row and is not open")
    slot = self.open_slots[row.slot]
    if slot.error is None and self._spoils(number, row):
      slot.error = EngineError("this row has numbers that are none, as it was told to")
    if slot.error is not None:
      return RowOutput(error=slot.error)
    self._check(slot, row)
    fed = [slot.last] if row.tokens is None else row.tokens.tolist()
    slot.told += [] if row.seen is None else row.seen.tolist()
    for token in fed:
      if row.role == "replayed":
        self._check_replay(slot, token)
        slot.drawn.append(token)
      self._feed(slot, row.role, token)
    if row.role == "prompt":
      slot.prompt = len(slot.tokens)
      slot.told += fed
    self._keep(slot, row)
    scores, score_tops = self._scores(slot, row)
    try:
      tokens, logprobs, tops = self._draws(slot, row)
    except EngineError as error:
      slot.error = error
      return RowOutput(error=error)
    return RowOutput(
      tokens=tokens, logprobs=logprobs, tops=tops, scores=scores, score_tops=score_tops
    )

  def _feed(self, slot: FakeSlot, role: str, token: int) -> None:
    # A position of a prompt is computed by other programs, and so has other bits.
    slot.states.append(_mix(slot.states[-1], 2 * token + (role != "prompt")))
    slot.tokens.append(token)
    slot.last = None

  def _check(self, slot: FakeSlot, row: Row) -> None:
    block, rule = self.chunks[0], self._rule
    at, length = len(slot.tokens), row.length
    rule(row.start == at, f"a row starts at {row.start}, the slot holds {at}")
    least, most = (0, 1) if row.role == "prompt" else (1, self.most_draws)
    rule(least <= row.draws <= most, f"a {row.role} row draws {row.draws}")
    rule(row.allowed is None or row.draws == 1, f"a row with a mask draws {row.draws}")
    rule(row.targets is None or len(row.targets) == length, "targets are not as many as tokens")
    can_guess = row.role == "drawn" and row.draws == 1 and row.allowed is None
    rule(not row.drafts or can_guess, f"a {row.role} row of {row.draws} draws has drafts")
    is_free = self.chains and row.role == "drawn"
    rule(row.tokens is not None or is_free, f"a {row.role} row has no tokens")
    if row.role == "prompt":
      has_begun = at != slot.prompt or slot.last is not None
      rule(not has_begun, "a prompt goes on after its answer began")
      rule(row.start % block == 0, f"a row of a prompt starts at {row.start}")
      rule(length in self.chunks or length < block, f"a row of a prompt has {length} tokens")
      whole = length // block
      rule(len(row.keep) in (0, whole), f"{len(row.keep)} places for {whole} blocks")
    else:
      rule(not row.keep and row.seen is None, f"a {row.role} row keeps or has seen")
    if row.role == "drawn":
      rule(length == 1, f"a drawn row has {length} tokens")
      rule(slot.last is not None, "a row goes on from a token that was not drawn")
      is_last = row.tokens is None or row.tokens.tolist() == [slot.last]
      rule(is_last, f"a row has {row.tokens}, {slot.last} was drawn")
    if row.role == "replayed":
      rule(slot.last is None, "a token is replayed after one was drawn")

  def _check_replay(self, slot: FakeSlot, token: int) -> None:
    self._check_told(slot)
    would = self._masked.get((slot.states[-1], slot.sampling.seed), set()) | {self.draw(slot)[0]}
    self._rule(token in would, f"{token} is replayed, {would} would be drawn")

  def _check_told(self, slot: FakeSlot) -> None:
    prompt = slot.tokens[: slot.prompt]
    self._rule(slot.told == prompt, f"the sampler was told {slot.told} of the prompt {prompt}")

  def _keep(self, slot: FakeSlot, row: Row) -> None:
    block = self.chunks[0]
    for number, place in enumerate(row.keep):
      self._rule(0 <= place < self.places, f"place {place}, there are {self.places}")
      start = row.start + number * block
      end = start + block
      self._kept[place] = (start, slot.tokens[start:end], slot.states[start : end + 1])

  def _scores(self, slot: FakeSlot, row: Row) -> tuple[np.ndarray | None, Tops | None]:
    if row.targets is None:
      return None, None
    states = slot.states[row.start + 1 :]
    pairs = zip(states, row.targets.tolist(), strict=True)
    scores = np.array([self.score(state, target) for state, target in pairs], np.float32)
    return scores, self._tops([*states], row.top)

  def _draws(
    self, slot: FakeSlot, row: Row
  ) -> tuple[np.ndarray | None, np.ndarray | None, Tops | None]:
    if not row.draws:
      return None, None, None
    self._check_told(slot)
    drawn, logprobs, states = [], [], []
    draft = [] if row.draft is None else row.draft.tolist()
    for number in range(row.draws + len(draft)):
      if number and draft and slot.last != draft[number - 1]:
        break
      if number:
        assert slot.last is not None
        self._feed(slot, "drawn", slot.last)
      states.append(slot.states[-1])
      token, logprob = self.draw(slot)
      if row.allowed is not None:
        while not row.allowed[token // 32] >> (token % 32) & 1:
          token = (token + 1) % self.vocab_size
        self._masked.setdefault((states[-1], slot.sampling.seed), set()).add(token)
      slot.drawn.append(token)
      slot.last = token
      drawn.append(token)
      logprobs.append(logprob)
    tops = self._tops(states, row.top)
    return np.array(drawn, np.int32), np.array(logprobs, np.float32), tops

  def _tops(self, states: list[int], count: int) -> Tops | None:
    if not count:
      return None
    named = [self.tops(state, count) for state in states]
    ids = np.array([ids for ids, _ in named], np.int32).reshape(len(states), count)
    logprobs = np.array([logprobs for _, logprobs in named], np.float32)
    return Tops(ids, logprobs.reshape(len(states), count))


def _mix(state: int, number: int) -> int:
  """A number of 64 bits that depends on both, in all its higher bits."""
  x = (state * 6364136223846793005 + number * 2862933555777941757 + 1442695040888963407) % 2**64
  return (x ^ x >> 29) * 3935559000370003845 % 2**64


class _Counting(FakeSteps):
  """The steps of a `FakeEngine`."""

  def __init__(self, fail_at: int | None, delay_s: float, **sizes: Any):
    super().__init__(
      most_draws=1,
      ahead=1,
      latency_s=lambda rows: delay_s if any(row.draws for row in rows) else 0.0,
      **sizes,
    )
    self._fail_at = fail_at

  def draw(self, slot: FakeSlot) -> tuple[int, float]:
    index = len(slot.drawn)
    if index == self._fail_at:
      raise EngineError(f"the fake engine fails at token {index}, as it was told to")
    return (sum(slot.tokens[: slot.prompt]) + index) % self.vocab_size, self._logprob

  def score(self, state: int, target: int) -> float:
    return self._logprob

  def tops(self, state: int, count: int) -> tuple[list[int], list[float]]:
    return list(range(count)), [self._logprob] * count

  @property
  def _logprob(self) -> float:
    return -math.log(self.vocab_size)


class FakeEngine:
  """Token i of an answer is (sum of the prompt + i) % vocab_size, and all tokens are equally likely.

  Args:
    longest_context: Positions that the pretended model allows; context_length if absent.
    fail_at: Raise EngineError in place of the token of this index.
    delay_s: Seconds to wait before each token.
    slots: Answers that run at the same time.
    queue: Requests that may wait for a slot.
  """

  def __init__(
    self,
    *,
    vocab_size: int = 256,
    context_length: int = 64,
    longest_context: int | None = None,
    fail_at: int | None = None,
    delay_s: float = 0.0,
    slots: int = 8,
    queue: int = 256,
  ):
    self.vocab_size, self.context_length = vocab_size, context_length
    self.longest_context = longest_context or context_length
    steps = _Counting(
      fail_at, delay_s, vocab_size=vocab_size, slots=slots, chunks=(context_length,)
    )
    self._batch = Batch(steps, self, queue=queue)

  def generate(self, request: Request) -> AsyncGenerator[Token, int | None]:
    return self._batch.generate(request)

  async def score(self, tokens: Sequence[int], *, first: int = 1, top: int = 0) -> Scores:
    return await self._batch.score(tokens, first=first, top=top)

  def load(self) -> EngineLoad:
    return self._batch.load()

  async def reports(self) -> tuple[StageReport, ...]:
    return ()

  async def close(self) -> None:
    await self._batch.close()
