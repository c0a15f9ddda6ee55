"""POST /v1/completions: continues prompts, and scores them."""

import contextlib
import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from neurojax.engine.api import MOST_TOPS, Request, Scores
from neurojax.engine.text import TextPiece
from neurojax.serve.constrain import constraint_of
from neurojax.serve.errors import refused
from neurojax.serve.feed import Feed
from neurojax.serve.reply import COMMENT, DONE, event
from neurojax.serve.requests import Completion
from neurojax.serve.served import Served, logprob
from neurojax.tokenizer import Detokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
  """One prompt.

  Attributes:
    ids: Token ids.
    hidden: Tokens at its beginning that are not shown: a BOS that was added.
    request: What the engine is asked; None if nothing is to be computed but the prompt's scores.
  """

  ids: list[int]
  hidden: int
  request: Request | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """A request that was looked at."""

  asked: Completion
  prompts: list[Prompt]
  stops: tuple[str, ...]
  n: int

  @property
  def facts(self) -> dict[str, int]:
    """What the log says of it."""
    return {
      "prompts": len(self.prompts),
      "prompt_tokens": sum(len(prompt.ids) for prompt in self.prompts),
    }

  @property
  def has_usage(self) -> bool:
    options = self.asked.stream_options
    return bool(options and (options.include_usage or options.continuous_usage_stats))


def prepare(served: Served, asked: Completion) -> Work:
  """Look at a request. Raises: ApiError, ValueError: it cannot be served."""
  served.check_name(asked.model)
  if asked.suffix:
    raise refused("suffix", "`suffix` is not served here: leave it out", "unsupported_field")
  n = 1 if asked.n is None else asked.n
  if asked.best_of not in (None, n):
    raise refused("best_of", f"`best_of` = {asked.best_of}: only as many as `n` are computed")
  tops = asked.logprobs
  if tops is not None and not 0 <= tops <= MOST_TOPS:
    raise refused("logprobs", f"`logprobs` = {tops}: it must be between 0 and {MOST_TOPS}")
  most = 16 if asked.max_tokens is None else asked.max_tokens
  if not most and not asked.echo:
    raise refused("max_tokens", "`max_tokens` = 0 gives nothing without `echo`: ask for a token")
  constraint = constraint_of(served, asked, asked.response_format, asked.structured_outputs)
  prompts = []
  for ids, hidden in _prompts(served, asked):
    request = None
    scores = tops if asked.echo else None
    if most or n != 1:
      request = served.request(
        asked, ids, max_tokens=most or 1, tops=tops or 0, prompt_tops=scores, constraint=constraint
      )
    request = request if most else None
    prompts.append(Prompt(ids=ids, hidden=hidden, request=request))
  return Work(asked=asked, prompts=prompts, stops=served.stops(asked), n=n)


def _prompts(served: Served, asked: Completion) -> list[tuple[list[int], int]]:
  """The ids of each prompt, and how many at its beginning were added."""
  given: list[Any] = asked.prompt if isinstance(asked.prompt, list) else [asked.prompt or ""]
  if given and all(isinstance(each, int) for each in given):
    given = [given]
  if not given:
    raise refused("prompt", "`prompt` is empty: give a text or ids of tokens")
  if len(given) > served.limits.prompts:
    most = served.limits.prompts
    raise refused("prompt", f"`prompt` has {len(given)} prompts: give at most {most}")
  found: list[tuple[list[int], int]] = []
  for each in given:
    if isinstance(each, str):
      adds = asked.add_special_tokens is not False
      ids = served.tokenizer.encode(each, parse_special=True, add_special=adds)
      found.append((ids, int(adds and served.tokenizer.spec.add_bos)))
    elif isinstance(each, list):
      found.append((each, 0))
    else:
      raise refused("prompt", "`prompt` mixes ids of tokens with prompts: give a list for each")
  return found


