"""The bodies of requests: their fields and types, and which fields are taken without effect."""

import json
import math
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import msgspec

from neurojax.serve.errors import ApiError, refused

Stop = str | list[str] | None
Json = dict[str, Any]


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
  """What a stream has besides the answer.

  Attributes:
    include_usage: Whether a last chunk has the usage.
    continuous_usage_stats: Whether every chunk has it.
    include_obfuscation: Without effect: nothing is padded.
  """

  include_usage: bool | None = None
  continuous_usage_stats: bool | None = None
  include_obfuscation: bool | None = None


class Asking(msgspec.Struct, kw_only=True):
  """Fields that chat completions and completions share."""

  model: str
  stream: bool | None = None
  stream_options: StreamOptions | None = None
  n: int | None = None
  max_tokens: int | None = None
  temperature: float | None = None
  top_p: float | None = None
  stop: Stop = None
  seed: int | None = None
  logit_bias: dict[str, float] | None = None
  presence_penalty: float | None = None
  frequency_penalty: float | None = None
  # Beyond OpenAI's, by the names that vLLM gave them.
  top_k: int | None = None
  min_p: float | None = None
  repetition_penalty: float | None = None
  min_tokens: int | None = None
  stop_token_ids: list[int] | None = None
  ignore_eos: bool | None = None
  priority: int | None = None
  return_tokens_as_token_ids: bool | None = None
  add_special_tokens: bool | None = None


class Function(msgspec.Struct, kw_only=True):
  name: str
  description: str | None = None
  parameters: Json | None = None
  strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True):
  type: Literal["function"]
  function: Function


class Named(msgspec.Struct, kw_only=True):
  name: str


class ToolChoice(msgspec.Struct, kw_only=True):
  type: Literal["function"]
  function: Named


class Called(msgspec.Struct, kw_only=True):
  name: str
  arguments: str


class ToolCall(msgspec.Struct, kw_only=True):
  function: Called
  id: str | None = None
  type: Literal["function"] = "function"
  index: int | None = None


class Part(msgspec.Struct, kw_only=True):
  type: str
  text: str | None = None


class Message(msgspec.Struct, kw_only=True):
  role: Literal["developer", "system", "user", "assistant", "tool"]
  content: str | list[Part] | None = None
  name: str | None = None
  tool_calls: list[ToolCall] | None = None
  tool_call_id: str | None = None
  reasoning_content: str | None = None
  reasoning: str | None = None
  refusal: str | None = None


class JsonSchema(msgspec.Struct, kw_only=True):
  name: str
  schema: Json | bool | None = None
  description: str | None = None
  strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
  type: Literal["text", "json_object", "json_schema"]
  json_schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
  """What an answer has to be; one of these."""

  json: Json | bool | str | None = None
  regex: str | None = None
  choice: list[str] | None = None
  grammar: str | None = None


class Chat(Asking, kw_only=True):
  """The body of POST /v1/chat/completions."""

  messages: list[Message]
  max_completion_tokens: int | None = None
  logprobs: bool | None = None
  top_logprobs: int | None = None
  tools: list[Tool] | None = None
  tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
  parallel_tool_calls: bool | None = None
  response_format: ResponseFormat | None = None
  structured_outputs: StructuredOutputs | None = None
  reasoning_effort: str | None = None
  thinking_token_budget: int | None = None
  include_reasoning: bool | None = None
  chat_template_kwargs: Json | None = None
  add_generation_prompt: bool | None = None
  documents: list[Json] | None = None


class Completion(Asking, kw_only=True):
  """The body of POST /v1/completions."""

  prompt: str | list[int | str | list[int]] | None = None
  logprobs: int | None = None
  echo: bool | None = None
  best_of: int | None = None
  suffix: str | None = None
  response_format: ResponseFormat | None = None
  structured_outputs: StructuredOutputs | None = None


