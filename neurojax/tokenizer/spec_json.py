"""Stores a TokenizerSpec of any kind as JSON without loss."""

import dataclasses
import json
import typing

from neurojax.tokenizer.tokenizer_spec import TokenizerSpec

_FORMAT = "neurojax.tokenizer/1"
# Fields that came later are absent at their defaults: the same vocabulary stays the same text, whose
# digest names prepared data and training runs.
_LATER = {"strip_before_ids": frozenset(), "source": None}


def dump_spec(spec: TokenizerSpec) -> str:
  """Returns JSON text that `parse_spec` reads back to an equal spec."""
  table = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
  table = {
    name: value for name, value in table.items() if name not in _LATER or value != _LATER[name]
  }
  sets = {name: sorted(value) for name, value in table.items() if isinstance(value, frozenset)}
  return json.dumps({"format": _FORMAT, **table, **sets}, ensure_ascii=True, indent=1) + "\n"


def parse_spec(text: str, *, where: str = "tokenizer") -> TokenizerSpec:
  """Reads a text that `dump_spec` wrote; `where` names the text in errors.

  Raises: ValueError: the text is something else, or damaged.
  """
  try:
    table = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{where}: not JSON: {error}") from error
  if not isinstance(table, dict) or table.pop("format", None) != _FORMAT:
    raise ValueError(f"{where}: no tokenizer of format {_FORMAT!r}: prepare the data again")
  hints = typing.get_type_hints(TokenizerSpec)
  if odd := sorted((set(table) ^ set(hints)) - set(_LATER)):
    raise ValueError(f"{where}: {odd[0]!r} is missing or unknown: prepare the data again")
  for name, value in table.items():
    if isinstance(value, list):
      item = typing.get_args(hints[name])[:1]
      if not item or not all(isinstance(entry, (*item, int)) for entry in value):
        raise ValueError(f"{where}: {name} holds values of the wrong type: prepare the data again")
      table[name] = (frozenset if typing.get_origin(hints[name]) is frozenset else tuple)(value)
    elif typing.get_origin(hints[name]) in (tuple, frozenset):
      raise ValueError(f"{where}: {name} = {value!r}: expected a list: prepare the data again")
  try:
    return TokenizerSpec(**table)
  except (ValueError, TypeError) as error:
    raise ValueError(f"{where}: {error}") from error
