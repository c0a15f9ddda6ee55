"""Which constraint a request asks for: a format, calls of tools, a budget of reasoning."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from neurojax.engine.api import Constraint
from neurojax.serve import grammar
from neurojax.serve.errors import refused
from neurojax.serve.grammar import Guide
from neurojax.serve.requests import Asking, Chat, ResponseFormat, StructuredOutputs
from neurojax.serve.served import Served
from neurojax.tokenizer.answer.family import Family

Maker = Callable[[], Constraint]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thinking:
  """How an answer reasons.

  Attributes:
    open, close: Ids of the marks, where they are tokens.
    is_open: Whether the prompt ends within the reasoning.
    may_open: Whether the answer may begin it.
  """

  open: int | None = None
  close: int | None = None
  is_open: bool = False
  may_open: bool = False


def thinking_of(family: Family | None, marks: Mapping[int, str], prompt: list[int]) -> Thinking:
  """How an answer to a prompt reasons: a template may have opened it, or closed it to have none."""
  if family is None or family.reasoning is None:
    return Thinking()
  ids = {mark: id for id, mark in marks.items()}
  open, close = ids.get(family.reasoning.open), ids.get(family.reasoning.close)
  # Only white space may follow the mark, in a few tokens.
  ends = [id for id in prompt[-3:] if id in (open, close)]
  return Thinking(
    open=open,
    close=close,
    is_open=bool(ends) and ends[-1] == open,
    may_open=not ends and open is not None,
  )


def constraint_of(
  served: Served,
  asked: Asking,
  format: ResponseFormat | None,
  outputs: StructuredOutputs | None,
) -> Maker | None:
  """The constraint of a text; None for free text. Raises: ApiError: it cannot be kept."""
  found = _format(format) or _outputs(outputs)
  return None if found is None else _maker(served, asked, *found, Thinking())


def chat_constraint(
  served: Served,
  asked: Chat,
  *,
  forced: tuple[str, ...] | None,
  named: bool,
  thinking: Thinking,
  marks: Mapping[int, str],
) -> Maker | None:
  """The constraint of a chat's answer: its format, the calls it has to be, how long it thinks.

  Args:
    forced: Tools of which one has to be called.
    named: Whether the answer is the arguments of the one tool.
    marks: Marks that are tokens, by id.
  Raises: ApiError: it cannot be kept.
  """
  found = _format(asked.response_format) or _outputs(asked.structured_outputs)
  schemas = {tool.function.name: tool.function.parameters for tool in asked.tools or ()}
  if forced is not None:
    if found is not None:
      raise refused("tool_choice", f"`tool_choice` and `{found[1]}` ask for two formats: give one")
    param = "tools"
    if named:
      schema = schemas[forced[0]]
      found = grammar.of_schema(grammar.NO_PARAMETERS if schema is None else schema, param), param
    else:
      found = grammar.of_calls(schemas, several=asked.parallel_tool_calls is not False), param
  elif found is None and asked.tool_choice != "none":
    found = _strict(served, asked, marks)
  budget = asked.thinking_token_budget
  if budget is not None:
    if budget < 0:
      raise refused("thinking_token_budget", f"`thinking_token_budget` = {budget}: at least 0")
    if thinking.close is None:
      raise refused("thinking_token_budget", f"{served.name} has no marks of reasoning to close")
  if found is None and budget is None:
    return None
  return _maker(served, asked, *(found or (None, "")), thinking, budget)


def _strict(served: Served, asked: Chat, marks: Mapping[int, str]) -> tuple[str, str] | None:
  """The grammar of an answer that may call tools whose arguments have to keep their schema."""
  tools = asked.tools or ()
  strict = [i for i, tool in enumerate(tools) if tool.function.strict]
  if not strict:
    return None
  param = f"tools[{strict[0]}].function.strict"
  calls = served.family.calls if served.family is not None else None
  ids = {mark: id for id, mark in marks.items()}
  if calls is None or calls.body != "json_or_xml" or not {calls.open, calls.close} <= ids.keys():
    message = f"`{param}`: {served.name} keeps no schema while it may choose: set `tool_choice`"
    raise refused(param, message, "unsupported_field")
  schemas: dict[str, Any] = {
    tool.function.name: (tool.function.parameters if tool.function.strict else grammar.ANY_OBJECT)
    for tool in tools
  }
  assert calls.close is not None
  text = grammar.of_strict(
    schemas, open=ids[calls.open], close=ids[calls.close], arguments=calls.arguments
  )
  return text, param


def _format(format: ResponseFormat | None) -> tuple[str, str] | None:
  """The grammar of a format, and the field it comes from."""
  if format is None or format.type == "text":
    return None
  param = "response_format"
  if format.type == "json_object":
    return grammar.of_schema(grammar.ANY_OBJECT, param), param
  if format.json_schema is None or format.json_schema.schema is None:
    raise refused(param, "`response_format.json_schema.schema` is missing")
  return grammar.of_schema(format.json_schema.schema, param), param


def _outputs(outputs: StructuredOutputs | None) -> tuple[str, str] | None:
  if outputs is None:
    return None
  given = [name for name in outputs.__struct_fields__ if getattr(outputs, name) is not None]
  if len(given) != 1:
    raise refused("structured_outputs", f"`structured_outputs` has {given or 'nothing'}: give one")
  param = f"structured_outputs.{given[0]}"
  if outputs.regex is not None:
    return grammar.of_regex(outputs.regex), param
  if outputs.grammar is not None:
    return grammar.of_grammar(outputs.grammar, param), param
  if outputs.choice is not None:
    if not outputs.choice:
      raise refused(param, f"`{param}` is empty: give at least one text")
    return grammar.of_choice(outputs.choice), param
  return grammar.of_schema(_schema(outputs.json, param), param), param


def _schema(given: Any, param: str) -> Any:
  """A schema that may be given as its text."""
  import msgspec

  if not isinstance(given, str):
    return given
  try:
    found = msgspec.json.decode(given)
  except (ValueError, RecursionError) as error:
    raise refused(param, f"`{param}` is no JSON: {error}") from None
  if not isinstance(found, dict | bool):
    raise refused(param, f"`{param}` is no JSON schema: give an object")
  return found


def _maker(
  served: Served,
  asked: Asking,
  text: str | None,
  param: str,
  thinking: Thinking,
  budget: int | None = None,
) -> Maker:
  stop_ids, prototype = sorted(served.tokenizer.stop_ids), None
  if text is not None:
    if asked.ignore_eos:
      raise refused("ignore_eos", f"`ignore_eos` and `{param}` exclude each other")
    prototype = served.grammars.prototype(text, param)

  def make() -> Guide:
    return Guide(
      prototype.deep_copy() if prototype is not None else None,
      size=served.engine.vocab_size,
      stop_ids=stop_ids,
      open=thinking.open,
      close=thinking.close,
      in_reasoning=thinking.is_open,
      may_reason=thinking.may_open,
      budget=budget,
    )

  return make
