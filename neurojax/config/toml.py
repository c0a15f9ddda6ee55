"""Reads and writes frozen dataclasses as strict TOML, and finds the named files in configs/."""

import dataclasses
import functools
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")


def sparse(default: Any) -> Any:
  """A field that `to_toml` leaves out while it has its default."""
  return dataclasses.field(default=default, metadata={"sparse": True})


def from_toml(cls: type[T], text: str, *, where: str = "TOML") -> T:
  """Build `cls` from TOML text; `where` names the text in errors.

  Raises: ValueError: not TOML, an unknown or missing key, or a value of the wrong type.
  """
  return from_dict(cls, parse_toml(text, where=where), where=where)


def parse_toml(text: str, *, where: str = "TOML") -> dict[str, Any]:
  """The table of TOML text. Raises: ValueError: not TOML; `where` names the text."""
  try:
    return tomllib.loads(text)
  except tomllib.TOMLDecodeError as error:
    raise ValueError(f"{where}: not valid TOML: {error}") from error


def to_toml(config: Any) -> str:
  """TOML text that `from_toml` reads back to an equal object.

  Absent values (None) are left out, and of what few models have (`_sparse`) the defaults.
  """
  # Imported when needed: machines that only read configurations do without it.
  import tomli_w

  return tomli_w.dumps(_plain(config))


def from_dict(cls: type[T], table: dict[str, Any], *, where: str = "table") -> T:
  """Build the dataclass `cls` from plain values, recursing into nested dataclasses.

  Raises: ValueError: an unknown or missing key, a wrong type, or what `cls` itself refuses.
  """
  fields = {field.name: field for field in dataclasses.fields(cls)}
  hints = _hints(cls)
  unknown = sorted(set(table) - set(fields))
  if unknown:
    raise ValueError(
      f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(sorted(fields))}"
    )
  values = {key: _coerce(hints[key], value, f"{where}: {key}") for key, value in table.items()}
  missing = [
    name
    for name, field in fields.items()
    if name not in values
    and field.default is dataclasses.MISSING
    and field.default_factory is dataclasses.MISSING
  ]
  if missing:
    raise ValueError(f"{where}: missing key {missing[0]!r}")
  try:
    return cls(**values)
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from error


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
  return typing.get_type_hints(cls)


def _coerce(hint: Any, value: Any, where: str) -> Any:
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin is Literal:
    if value not in args:
      raise ValueError(f"{where} = {value!r}: choose one of {', '.join(map(repr, args))}")
    return value
  if origin in (typing.Union, types.UnionType):
    if value is None and type(None) in args:
      return None
    inner = [arg for arg in args if arg is not type(None)]
    return _coerce(inner[0], value, where)
  if origin is tuple:
    if not isinstance(value, list | tuple):
      raise ValueError(f"{where} = {value!r}: expected a list")
    return tuple(_coerce(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
  if dataclasses.is_dataclass(hint):
    if not isinstance(value, dict):
      raise ValueError(f"{where} = {value!r}: expected a table")
    return from_dict(hint, value, where=where)
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
    raise ValueError(f"{where} = {value!r}: expected {hint.__name__}, got {type(value).__name__}")
  return value


def _plain(value: Any) -> Any:
  if dataclasses.is_dataclass(value):
    pairs = ((f, getattr(value, f.name)) for f in dataclasses.fields(value))
    return {
      f.name: _plain(item)
      for f, item in pairs
      if item is not None and not (f.metadata.get("sparse") and item == f.default)
    }
  if isinstance(value, tuple | list):
    return [_plain(item) for item in value]
  return value


def named_configs(kind: str) -> dict[str, Path]:
  """By name what is in the folder configs/KIND of the repository or the installed package."""
  package = Path(__file__).parents[1]
  # The package's own folder is a link to the repository's, which not every copy keeps.
  folders = [folder / "configs" / kind for folder in (package, package.parent)]
  folder = next((folder for folder in folders if folder.is_dir()), folders[0])
  return {path.stem: path for path in sorted(folder.glob("*.toml"))}
