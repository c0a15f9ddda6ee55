"""POST /v1/chat/completions: answers conversations."""

import dataclasses
import json
import secrets
import string
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

import msgspec

from neurojax.engine.api import MOST_TOPS, Request
from neurojax.engine.text import TextPiece
from neurojax.serve.constrain import chat_constraint, thinking_of
from neurojax.serve.errors import refused
from neurojax.serve.feed import Feed
from neurojax.serve.reply import COMMENT, DONE, event
from neurojax.serve.requests import Chat, Json, ToolChoice
from neurojax.serve.served import Served, logprob
from neurojax.tokenizer.answer.calls import Call
from neurojax.tokenizer.answer.family import Family, mark_ids
from neurojax.tokenizer.answer.parser import AnswerParser, Delta

_LETTERS = string.ascii_letters + string.digits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """A request that was looked at.

  Attributes:
    family: How its answers are parted; None: they are content, all of them.
    marks: Marks that are tokens, by id.
    spelled: Marks that are not.
    schemas: Parameters of the tools that may be called; None: none may.
    forced: Tools of which one has to be called, as JSON; None: nothing is forced.
    named: Whether the one tool was named: its answer is the arguments alone.
    in_reasoning: Whether the prompt ends within the reasoning.
  """

  asked: Chat
  request: Request
  stops: tuple[str, ...]
  family: Family | None
  marks: Mapping[int, str]
  spelled: tuple[str, ...]
  schemas: Mapping[str, Json] | None
  forced: tuple[str, ...] | None = None
  named: bool = False
  in_reasoning: bool = False

  @property
  def facts(self) -> dict[str, int]:
    """What the log says of it."""
    return {"prompt_tokens": len(self.request.prompt), "max_tokens": self.request.max_tokens}

  @property
  def has_usage(self) -> bool:
    options = self.asked.stream_options
    return bool(options and (options.include_usage or options.continuous_usage_stats))


def prepare(served: Served, asked: Chat) -> Work:
  """Look at a request. Raises: ApiError, ValueError: it cannot be served."""
  served.check_name(asked.model)
  if asked.top_logprobs is not None and not asked.logprobs:
    raise refused("top_logprobs", "`top_logprobs` needs `logprobs` = true")
  if asked.top_logprobs is not None and not 0 <= asked.top_logprobs <= MOST_TOPS:
    bound = f"it must be between 0 and {MOST_TOPS}"
    raise refused("top_logprobs", f"`top_logprobs` = {asked.top_logprobs}: {bound}")
  choice = asked.tool_choice or ("auto" if asked.tools else "none")
  _check_tools(served, asked, choice)
  offers = choice != "none" and bool(asked.tools)
  prompt = served.chat_prompt(
    asked.messages,
    asked.tools if offers else None,
    template=_template(served, asked),
    add_generation_prompt=asked.add_generation_prompt is not False,
    documents=asked.documents,
  )
  room = served.room(prompt)
  most = asked.max_completion_tokens
  most = asked.max_tokens if most is None else most
  schemas = {t.function.name: t.function.parameters or {} for t in asked.tools or ()}
  forced = choice == "required" or isinstance(choice, ToolChoice)
  names = None
  if forced:
    names = (choice.function.name,) if isinstance(choice, ToolChoice) else tuple(schemas)
  family = served.family
  reads_calls = offers and not forced and family is not None and family.calls is not None
  marks = family.marks(calls=reads_calls) if family is not None else ()
  ids = mark_ids(served.tokenizer.spec, marks)
  thinking = thinking_of(family, ids, prompt)
  constraint = chat_constraint(
    served,
    asked,
    forced=names,
    named=isinstance(choice, ToolChoice),
    thinking=thinking,
    marks=ids,
  )
  request = served.request(
    asked,
    prompt,
    max_tokens=room if most is None else most,
    tops=asked.top_logprobs or 0,
    constraint=constraint,
  )
  return Work(
    asked=asked,
    request=request,
    stops=served.stops(asked),
    family=family,
    marks=ids,
    spelled=tuple(mark for mark in marks if mark not in ids.values()),
    schemas=schemas if reads_calls else None,
    forced=names,
    named=isinstance(choice, ToolChoice),
    in_reasoning=thinking.is_open,
  )


