"""POST /v1/responses: answers conversations that the client keeps. Nothing is stored."""

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

import msgspec

from neurojax.serve import chat
from neurojax.serve.chat import Choice, Usage
from neurojax.serve.errors import ApiError, refused
from neurojax.serve.feed import Feed
from neurojax.serve.reply import COMMENT
from neurojax.serve.requests import Chat, Json
from neurojax.serve.served import Served
from neurojax.tokenizer.answer.parser import Delta


class Responses(msgspec.Struct, kw_only=True):
  """The body of POST /v1/responses."""

  model: str
  input: str | list[Json]
  instructions: str | None = None
  tools: list[Json] | None = None
  tool_choice: str | Json | None = None
  parallel_tool_calls: bool | None = None
  max_output_tokens: int | None = None
  temperature: float | None = None
  top_p: float | None = None
  stream: bool | None = None
  stream_options: Json | None = None
  reasoning: Json | None = None
  text: Json | None = None
  include: list[str] | None = None
  truncation: str | None = None
  seed: int | None = None
  chat_template_kwargs: Json | None = None


class Work(msgspec.Struct, kw_only=True):
  """A request that was looked at, as the chat that it is."""

  asked: Responses
  chat: Any

  @property
  def facts(self) -> dict[str, int]:
    return self.chat.facts


def prepare(served: Served, asked: Responses) -> Work:
  """Look at a request. Raises: ApiError, ValueError: it cannot be served."""
  if asked.truncation not in (None, "disabled"):
    raise refused("truncation", "`truncation` is not served here: shorten the input")
  for name in asked.include or ():
    if name not in ("reasoning.encrypted_content", "message.output_text.logprobs"):
      raise refused("include", f"`include`: {name[:80]} is not served here")
  table: Json = {
    "model": asked.model,
    "messages": _messages(asked),
    "max_completion_tokens": asked.max_output_tokens,
    "reasoning_effort": (asked.reasoning or {}).get("effort"),
    "response_format": _format(asked.text or {}),
    "tools": [_tool(tool, i) for i, tool in enumerate(asked.tools or ())] or None,
    "tool_choice": _choice(asked.tool_choice) if asked.tools else None,
  }
  for name in ("temperature", "top_p", "seed", "parallel_tool_calls", "chat_template_kwargs"):
    table[name] = getattr(asked, name)
  try:
    made = msgspec.convert(table, Chat)
  except (msgspec.ValidationError, ValueError, RecursionError) as error:
    raise ApiError(400, f"the request cannot be read: {error}", code="invalid_type") from None
  return Work(asked=asked, chat=chat.prepare(served, made))


def _messages(asked: Responses) -> list[Json]:
  """The conversation, as chat completions have it."""
  given = asked.input
  items = [{"role": "user", "content": given}] if isinstance(given, str) else given
  found: list[Json] = []
  if asked.instructions:
    found.append({"role": "system", "content": asked.instructions})
  for i, item in enumerate(items):
    where, kind = f"input[{i}]", item.get("type", "message")
    if kind == "message":
      content = _text(item.get("content"), f"{where}.content")
      if item.get("role") == "assistant":
        last = _assistant(found)
        last["content"] = (last["content"] or "") + content
      else:
        found.append({"role": item.get("role"), "content": content})
    elif kind == "reasoning":
      parts = item.get("content") or item.get("summary")
      _assistant(found)["reasoning_content"] = _text(parts or [], f"{where}.content")
    elif kind == "function_call":
      call = {"name": item.get("name"), "arguments": item.get("arguments")}
      calls = _assistant(found).setdefault("tool_calls", [])
      calls.append({"id": item.get("call_id"), "type": "function", "function": call})
    elif kind == "function_call_output":
      content = _text(item.get("output"), f"{where}.output")
      found.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
    else:
      raise refused(where, f"`{where}` is of type {str(kind)[:40]!r}, which is not served here")
  return found


