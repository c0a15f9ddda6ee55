"""Chat templates turn messages into the text that a model was trained to continue."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jinja2
import jinja2.ext
import jinja2.nodes

from neurojax.tokenizer.chat.sandbox import Sandbox, SecurityError, bounded, plain

_MAX_SOURCE = 1_000_000
# Names that clients give a message's reasoning. Templates read the first, gpt-oss's the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
  """Renders a chat template of a model file in a sandbox.

  Templates are written for the environment of transformers' `apply_chat_template`, which this is:
  trimmed blocks, `break` and `continue`, `raise_exception`, `strftime_now`, `{% generation %}`, and
  a `tojson` that does not escape HTML. A template cannot reach Python's attributes, change its
  arguments, or use up memory or time (`neurojax.tokenizer.chat.sandbox`).

  Raises: ValueError: the source is not a valid template.
  """

  def __init__(self, source: str, *, bos_token: str = "", eos_token: str = ""):
    if not isinstance(source, str):
      raise ValueError(f"chat template is {type(source).__name__}; it must be a string")
    if len(source) > _MAX_SOURCE:
      raise ValueError(
        f"chat template is {len(source)} characters long; no model's has more than {_MAX_SOURCE}"
      )
    self._globals = {"bos_token": bos_token, "eos_token": eos_token}
    try:
      with bounded(source):
        self._template = _ENVIRONMENT.from_string(source)
    # Constants are computed on reading; sources too deep or too odd break the compiler.
    except Exception as error:
      line = getattr(error, "lineno", None)
      where = f" at line {line}" if line else ""
      raise ValueError(
        f"chat template does not parse{where}: {error or type(error).__name__}; correct it or give"
        " another"
      ) from error

  def render(
    self,
    messages: Sequence[Mapping],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping] | None = None,
    documents: Sequence[Mapping] | None = None,
    **extra: object,
  ) -> str:
    """Returns the text of a conversation.

    Args:
      messages: Mappings with a "role" (str) and a "content" (str, a list of parts, or None). An
        assistant's message with "tool_calls" may leave the content out. Other keys, such as
        "reasoning_content", are passed on, unless they are None.
      add_generation_prompt: Ends the text where the assistant's answer begins.
      tools: JSON schemas of functions, for templates that know them.
      documents: Tables with "title" and "text", for templates that know them.
      extra: Further variables of the template.
    Raises: ValueError: a message is malformed, or the template refuses or fails; the error has the
      template's own words.
    """
    _check_messages(messages)
    variables = {
      **self._globals,
      **plain(extra),
      "messages": [_message(message) for message in messages],
      "add_generation_prompt": add_generation_prompt,
      "tools": plain(tools),
      "documents": plain(documents),
    }
    try:
      with bounded(variables):
        return self._template.render(variables)
    except SecurityError as error:
      raise ValueError(f"chat template tried what it may not: {error}; do not trust it") from error
    except _Refusal as error:
      raise ValueError(f"chat template refuses these messages: {error}") from error
    # Any other error, from a missing key to a huge range, comes from the template or the messages.
    except Exception as error:
      raise ValueError(f"chat template failed: {type(error).__name__}: {error}") from error


def _message(message: Mapping) -> dict:
  """Returns a message without None, with its reasoning under each name that templates read."""
  message = {key: value for key, value in plain(message).items() if value is not None}
  reasoning = next((message[key] for key in _REASONING if key in message), None)
  if reasoning is None:
    return message
  return {"thinking": reasoning, **message, "reasoning_content": reasoning}


class _Refusal(jinja2.TemplateError):
  """The error of a template that called `raise_exception`."""


class _Generation(jinja2.ext.Extension):
  """`{% generation %}` marks what the assistant wrote, for training masks; here it is only text."""

  tags: ClassVar[set[str]] = {"generation"}

  def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
    next(parser.stream)
    return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
  value: object,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )


def _raise_exception(message: str):
  raise _Refusal(str(message))


def _strftime_now(pattern: str) -> str:
  return datetime.datetime.now().strftime(pattern)


def _environment() -> Sandbox:
  environment = Sandbox(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[jinja2.ext.loopcontrols, _Generation],
  )
  environment.add_filter("tojson", _tojson)
  environment.globals["raise_exception"] = _raise_exception
  environment.globals["strftime_now"] = _strftime_now
  return environment


_ENVIRONMENT = _environment()


def _check_messages(messages: Sequence[Mapping]):
  if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
    raise ValueError(f"messages is {type(messages).__name__}; give a list of mappings")
  if not messages:
    raise ValueError("messages is empty; give at least one")
  for i, message in enumerate(messages):
    if not isinstance(message, Mapping):
      raise ValueError(f"messages[{i}] is {type(message).__name__}; it must be a mapping")
    role = message.get("role")
    if not isinstance(role, str) or not role:
      raise ValueError(f"messages[{i}] has the role {role!r}; it must be a string")
    if "content" not in message and not message.get("tool_calls"):
      raise ValueError(f"messages[{i}] has no content; give a string")
    content = message.get("content")
    if content is not None and not isinstance(content, (str, list, tuple)):
      raise ValueError(
        f"messages[{i}] has content of type {type(content).__name__}; give a string or a list of"
        " parts"
      )