def _check_tools(served: Served, asked: Chat, choice: str | ToolChoice) -> None:
  names = [tool.function.name for tool in asked.tools or ()]
  if len({*names}) != len(names):
    raise refused("tools", "`tools` has two functions of one name")
  if choice in ("none", "auto"):
    can_call = served.family is not None and served.family.calls is not None
    if choice == "auto" and names and not can_call:
      message = f"the chat template of {served.name} knows no calls of tools: leave `tools` out"
      raise refused("tools", message, "unsupported_field")
    return
  if not names:
    raise refused("tool_choice", "`tool_choice` needs `tools`")
  if isinstance(choice, ToolChoice) and choice.function.name not in names:
    message = f"`tool_choice` names {choice.function.name[:80]!r}, which is not among `tools`"
    raise refused("tool_choice", message)


def _template(served: Served, asked: Chat) -> dict[str, Any]:
  """Variables of the chat template."""
  found = dict(asked.chat_template_kwargs or {})
  effort = asked.reasoning_effort
  if effort is None:
    return found
  source = served.tokenizer.spec.chat_template or ""
  if "reasoning_effort" in source:
    found.setdefault("reasoning_effort", effort)
  elif "enable_thinking" in source:
    found.setdefault("enable_thinking", effort != "none")
  elif effort != "none" or (served.family is not None and served.family.reasoning is not None):
    message = f"`reasoning_effort`: {served.name} has no efforts to choose from: leave it out"
    raise refused("reasoning_effort", message, "unsupported_field")
  return found


class Choice:
  """One choice while it grows."""

  def __init__(self, served: Served, work: Work, index: int):
    self._served, self._work, self.index = served, work, index
    self._parser: AnswerParser | None = None
    if work.family is not None:
      self._parser = AnswerParser(
        work.family,
        spelled=work.spelled,
        in_reasoning=work.in_reasoning,
        schemas=work.schemas,
      )
    self.tokens = self.reasoning_tokens = self.calls = 0
    self.finish_reason: str | None = None
    self._rows: list[dict[str, Any]] = []
    self._forced = ""

  def take(self, piece: TextPiece) -> Delta:
    """What a piece adds."""
    self.tokens += 1
    if self._work.asked.logprobs:
      self._rows.append(self._row(piece))
    delta = Delta(piece.text)
    if self._parser is not None:
      self.reasoning_tokens += self._parser.in_reasoning
      delta = self._parser.push(piece.text)
      if piece.is_mark:
        delta += self._parser.push_mark(self._work.marks[piece.token.id])
      if piece.finish_reason:
        delta += self._parser.finish()
    if self._work.forced is not None:
      delta = self._force(delta, is_last=piece.finish_reason is not None)
    if self._work.asked.parallel_tool_calls is False:
      delta = dataclasses.replace(delta, calls=delta.calls[: max(0, 1 - self.calls)])
    self.calls += len(delta.calls)
    if piece.finish_reason:
      self.finish_reason = self._reason(piece.finish_reason)
    return delta

  def _reason(self, reason: str) -> str:
    # A named tool ends with "stop", as OpenAI has it; an answer that was cut off wins.
    return "tool_calls" if reason == "stop" and self.calls and not self._work.named else reason

  def _force(self, delta: Delta, *, is_last: bool) -> Delta:
    """Content that a constraint made the calls themselves."""
    assert self._work.forced is not None
    self._forced += delta.content
    if not is_last:
      return dataclasses.replace(delta, content="")
    text = self._forced.strip()
    if self._work.named:
      return dataclasses.replace(delta, content="", calls=(Call(self._work.forced[0], text),))
    try:
      calls = tuple(
        Call(each["name"], json.dumps(each["arguments"], ensure_ascii=False))
        for each in json.loads(text)
      )
    except (ValueError, KeyError, TypeError):
      return dataclasses.replace(delta, content=text)  # cut off by max_tokens
    return dataclasses.replace(delta, content="", calls=calls)

  def _row(self, piece: TextPiece) -> dict[str, Any]:
    token = piece.token
    tops = [
      self._token(id, value) for id, value in token.tops[: self._work.asked.top_logprobs or 0]
    ]
    return {**self._token(token.id, token.logprob), "top_logprobs": tops}

  def _token(self, id: int, value: float) -> dict[str, Any]:
    as_id = bool(self._work.asked.return_tokens_as_token_ids)
    return {
      "token": self._served.token_text(id, as_id=as_id),
      "logprob": logprob(value),
      "bytes": list(self._served.token_bytes(id)),
    }

  def logprobs(self) -> dict[str, Any] | None:
    """The log-probabilities since the last call."""
    if not self._work.asked.logprobs:
      return None
    rows, self._rows = self._rows, []
    return {"content": rows, "refusal": None}

  def call_id(self) -> str:
    family = self._work.family
    length = family.id_length if family is not None else 24
    name = "".join(secrets.choice(_LETTERS) for _ in range(length))
    return name if length < 24 else f"call_{name}"