def _assistant(found: list[Json]) -> Json:
  """The turn of the model that an item belongs to: its items come one after another."""
  if not found or found[-1]["role"] != "assistant":
    found.append({"role": "assistant", "content": None})
  return found[-1]


def _text(content: Any, where: str) -> str:
  if isinstance(content, str):
    return content
  if not isinstance(content, list):
    raise refused(where, f"`{where}` is missing: give a text")
  texts = []
  for i, part in enumerate(content):
    text = part.get("text") if isinstance(part, dict) else None
    if not isinstance(text, str):
      raise refused(f"{where}[{i}]", f"`{where}[{i}]`: this model reads text only")
    texts.append(text)
  return "\n".join(texts)


def _tool(tool: Json, i: int) -> Json:
  if tool.get("type") != "function":
    kind = str(tool.get("type"))[:40]
    raise refused(f"tools[{i}]", f"`tools[{i}]` is of type {kind!r}: only functions are served")
  names = ("name", "description", "parameters", "strict")
  return {"type": "function", "function": {name: tool.get(name) for name in names}}


def _choice(choice: str | Json | None) -> Any:
  if isinstance(choice, dict) and choice.get("type") == "function":
    return {"type": "function", "function": {"name": choice.get("name")}}
  return choice


def _format(text: Json) -> Json | None:
  format = text.get("format")
  if not isinstance(format, dict) or format.get("type") != "json_schema":
    return format
  names = ("name", "schema", "description", "strict")
  return {"type": "json_schema", "json_schema": {name: format.get(name) for name in names}}


