"""Chat templates: messages to the text that a model was trained to continue."""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

_MAX_REPEAT = 1_000_000
# "%99999d" and "%*d" in the old style of formatting.
_WIDE_FORMAT = re.compile(r"%[^%a-zA-Z]*(\*|\d{5})")


class ChatTemplate:
  """A chat template as model files carry it, rendered in a sandbox.

  The environment is the one that templates are written for (transformers' `apply_chat_template`):
  trimmed blocks, `break` and `continue`, `raise_exception`, `strftime_now`, `{% generation %}`, and
  a `tojson` that does not escape HTML. A template cannot reach Python's attributes, change its
  arguments, or build long texts by the operators `*`, `**` and `%`; it can still be slow or large
  by nested loops and padding filters, so take templates from models that you trust to run.

  Raises: ValueError: the source is not a valid template.
  """

  def __init__(self, source: str, *, bos_token: str = "", eos_token: str = ""):
    if not isinstance(source, str):
      raise ValueError(f"chat template is {type(source).__name__}; it must be a string")
    self._globals = {"bos_token": bos_token, "eos_token": eos_token}
    try:
      self._template = _ENVIRONMENT.from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
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
    **extra: object,
  ) -> str:
    """The text of a conversation.

    Args:
      messages: Each has a "role" (str) and a "content" (str, a list of parts, or None); an
        assistant's message with "tool_calls" may leave the content out.
      add_generation_prompt: Whether the text ends where the assistant's answer begins.
      tools: JSON schemas of functions, for templates that know them.
      extra: Further variables of the template.
    Raises: ValueError: a message is malformed, or the template refuses or fails; with its words.
    """
    _check_messages(messages)
    variables = {
      **self._globals,
      **extra,
      "messages": [dict(message) for message in messages],
      "add_generation_prompt": add_generation_prompt,
      "tools": tools,
    }
    try:
      return self._template.render(variables)
    except jinja2.sandbox.SecurityError as error:
      raise ValueError(f"chat template tried what it may not: {error}; do not trust it") from error
    except _Refusal as error:
      raise ValueError(f"chat template refuses these messages: {error}") from error
    # Whatever else goes wrong, from a missing key to a huge range, is the template's fault or the
    # messages', never ours.
    except Exception as error:
      raise ValueError(f"chat template failed: {type(error).__name__}: {error}") from error


class _Refusal(jinja2.TemplateError):
  """A template called `raise_exception`."""


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
  intercepted_binops = frozenset({"*", "**", "%"})

  def unsafe_undefined(self, obj, attribute):
    # Jinja's own answer is an undefined value, which prints as nothing.
    raise jinja2.sandbox.SecurityError(
      f"access to attribute {attribute!r} of {type(obj).__name__!r} is unsafe"
    )

  def call_binop(self, context, operator, left, right):
    if operator == "*":
      for repeated, times in ((left, right), (right, left)):
        countable = isinstance(repeated, Sequence) and isinstance(times, int)
        if countable and len(repeated) * times > _MAX_REPEAT:
          raise jinja2.sandbox.SecurityError(
            f"repetition to more than {_MAX_REPEAT} items is unsafe"
          )
    elif operator == "**" and isinstance(right, int) and abs(right) > 1000:
      raise jinja2.sandbox.SecurityError(f"power of {right} is unsafe")
    elif operator == "%" and isinstance(left, str) and _WIDE_FORMAT.search(left):
      raise jinja2.sandbox.SecurityError("formatting to a large width is unsafe")
    return super().call_binop(context, operator, left, right)


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


def _environment() -> _Sandbox:
  environment = _Sandbox(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[jinja2.ext.loopcontrols, _Generation],
  )
  del environment.globals["lipsum"]
  environment.filters["tojson"] = _tojson
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