class Usage:
  """Counts what all choices took."""

  def __init__(self, work: Work, choices: list[Choice]):
    self._work, self._choices, self.cached = work, choices, 0

  def see(self, piece: TextPiece) -> None:
    if piece.token.usage is not None and not piece.token.answer:
      self.cached = piece.token.usage.cached_tokens

  def table(self) -> dict[str, Any]:
    prompt = len(self._work.request.prompt)
    answer = sum(choice.tokens for choice in self._choices)
    reasoning = sum(choice.reasoning_tokens for choice in self._choices)
    return {
      "prompt_tokens": prompt,
      "completion_tokens": answer,
      "total_tokens": prompt + answer,
      "prompt_tokens_details": {"cached_tokens": self.cached},
      "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def _head(served: Served, kind: str) -> dict[str, Any]:
  return {
    "id": f"chatcmpl-{uuid.uuid4().hex}",
    "object": kind,
    "created": int(time.time()),
    "model": served.name,
    "system_fingerprint": served.fingerprint,
  }


async def complete(served: Served, work: Work) -> dict[str, Any]:
  """The whole answer."""
  choices = [Choice(served, work, index) for index in range(work.request.n)]
  deltas = [Delta() for _ in choices]
  usage = Usage(work, choices)
  contents: list[list[str]] = [[] for _ in choices]
  async with Feed([served.stream(work.request, work.stops, frozenset(work.marks))]) as feed:
    while (items := await feed.next()) is not None:
      for _, piece in items:
        index = piece.token.answer
        delta = choices[index].take(piece)
        usage.see(piece)
        contents[index].append(delta.content)
        deltas[index] += dataclasses.replace(delta, content="")
  tables = [
    {
      "index": choice.index,
      "message": _message(
        choice, "".join(content), delta, work.asked.include_reasoning is not False
      ),
      "logprobs": choice.logprobs(),
      "finish_reason": choice.finish_reason,
    }
    for choice, content, delta in zip(choices, contents, deltas, strict=True)
  ]
  return {**_head(served, "chat.completion"), "choices": tables, "usage": usage.table()}


def _message(choice: Choice, content: str, delta: Delta, shows: bool) -> dict[str, Any]:
  calls = [
    {
      "id": choice.call_id(),
      "type": "function",
      "function": {"name": call.name, "arguments": call.arguments},
    }
    for call in delta.calls
  ]
  found: dict[str, Any] = {
    "role": "assistant",
    "content": None if calls and not content else content,
    "refusal": None,
  }
  if delta.reasoning and shows:
    found["reasoning_content"] = found["reasoning"] = delta.reasoning
  if calls:
    found["tool_calls"] = calls
  return found


async def stream(served: Served, work: Work) -> AsyncGenerator[bytes, None]:
  """The answer as server-sent events."""
  choices = [Choice(served, work, index) for index in range(work.request.n)]
  usage, head = Usage(work, choices), _head(served, "chat.completion.chunk")
  options = work.asked.stream_options
  continuous = bool(options and options.continuous_usage_stats)
  chunks = _Chunks(head, work, usage.table if continuous else None)
  has_begun = False
  pieces = served.stream(work.request, work.stops, frozenset(work.marks))
  async with Feed([pieces], idle_s=served.limits.idle_s) as feed:
    while (items := await feed.next()) is not None:
      parts = []
      if items and not has_begun:
        has_begun = True
        parts += [chunks.chunk(choice, {"role": "assistant", "content": ""}) for choice in choices]
      for _, piece in items:
        choice = choices[piece.token.answer]
        delta = choice.take(piece)
        usage.see(piece)
        parts.append(chunks.of(choice, delta))
      yield b"".join(parts) if items else COMMENT
  if work.has_usage:
    yield event({**head, "choices": [], "usage": usage.table()})
  yield DONE


class _Chunks:
  """Writes chunks; the frequent one, of content alone, is put together from bytes."""

  def __init__(self, head: dict[str, Any], work: Work, usage: Callable[[], dict[str, Any]] | None):
    self._head, self._work, self._usage = head, work, usage
    self._shows = work.asked.include_reasoning is not False
    tail = b',"usage":null' if work.has_usage else b""
    start = b"data: " + msgspec.json.encode(head)[:-1] + b',"choices":[{"index":'
    self._starts = [
      start + str(i).encode() + b',"delta":{"content":' for i in range(work.request.n)
    ]
    self._end = b'},"logprobs":null,"finish_reason":null}]' + tail + b"}\n\n"
    self._is_plain = not work.asked.logprobs and usage is None

  def of(self, choice: Choice, delta: Delta) -> bytes:
    """The chunks of what a piece added; none if it added nothing that is shown."""
    if self._is_plain and choice.finish_reason is None and not (delta.reasoning or delta.calls):
      if not delta.content:
        return b""
      return self._starts[choice.index] + msgspec.json.encode(delta.content) + self._end
    parts = []
    if delta.reasoning and self._shows:
      shown = {"reasoning_content": delta.reasoning, "reasoning": delta.reasoning}
      parts.append(self.chunk(choice, shown))
    if delta.content:
      parts.append(self.chunk(choice, {"content": delta.content}))
    for place, call in enumerate(delta.calls, choice.calls - len(delta.calls)):
      parts += self._call(choice, place, call)
    if choice.finish_reason is not None:
      parts.append(self.chunk(choice, {}, choice.finish_reason))
    return b"".join(parts)

  def _call(self, choice: Choice, place: int, call: Call) -> list[bytes]:
    function = {"name": call.name, "arguments": ""}
    first = {"index": place, "id": choice.call_id(), "type": "function", "function": function}
    then = {"index": place, "function": {"arguments": call.arguments}}
    return [self.chunk(choice, {"tool_calls": [part]}) for part in (first, then)]

  def chunk(self, choice: Choice, delta: Mapping[str, Any], reason: str | None = None) -> bytes:
    table = {
      **self._head,
      "choices": [
        {
          "index": choice.index,
          "delta": delta,
          "logprobs": choice.logprobs() if "role" not in delta else None,
          "finish_reason": reason,
        }
      ],
    }
    if self._work.has_usage:
      table["usage"] = self._usage() if self._usage is not None else None
    return event(table)
