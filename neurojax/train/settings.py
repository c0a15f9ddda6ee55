"""Reads the configuration of a training run: a file or a name, an architecture, and options."""

import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neurojax.config import ModelConfig, from_dict, named_configs, to_toml
from neurojax.train.config import TrainConfig


def read_config(
  given: str | Path, *, arch: str | None = None, overrides: Sequence[str] = ()
) -> TrainConfig:
  """Reads a configuration.

  Args:
    given: A TOML file, or a name in configs/train.
    arch: An architecture in place of its [model]: a TOML file, or a name in configs/model.
    overrides: Options such as "--steps", "100", "--optimizer.peak-lr=1e-3".
  Raises: ValueError, OSError: there is no such file, or something in it or an option is wrong.
  """
  table = _read(str(given))
  if arch is not None:
    table["model"] = _architecture(arch)
  return from_dict(TrainConfig, merged(table, overrides, TrainConfig), where=f"{given} and options")


def change_config(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
  """Changes keys of a configuration by dotted name; None removes a key.

  Raises: ValueError: no such key, or a value of the wrong type.
  """
  if not changes:
    return config
  table = tomllib.loads(to_toml(config))
  known = list(keys_of(TrainConfig))
  for key, value in changes.items():
    if key not in known:
      near = difflib.get_close_matches(key, known, 3)
      hint = f"do you mean {' or '.join(near)}?" if near else f"keys are {', '.join(known)}"
      raise ValueError(f"{key!r} is no key of the configuration: {hint}")
    place = table
    *parents, leaf = key.split(".")
    for parent in parents:
      place = place.setdefault(parent, {})
    if value is None:
      place.pop(leaf, None)
    else:
      place[leaf] = value
  return from_dict(TrainConfig, table, where="configuration")


def merged(table: dict[str, Any], overrides: Sequence[str], cls: type) -> dict[str, Any]:
  """Puts options into the table of a configuration: `--a.b-c VALUE`, `--a.b_c=VALUE`.

  Values are TOML, or else strings; `none` removes the key.

  Raises: ValueError: an option without value, a value without option, or no such key.
  """
  table = {key: dict(value) if isinstance(value, dict) else value for key, value in table.items()}
  known = list(keys_of(cls))
  rest = list(overrides)
  while rest:
    option = rest.pop(0)
    name, equals, value = option.partition("=")
    if not name.startswith("--") and not equals:
      raise ValueError(f"{option!r}: not an option: keys are given as --steps 100")
    if not equals:
      if not rest or rest[0].startswith("--"):
        raise ValueError(f"{option}: a value is missing")
      value = rest.pop(0)
    key = name.removeprefix("--").replace("-", "_")
    if key not in known:
      near = difflib.get_close_matches(key, known, 3)
      hint = f"do you mean {' or '.join(near)}?" if near else "--show prints all keys"
      raise ValueError(f"{name}: neither an option nor a key of the configuration: {hint}")
    place = table
    *parents, leaf = key.split(".")
    for parent in parents:
      place = place.setdefault(parent, {})
      if not isinstance(place, dict):
        raise ValueError(f"{name}: {parent} = {place!r} in the configuration is no table")
    if value.lower() == "none":
      place.pop(leaf, None)
    else:
      place[leaf] = _value(value)
  return table


def keys_of(cls: type, prefix: str = "") -> "list[str]":
  """Lists the dotted names of all values of a configuration."""
  hints = typing.get_type_hints(cls)
  found: list[str] = []
  for field in dataclasses.fields(cls):
    hint = hints[field.name]
    nested = dataclasses.is_dataclass(hint)
    found += keys_of(hint, f"{prefix}{field.name}.") if nested else [prefix + field.name]
  return found


def _value(text: str) -> Any:
  try:
    table = tomllib.loads(f"value = {text}")
  except tomllib.TOMLDecodeError:
    return text
  return table["value"] if len(table) == 1 else text


def recipes() -> dict[str, Path]:
  """The named configurations: configs/train/NAME.toml of the repository or the installed package."""
  return named_configs("train")


def _read(given: str) -> dict[str, Any]:
  """Reads a configuration by its path or name. Raises: ValueError or OSError: there is none."""
  path = Path(given)
  known = recipes()
  if not path.suffix and not path.exists() and given in known:
    path = known[given]
  try:
    return tomllib.loads(path.read_bytes().decode("utf-8"))
  except (FileNotFoundError, IsADirectoryError) as error:
    what = "a folder" if path.is_dir() else "no such file"
    raise type(error)(
      f"--config {given}: {what}: give a TOML file, or one of {', '.join(known)}"
    ) from error
  except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f"{path}: not valid TOML: {error}") from error


def _architecture(given: str) -> dict[str, Any]:
  """Reads an architecture as a [model] table. Raises: ValueError: there is none, or it is wrong."""
  return tomllib.loads(to_toml(ModelConfig.named(given)))