class Tokenize(msgspec.Struct, kw_only=True):
  """The body of POST /tokenize."""

  model: str | None = None
  prompt: str | None = None
  messages: list[Message] | None = None
  tools: list[Tool] | None = None
  add_special_tokens: bool | None = None
  add_generation_prompt: bool | None = None
  return_token_strs: bool | None = None
  chat_template_kwargs: Json | None = None


class Detokenize(msgspec.Struct, kw_only=True):
  """The body of POST /detokenize."""

  tokens: list[int]
  model: str | None = None


WITHOUT_EFFECT = frozenset(
  {
    "user", "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention",
    "safety_identifier", "prediction", "request_id", "stream_interval",
  }
)  # fmt: skip
"""Fields that do not change an answer: taken, and not looked at."""

_DEFAULTS: Mapping[str, tuple[Any, ...]] = {
  "modalities": (["text"],),
  "verbosity": ("medium",),
  "functions": ([],),
  "function_call": ("none", "auto"),
  "echo": (False,),
  "continue_final_message": (False,),
  "include_stop_str_in_output": (False,),
  "skip_special_tokens": (True,),
  "spaces_between_special_tokens": (True,),
  "use_beam_search": (False,),
  "length_penalty": (1, 1.0),
  "return_token_ids": (False,),
  "detokenize": (True,),
  "background": (False,),
  "top_logprobs": (0,),
  "prompt_cache_options": ({},),
}
"""Values of fields that are not served which ask for nothing beyond what is."""

_ADVICE = {
  "functions": "give `tools`",
  "function_call": "give `tool_choice`",
  "guided_json": "give `response_format` or `structured_outputs`",
  "guided_regex": "give `structured_outputs`",
  "guided_grammar": "give `structured_outputs`",
  "guided_choice": "give `structured_outputs`",
}

T = TypeVar("T", bound=msgspec.Struct)


def read(body: bytes, kind: type[T]) -> T:
  """The request in a body.

  Raises: ApiError: it is not JSON, or has a field that is unknown, of another type or not served.
  """
  table = _table(body)
  known = set(kind.__struct_encode_fields__)
  for name, value in table.items():
    if name in known or name in WITHOUT_EFFECT or value is None:
      continue
    if any(value == default for default in _DEFAULTS.get(name, ())):
      continue
    advice = _ADVICE.get(name, "leave it out")
    raise refused(name[:80], f"`{name[:80]}` is not served here: {advice}", "unsupported_field")
  try:
    found = msgspec.convert({k: v for k, v in table.items() if k in known}, kind)
  except msgspec.ValidationError as error:
    raise _invalid(str(error)) from None
  except (OverflowError, RecursionError, ValueError) as error:
    raise ApiError(400, f"the body cannot be read: {error}", code="invalid_body") from None
  _check_numbers(found)
  return found


def _table(body: bytes) -> Json:
  try:
    table = msgspec.json.decode(body)
  except RecursionError:
    raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None
  except ValueError as error:  # msgspec's errors and those of UTF-8 are such
    raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
  if not isinstance(table, dict):
    raise ApiError(400, "the body is not a JSON object", code="invalid_json")
  return table


def _invalid(text: str) -> ApiError:
  """A field of another type; msgspec ends its message with the path."""
  message, _, path = text.partition(" - at `$")
  param = path.rstrip("`").lstrip(".") or None
  if param is None and "missing required field" in message:
    param = message.rsplit("`", 2)[-2]
  where = f"`{param}`: " if param else ""
  return ApiError(400, f"{where}{message}", param=param, code="invalid_type")


def _check_numbers(asked: msgspec.Struct) -> None:
  for name in asked.__struct_fields__:
    value = getattr(asked, name)
    if isinstance(value, float) and not math.isfinite(value):
      raise refused(name, f"`{name}` is {value}: it must be finite")


def arguments_of(call: ToolCall, where: str) -> Json:
  """The arguments of an earlier call, which templates take as a table."""
  try:
    found = json.loads(call.function.arguments or "{}")
  except (ValueError, RecursionError):
    found = None
  if not isinstance(found, dict):
    raise refused(where, f"`{where}` must hold a JSON object as a string")
  return found
