"""Reads calls of tools from what a model wrote between its marks."""

import ast
import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from neurojax.tokenizer.answer.family import Calls

MOST_CHARACTERS = 1 << 18
"""The longest text that is read as calls."""


@dataclasses.dataclass(frozen=True)
class Call:
  """A call of a tool.

  Attributes:
    arguments: A JSON object, as text.
  """

  name: str
  arguments: str


Schemas = Mapping[str, Mapping[str, Any]]
"""Parameters of each tool by its name, as JSON schemas."""


def read_calls(text: str, calls: Calls, schemas: Schemas) -> list[Call] | None:
  """The calls that a text is, or None if it is something else.

  Args:
    text: What stands between the marks; tokens for quotation marks are in it as their text.
    schemas: Tools that were offered; where the text has no types they come from here.
  """
  if len(text) > MOST_CHARACTERS:
    return None
  try:
    match calls.body:
      case "json":
        return _json_calls(text, calls.arguments)
      case "json_or_xml":
        is_xml = text.lstrip().startswith("<function=")
        return _xml_calls(text, schemas) if is_xml else _json_calls(text, calls.arguments)
      case "mistral":
        return _mistral_calls(text, calls.arguments)
      case "pythonic":
        return _pythonic_calls(text)
      case "gemma":
        return _Gemma(text, calls.quote or '"').calls()
  except (ValueError, SyntaxError, RecursionError, MemoryError, IndexError):
    return None


def _as_text(arguments: Any) -> str:
  """Raises: ValueError: these are no arguments."""
  if isinstance(arguments, str):
    arguments = json.loads(arguments or "{}")
  if arguments is None:
    arguments = {}
  if not isinstance(arguments, dict):
    raise ValueError("arguments are no object")
  return json.dumps(arguments, ensure_ascii=False, allow_nan=False)


def _json_calls(text: str, arguments: str) -> list[Call]:
  """JSON objects, one after another or in a list."""
  decoder, at, found = json.JSONDecoder(), 0, list[Any]()
  while at < len(text):
    if text[at] in " \t\r\n;,":
      at += 1
      continue
    value, at = decoder.raw_decode(text, at)
    found += value if isinstance(value, list) else [value]
  return [_json_call(value, arguments) for value in found] or _none()


def _json_call(value: Any, arguments: str) -> Call:
  if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
    raise ValueError("no call")
  other = "parameters" if arguments == "arguments" else "arguments"
  return Call(value["name"], _as_text(value.get(arguments, value.get(other))))


def _none() -> list[Call]:
  raise ValueError("there is no call")


def _mistral_calls(text: str, arguments: str) -> list[Call]:
  text = text.strip()
  if text.startswith(("[", "{")):
    return _json_calls(text, arguments)
  name, _, rest = text.partition("{")
  name = name.replace("[ARGS]", "").partition("[CALL_ID]")[0].strip()
  if not name or not re.fullmatch(r"[\w.-]+", name):
    raise ValueError("no name")
  return [Call(name, _as_text(json.loads("{" + rest)))]


_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)


def _xml_calls(text: str, schemas: Schemas) -> list[Call]:
  match = _FUNCTION.fullmatch(text)
  if match is None:
    raise ValueError("no function")
  name, inside = match[1].strip(), match[2]
  properties = schemas.get(name, {}).get("properties", {})
  arguments, at = dict[str, Any](), 0
  while at < len(inside.rstrip()):
    parameter = _PARAMETER.match(inside, at)
    if parameter is None:
      raise ValueError("no parameter")
    key, at = parameter[1].strip(), parameter.end()
    arguments[key] = _typed(parameter[2], properties.get(key) if properties else None)
  return [Call(name, _as_text(arguments))]


def _typed(text: str, schema: Any) -> Any:
  """A value that is written without a type: text, unless the schema says otherwise."""
  kind = schema.get("type") if isinstance(schema, dict) else None
  if kind in (None, "string") or (isinstance(kind, list) and "string" in kind):
    return text
  try:
    return json.loads(text)
  except ValueError:
    return text


def _pythonic_calls(text: str) -> list[Call]:
  tree = ast.parse(text.strip(), mode="eval").body
  nodes = tree.elts if isinstance(tree, ast.List) else [tree]
  found = []
  for node in nodes:
    if not isinstance(node, ast.Call) or node.args:
      raise ValueError("no call")
    arguments = {}
    for keyword in node.keywords:
      if keyword.arg is None:
        raise ValueError("arguments have names")
      arguments[keyword.arg] = _literal(keyword.value)
    found.append(Call(ast.unparse(node.func), _as_text(arguments)))
  return found or _none()


_CONSTANTS = {"true": True, "false": False, "null": None}


def _literal(node: ast.expr) -> Any:
  match node:
    case ast.Name() if node.id in _CONSTANTS:
      return _CONSTANTS[node.id]
    case ast.List() | ast.Tuple():
      return [_literal(item) for item in node.elts]
    case ast.Dict():
      keys = [_literal(key) if key is not None else _none() for key in node.keys]
      if not all(isinstance(key, str) for key in keys):
        raise ValueError("keys of objects are text")
      return dict(zip(keys, map(_literal, node.values), strict=True))
  value = ast.literal_eval(node)
  if not (value is None or isinstance(value, str | int | float)):
    raise ValueError("no value of JSON")
  return value


class _Gemma:
  """`call:f{k:<|"|>v<|"|>,n:[1,2]}`: JSON whose keys have no quotation marks, and whose texts have others."""

  def __init__(self, text: str, quote: str):
    self._text, self._quote, self._at = text.strip(), quote, 0

  def calls(self) -> list[Call]:
    match = re.compile(r"\s*call:([\w.-]+)").match(self._text)
    if match is None:
      raise ValueError("no call")
    self._at = match.end()
    arguments = self._object()
    if self._at != len(self._text):
      raise ValueError("something follows a call")
    return [Call(match[1], _as_text(arguments))]

  def _take(self, text: str) -> bool:
    found = self._text.startswith(text, self._at)
    self._at += len(text) if found else 0
    return found

  def _space(self) -> None:
    while self._text[self._at : self._at + 1].isspace():
      self._at += 1

  def _object(self) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if not self._take("{"):
      raise ValueError("no object")
    self._space()
    while not self._take("}"):
      key = self._string() if self._is_quoted() else self._until(":")
      self._space()
      if not self._take(":"):
        raise ValueError("a key has no value")
      found[key.strip()] = self._value()
      self._space()
      self._take(",")
      self._space()
    return found

  def _list(self) -> list[Any]:
    found: list[Any] = []
    self._take("[")
    self._space()
    while not self._take("]"):
      found.append(self._value())
      self._space()
      self._take(",")
      self._space()
    return found

  def _value(self) -> Any:
    self._space()
    if self._is_quoted():
      return self._string()
    if self._text[self._at] == "{":
      return self._object()
    if self._text[self._at] == "[":
      return self._list()
    value, self._at = json.JSONDecoder().raw_decode(self._text, self._at)
    return value

  def _is_quoted(self) -> bool:
    return self._text.startswith(self._quote, self._at)

  def _string(self) -> str:
    self._take(self._quote)
    value = self._until(self._quote)
    self._take(self._quote)
    return value

  def _until(self, text: str) -> str:
    end = self._text.index(text, self._at)
    value, self._at = self._text[self._at : end], end
    return value