class _Rows:
  """The log-probabilities of a choice's tokens, and where each token's text begins in the choice's."""

  def __init__(self, served: Served, tops: int, as_ids: bool, detokenizer: Detokenizer):
    self._served, self._tops, self._as_ids = served, tops, as_ids
    self._detokenizer = detokenizer
    self._at = 0
    self.clear()

  def clear(self) -> None:
    self.table: dict[str, list[Any]] = {
      "text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": [],
    }  # fmt: skip

  def add(
    self, id: int, value: float | None, tops: Sequence[tuple[int, float]], *, hidden: bool = False
  ) -> None:
    table = self.table
    table["tokens"].append(self._name(id))
    table["text_offset"].append(self._at)
    table["token_logprobs"].append(None if value is None else logprob(value))
    table["top_logprobs"].append(None if value is None else self._table(id, value, tops))
    if not hidden and id < self._served.tokenizer.vocab_size:
      self._at += len(self._detokenizer.push(id))

  def _name(self, id: int) -> str:
    return self._served.token_text(id, as_id=self._as_ids)

  def _table(self, id: int, value: float, tops: Sequence[tuple[int, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for top, of_top in [*tops[: self._tops], (id, value)]:
      # Of tokens with one text the likelier is named.
      found.setdefault(self._name(top), logprob(of_top))
    return found

  def add_prompt(self, prompt: Prompt, scores: Scores | None) -> None:
    for place, id in enumerate(prompt.ids):
      hidden = place < prompt.hidden
      if not place or scores is None:
        self.add(id, None, (), hidden=hidden)
        continue
      tops: list[tuple[int, float]] = []
      if scores.tops is not None:
        ids, values = scores.tops.ids[place - 1], scores.tops.logprobs[place - 1]
        tops = list(zip(ids.tolist(), values.tolist(), strict=True))
      self.add(id, float(scores.logprobs[place - 1]), tops, hidden=hidden)


class _Choice:
  """One choice while it grows."""

  def __init__(self, served: Served, work: Work, prompt: Prompt, index: int):
    asked = work.asked
    self._served, self._prompt, self.index = served, prompt, index
    self._echo = bool(asked.echo)
    self.finish_reason: str | None = None
    self.tokens = 0
    self.rows: _Rows | None = None
    self._begun = False
    if asked.logprobs is not None:
      as_ids = bool(asked.return_tokens_as_token_ids)
      continues = not self._echo and prompt.ids != [served.tokenizer.bos_id]
      stream = served.tokenizer.stream(special=self._echo, continues=continues)
      self.rows = _Rows(served, asked.logprobs, as_ids, stream)

  def begin(self, scores: Scores | None) -> str:
    """The text in front of the answer."""
    self._begun = True
    if not self._echo:
      return ""
    if self.rows is not None:
      self.rows.add_prompt(self._prompt, scores)
    shown = self._prompt.ids[self._prompt.hidden :]
    return self._served.tokenizer.decode(shown, special=True)

  def take(self, piece: TextPiece, scores: Scores | None) -> str:
    """The text that a piece adds."""
    text = "" if self._begun else self.begin(scores)
    self.tokens += 1
    if self.rows is not None:
      token = piece.token
      self.rows.add(token.id, token.logprob, token.tops, hidden=piece.token.finish_reason == "stop")
    self.finish_reason = piece.finish_reason
    return text + piece.text

  def table(self, text: str) -> dict[str, Any]:
    rows = None
    if self.rows is not None:
      rows = dict(self.rows.table)
      self.rows.clear()
    return {
      "index": self.index, "text": text, "logprobs": rows, "finish_reason": self.finish_reason,
    }  # fmt: skip


class _Choices:
  """All choices of a request: those of the first prompt first."""

  def __init__(self, served: Served, work: Work):
    self._served, self._work = served, work
    self.choices = [
      [_Choice(served, work, prompt, i * work.n + k) for k in range(work.n)]
      for i, prompt in enumerate(work.prompts)
    ]
    self._scores: list[Scores | None] = [None] * len(work.prompts)
    self._held: dict[int, list[TextPiece]] = {}
    self._cached = 0

  def streams(self) -> list[AsyncGenerator[TextPiece | Scores | None, None]]:
    return [self._stream(prompt) for prompt in self._work.prompts]

  async def _stream(self, prompt: Prompt) -> AsyncGenerator[TextPiece | Scores | None, None]:
    if prompt.request is None:
      tops = self._work.asked.logprobs
      scored = tops is not None and len(prompt.ids) > 1
      yield await self._served.engine.score(prompt.ids, top=tops or 0) if scored else None
      return
    pieces = self._served.stream(prompt.request, self._work.stops)
    async with contextlib.aclosing(pieces):
      async for piece in pieces:
        yield piece

  def take(self, number: int, item: TextPiece | Scores | None) -> list[tuple[_Choice, str]]:
    """The choices that an item of a stream adds text to."""
    choices = self.choices[number]
    if not isinstance(item, TextPiece):
      for choice in choices:
        choice.finish_reason = "length"
      return [(choice, choice.begin(item)) for choice in choices]
    token = item.token
    if token.usage is not None and not token.answer:
      self._cached += token.usage.cached_tokens
    if token.prompt_scores is not None:
      self._scores[number] = token.prompt_scores
      held = self._held.pop(number, [])
      return [self._add(number, piece) for piece in [item, *held]]
    waits = self._work.asked.echo and self._work.asked.logprobs is not None
    if waits and self._scores[number] is None:
      # Another answer may begin before the one whose first token has the prompt's scores.
      self._held.setdefault(number, []).append(item)
      return []
    return [self._add(number, item)]

  def _add(self, number: int, piece: TextPiece) -> tuple[_Choice, str]:
    choice = self.choices[number][piece.token.answer]
    return choice, choice.take(piece, self._scores[number])

  def usage(self) -> Mapping[str, Any]:
    prompt = sum(len(prompt.ids) for prompt in self._work.prompts)
    answer = sum(choice.tokens for choices in self.choices for choice in choices)
    return {
      "prompt_tokens": prompt,
      "completion_tokens": answer,
      "total_tokens": prompt + answer,
      "prompt_tokens_details": {"cached_tokens": self._cached},
    }


def _head(served: Served) -> dict[str, Any]:
  return {
    "id": f"cmpl-{uuid.uuid4().hex}",
    "object": "text_completion",
    "created": int(time.time()),
    "model": served.name,
    "system_fingerprint": served.fingerprint,
  }


async def complete(served: Served, work: Work) -> dict[str, Any]:
  """The whole answer."""
  all_of_them = _Choices(served, work)
  texts: dict[int, list[str]] = {}
  tables: dict[int, dict[str, Any]] = {}
  async with Feed(all_of_them.streams()) as feed:
    while (items := await feed.next()) is not None:
      for number, item in items:
        for choice, text in all_of_them.take(number, item):
          texts.setdefault(choice.index, []).append(text)
          if choice.finish_reason is not None:
            tables[choice.index] = choice.table("".join(texts[choice.index]))
  choices = [tables[index] for index in sorted(tables)]
  return {**_head(served), "choices": choices, "usage": all_of_them.usage()}


async def stream(served: Served, work: Work) -> AsyncGenerator[bytes, None]:
  """The answer as server-sent events."""
  all_of_them, head = _Choices(served, work), _head(served)
  options = work.asked.stream_options
  continuous = bool(options and options.continuous_usage_stats)
  async with Feed(all_of_them.streams(), idle_s=served.limits.idle_s) as feed:
    while (items := await feed.next()) is not None:
      parts = []
      for number, item in items:
        for choice, text in all_of_them.take(number, item):
          if not (text or choice.rows is not None or choice.finish_reason):
            continue
          chunk = {**head, "choices": [choice.table(text)]}
          if work.has_usage:
            chunk["usage"] = all_of_them.usage() if continuous else None
          parts.append(event(chunk))
      yield b"".join(parts) if items else COMMENT
  if work.has_usage:
    yield event({**head, "choices": [], "usage": all_of_them.usage()})
  yield DONE
