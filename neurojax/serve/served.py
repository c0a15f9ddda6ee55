"""The model that a server serves: what it is called, and how requests become the engine's."""

import contextlib
import dataclasses
import functools
import hashlib
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

from neurojax.config import Sampling
from neurojax.engine.api import Busy, Constraint, Engine, EngineError, Request, check_request
from neurojax.engine.text import TextPiece, stream_text
from neurojax.serve.errors import ApiError, refused
from neurojax.serve.grammar import Grammars
from neurojax.serve.metrics import Metrics
from neurojax.serve.requests import Asking, Message, Tool, arguments_of
from neurojax.tokenizer import Tokenizer, encode_chat
from neurojax.tokenizer.answer.family import Family, family_of

MOST_STOPS = 1024
"""Stop strings of one request."""
MINUS_INFINITY = -9999.0
"""Stands for the log-probability of what cannot be: JSON has no infinity."""

_RESERVED = {"messages", "tools", "documents", "add_generation_prompt", "tokenizer"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeLimits:
  """Bounds of a server.

  Attributes:
    body_bytes: Longest body of a request.
    body_s: Longest time in which a body may come.
    queued: Requests that may wait for the engine.
    prompts: Prompts of one request for completions.
    request_s: Longest time that an answer may take.
    idle_s: Seconds without a token after which a stream is kept open with a comment.
    drain_s: Seconds that requests under way get when the server is told to end.
  """

  body_bytes: int = 16 << 20
  body_s: float = 60.0
  queued: int = 256
  prompts: int = 256
  request_s: float = 600.0
  idle_s: float = 10.0
  drain_s: float = 30.0


class Served:
  """An engine with its tokenizer, under one or several names.

  Args:
    names: Names by which requests ask for the model; the first is told back.
    held: Says how the model is held, for the fingerprint: answers with the same one are comparable.
    metrics: Counts what is done; made if absent.
  """

  def __init__(
    self,
    engine: Engine,
    tokenizer: Tokenizer,
    *,
    names: Sequence[str],
    held: str = "",
    limits: ServeLimits = ServeLimits(),
    metrics: Metrics | None = None,
  ):
    self.engine, self.tokenizer, self.names, self.limits = engine, tokenizer, tuple(names), limits
    self.created = int(time.time())
    self.fingerprint = "fp_" + hashlib.sha256(held.encode()).hexdigest()[:16]
    self.family: Family | None = family_of(tokenizer.spec)
    self.grammars = Grammars(tokenizer)
    self.metrics = metrics if metrics is not None else Metrics(self.name, engine)
    self.last_token_s = -1e9
    self._text_of = functools.cache(self._make_text)

  @property
  def name(self) -> str:
    return self.names[0]

  def check_name(self, name: str | None) -> None:
    """Raises: ApiError: another model is asked for."""
    if name is not None and name not in self.names:
      message = f"there is no model {name[:200]!r} here: ask for {self.name!r}"
      raise ApiError(404, message, param="model", code="model_not_found")

  # ---- requests

  def request(
    self,
    asked: Asking,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    tops: int = 0,
    prompt_tops: int | None = None,
    constraint: Callable[[], Constraint] | None = None,
  ) -> Request:
    """The engine's request. Raises: ValueError, ApiError: it can never be served."""
    stop_ids = frozenset() if asked.ignore_eos else self.tokenizer.stop_ids
    request = Request(
      prompt=prompt,
      max_tokens=max_tokens,
      sampling=self._sampling(asked),
      stop_ids=stop_ids | self._ids("stop_token_ids", asked.stop_token_ids or ()),
      n=1 if asked.n is None else asked.n,
      top_logprobs=tops,
      prompt_logprobs=prompt_tops,
      priority=asked.priority or 0,
      constraint=constraint,
    )
    check_request(request, self.engine)
    return request

  def _sampling(self, asked: Asking) -> Sampling:
    given: dict[str, Any] = {
      name: value
      for name in (
        "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens",
      )
      if (value := getattr(asked, name)) is not None
    }  # fmt: skip
    seed = secrets.randbits(63) if asked.seed is None else asked.seed
    if not -(2**63) <= seed < 2**64:
      raise refused("seed", f"`seed` = {seed}: it must be a whole number of 64 bits")
    return Sampling(
      temperature=1.0 if asked.temperature is None else asked.temperature,
      # vLLM's clients ask for all tokens so.
      top_k=None if asked.top_k in (None, 0, -1) else asked.top_k,
      logit_bias=self._biases(asked.logit_bias or {}),
      seed=seed % 2**64,
      **given,
    )

  def _biases(self, given: Mapping[str, float]) -> dict[int, float]:
    found = {}
    for key, value in given.items():
      if not (key.isascii() and key.isdecimal() and len(key) < 10):
        raise refused("logit_bias", f"`logit_bias` names {key[:40]!r}: give ids of tokens")
      found[int(key)] = value
    self._ids("logit_bias", found)
    return found

  def _ids(self, param: str, ids: Sequence[int] | Mapping[int, float]) -> frozenset[int]:
    size = self.engine.vocab_size
    for id in ids:
      if not 0 <= id < size:
        raise refused(param, f"`{param}`: token {id} is outside the vocabulary of {size}")
    return frozenset(ids)

  def stops(self, asked: Asking) -> tuple[str, ...]:
    """The stop strings. Raises: ApiError: too many, or an empty one."""
    stops = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
    if len(stops) > MOST_STOPS:
      raise refused("stop", f"`stop` has {len(stops)} texts: give at most {MOST_STOPS}")
    # An empty text among others comes from clients that have none: it stops nothing.
    return tuple(stop for stop in stops if stop)

  def chat_prompt(
    self,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None,
    *,
    template: Mapping[str, Any],
    add_generation_prompt: bool = True,
    documents: Sequence[Mapping[str, Any]] | None = None,
  ) -> list[int]:
    """The ids of a conversation. Raises: ApiError: there is no template, or it refuses."""
    if self.tokenizer.spec.chat_template is None:
      raise ApiError(
        400, f"{self.name} has no chat template: use /v1/completions", code="no_chat_template"
      )
    if taken := sorted(_RESERVED & template.keys()):
      where = "chat_template_kwargs"
      raise refused(where, f"`{where}` may not set {taken[0]}")
    if not messages:
      raise refused("messages", "`messages` is empty: give at least one")
    turns = [_turn(message, f"messages[{i}]") for i, message in enumerate(messages)]
    extra: dict[str, Any] = dict(template)
    if tools:
      extra["tools"] = [_tool_table(tool) for tool in tools]
    if documents:
      extra["documents"] = documents
    try:
      return encode_chat(
        self.tokenizer, turns, add_generation_prompt=add_generation_prompt, **extra
      )
    except ValueError as error:
      raise refused("messages", str(error)) from None

  def room(self, prompt: Sequence[int]) -> int:
    """Tokens that an answer may have at most. Raises: ApiError: none."""
    room = self.engine.context_length - len(prompt)
    if room < 1:
      message = (
        f"the prompt has {len(prompt)} tokens and the context is {self.engine.context_length}:"
        " shorten it, or start the server with a longer context"
      )
      raise refused("messages", message, "context_length_exceeded")
    return room

  # ---- answers

  async def stream(
    self, request: Request, stops: Sequence[str] = (), marks: frozenset[int] = frozenset()
  ) -> AsyncGenerator[TextPiece, None]:
    """The answers of a request as text. Raises: Busy: too many wait."""
    load = self.engine.load()
    if load.running >= load.slots and load.queued >= self.limits.queued:
      self.metrics.refused()
      raise Busy(load.queued)
    pieces = stream_text(self.engine, self.tokenizer, request, stops=stops, marks=marks)
    watch = self.metrics.request(request)
    try:
      async with contextlib.aclosing(pieces):
        async for piece in pieces:
          self.last_token_s = time.monotonic()
          watch.see(piece)
          yield piece
    except EngineError:
      self.metrics.failed()
      raise

  def token_text(self, id: int, *, as_id: bool = False) -> str:
    """How a token is named in an answer: its text, or its bytes if they are no text."""
    return f"token_id:{id}" if as_id else self._text_of(id)

  def token_bytes(self, id: int) -> bytes:
    """The bytes of a token; ids beyond the tokenizer's vocabulary have none."""
    return self.tokenizer.piece(id) if id < self.tokenizer.vocab_size else b""

  def _make_text(self, id: int) -> str:
    if id >= self.tokenizer.vocab_size:
      return f"token_id:{id}"
    piece = self.tokenizer.piece(id)
    try:
      return piece.decode("utf-8")
    except UnicodeDecodeError:
      return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

  async def prove(self) -> None:
    """Prove that tokens are computed: one was just now, or is. Raises: EngineError, Busy."""
    if time.monotonic() - self.last_token_s < 5:
      return
    first = self.tokenizer.bos_id or 0
    async with contextlib.aclosing(self.stream(Request(prompt=[first], max_tokens=1))) as pieces:
      async for _ in pieces:
        return
    raise EngineError("no token came")


def logprob(value: float) -> float:
  """A log-probability as JSON can hold it."""
  return max(float(value), MINUS_INFINITY)


def _turn(message: Message, where: str) -> dict[str, Any]:
  """A message as templates read it."""
  role = "system" if message.role == "developer" else message.role
  found: dict[str, Any] = {"role": role, "content": _content(message, where)}
  reasoning = message.reasoning_content or message.reasoning
  if reasoning is not None:
    found["reasoning_content"] = reasoning
  for name in ("name", "tool_call_id"):
    if getattr(message, name) is not None:
      found[name] = getattr(message, name)
  if message.tool_calls:
    found["tool_calls"] = [
      {
        "id": call.id,
        "type": "function",
        "function": {
          "name": call.function.name,
          "arguments": arguments_of(call, f"{where}.tool_calls[{i}].function.arguments"),
        },
      }
      for i, call in enumerate(message.tool_calls)
    ]
  return found


def _content(message: Message, where: str) -> str | None:
  if not isinstance(message.content, list):
    if message.content is None and not message.tool_calls:
      if message.role == "assistant":
        return message.refusal or ""
      raise refused(f"{where}.content", f"`{where}.content` is missing: give a text")
    return message.content if message.content is not None else ""
  for i, part in enumerate(message.content):
    if part.type != "text" or part.text is None:
      at = f"{where}.content[{i}]"
      raise refused(at, f"`{at}` is of type {part.type[:40]!r}: this model reads text only")
  return "\n".join(part.text or "" for part in message.content)


def _tool_table(tool: Tool) -> dict[str, Any]:
  function: dict[str, Any] = {"name": tool.function.name}
  if tool.function.description is not None:
    function["description"] = tool.function.description
  function["parameters"] = tool.function.parameters or {"type": "object", "properties": {}}
  return {"type": "function", "function": function}