class _Writer:
  """Writes the output of a response: items, and the events that tell how they grow."""

  def __init__(self, served: Served, work: Work):
    asked = work.asked
    self._number = 0
    self.choice = Choice(served, work.chat, 0)
    self.usage = Usage(work.chat, [self.choice])
    self.response: Json = {
      "id": f"resp_{uuid.uuid4().hex}",
      "object": "response",
      "created_at": int(time.time()),
      "status": "in_progress",
      "error": None,
      "incomplete_details": None,
      "instructions": asked.instructions,
      "max_output_tokens": asked.max_output_tokens,
      "metadata": {},
      "model": served.name,
      "output": [],
      "parallel_tool_calls": asked.parallel_tool_calls is not False,
      "previous_response_id": None,
      "reasoning": asked.reasoning or {},
      "store": False,
      "temperature": 1.0 if asked.temperature is None else asked.temperature,
      "text": asked.text or {"format": {"type": "text"}},
      "tool_choice": asked.tool_choice or "auto",
      "tools": asked.tools or [],
      "top_p": 1.0 if asked.top_p is None else asked.top_p,
      "truncation": "disabled",
      "usage": None,
    }
    self._open: Json | None = None

  def event(self, kind: str, **fields: Any) -> bytes:
    table = {"type": kind, "sequence_number": self._number, **fields}
    self._number += 1
    return b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode(table) + b"\n\n"

  def begin(self) -> list[bytes]:
    kinds = ("response.created", "response.in_progress")
    return [self.event(kind, response=self.response) for kind in kinds]

  def add(self, delta: Delta) -> list[bytes]:
    """What a piece adds."""
    events = []
    if delta.reasoning:
      events += self._grow("reasoning", delta.reasoning)
    if delta.content:
      events += self._grow("message", delta.content)
    for call in delta.calls:
      events += self._close()
      item = {
        "type": "function_call", "id": f"fc_{uuid.uuid4().hex}", "call_id": self.choice.call_id(),
        "name": call.name, "arguments": "", "status": "in_progress",
      }  # fmt: skip
      events.append(self._item("added", item))
      place = {"item_id": item["id"], "output_index": len(self.response["output"])}
      kind = "response.function_call_arguments"
      events.append(self.event(f"{kind}.delta", delta=call.arguments, **place))
      events.append(self.event(f"{kind}.done", arguments=call.arguments, name=call.name, **place))
      item = {**item, "arguments": call.arguments, "status": "completed"}
      events.append(self._item("done", item))
      self.response["output"].append(item)
    return events

  def end(self) -> list[bytes]:
    """The last events: the response is whole, or was cut off."""
    is_cut = self.choice.finish_reason == "length"
    events = self._close("incomplete" if is_cut else "completed")
    usage = self.usage.table()
    self.response |= {
      "status": "incomplete" if is_cut else "completed",
      "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
      "usage": {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": usage["completion_tokens_details"],
        "total_tokens": usage["total_tokens"],
      },
    }
    return [*events, self.event(f"response.{self.response['status']}", response=self.response)]

  def _grow(self, kind: str, text: str) -> list[bytes]:
    events = []
    if self._open is None or self._open["type"] != kind:
      events += self._close()
      self._open = {"type": kind, "id": f"{kind[:3]}_{uuid.uuid4().hex}", "text": ""}
      events.append(self._item("added", self._shown("in_progress", parts=False)))
      events.append(self.event("response.content_part.added", part=self._part(), **self._place()))
    self._open["text"] += text
    events.append(self.event(f"{self._kind()}.delta", delta=text, **self._place(), **self._rows()))
    return events

  def _close(self, status: str = "completed") -> list[bytes]:
    if self._open is None:
      return []
    text = self._open["text"]
    item = self._shown(status)
    events = [
      self.event(f"{self._kind()}.done", text=text, **self._place(), **self._rows()),
      self.event("response.content_part.done", part=self._part(), **self._place()),
      self._item("done", item),
    ]
    self.response["output"].append(item)
    self._open = None
    return events

  def _item(self, what: str, item: Json) -> bytes:
    index = len(self.response["output"])
    return self.event(f"response.output_item.{what}", item=item, output_index=index)

  def _kind(self) -> str:
    assert self._open is not None
    is_text = self._open["type"] == "message"
    return "response.output_text" if is_text else "response.reasoning_text"

  def _rows(self) -> Json:
    assert self._open is not None
    return {"logprobs": []} if self._open["type"] == "message" else {}

  def _place(self) -> Json:
    assert self._open is not None
    index = len(self.response["output"])
    return {"item_id": self._open["id"], "output_index": index, "content_index": 0}

  def _part(self) -> Json:
    assert self._open is not None
    if self._open["type"] == "reasoning":
      return {"type": "reasoning_text", "text": self._open["text"]}
    return {"type": "output_text", "text": self._open["text"], "annotations": [], "logprobs": []}

  def _shown(self, status: str, *, parts: bool = True) -> Json:
    assert self._open is not None
    content = [self._part()] if parts else []
    item = {"id": self._open["id"], "type": self._open["type"], "status": status}
    if self._open["type"] == "reasoning":
      return {**item, "summary": [], "content": content}
    return {**item, "role": "assistant", "content": content}


async def _events(served: Served, work: Work, writer: _Writer) -> AsyncGenerator[list[bytes], None]:
  pieces = served.stream(work.chat.request, work.chat.stops, frozenset(work.chat.marks))
  has_begun = False
  async with Feed([pieces], idle_s=served.limits.idle_s) as feed:
    while (items := await feed.next()) is not None:
      events = [] if has_begun or not items else writer.begin()
      has_begun = has_begun or bool(items)
      for _, piece in items:
        delta = writer.choice.take(piece)
        writer.usage.see(piece)
        events += writer.add(delta)
      yield events or [COMMENT]
  yield writer.end()


async def complete(served: Served, work: Work) -> Json:
  """The whole response."""
  writer = _Writer(served, work)
  async for _ in _events(served, work, writer):
    pass
  return writer.response


async def stream(served: Served, work: Work) -> AsyncGenerator[bytes, None]:
  """The response as server-sent events."""
  async for events in _events(served, work, _Writer(served, work)):
    yield b"".join(events)
