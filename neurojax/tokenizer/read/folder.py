"""Reads the tokenizer of a model folder in the layout of Hugging Face's transformers.

`tokenizer.json` decides the ids where there is one (as in transformers), else `tokenizer.model`. Special
tokens, BOS and EOS and the chat template are in `tokenizer_config.json` and the small files beside it.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neurojax.tokenizer.read.bounded import read_bounded
from neurojax.tokenizer.read.tokenizer_json import named_id, spec_from_library
from neurojax.tokenizer.read.tokenizer_model import spec_from_sentencepiece, with_tokens
from neurojax.tokenizer.tokenizer_spec import TokenizerSpec

_MAX_BYTES = 512 << 20


def spec_from_folder(folder: str | Path) -> TokenizerSpec | None:
  """Reads the tokenizer of a folder; None where it has neither tokenizer.json nor tokenizer.model.

  Raises:
    ValueError: a file is damaged or contradicts itself.
    NotImplementedError: this package lacks the kind of tokenizer that the file names.
  """
  folder = Path(folder)
  for name in ("tokenizer.json", "tokenizer.model"):
    if (folder / name).is_file():
      return spec_from_file(folder / name)
  return None


def spec_from_file(path: str | Path) -> TokenizerSpec:
  """Reads a tokenizer.json or tokenizer.model, and the files beside it.

  Raises: FileNotFoundError: no such file; otherwise as `spec_from_folder`.
  """
  path = Path(path)
  folder, config = path.parent, _config(path.parent)
  if path.suffix == ".model":
    spec = _with_name(path, lambda: _extended(spec_from_sentencepiece(_bytes(path)), config))
  else:
    spec = _with_name(path, lambda: spec_from_library(_text(path), config))
  stops = spec.stop_ids | _generation_stops(folder, len(spec.tokens))
  return dataclasses.replace(spec, stop_ids=stops, chat_template=_template(folder, config))


def _config(folder: Path) -> dict[str, Any]:
  """Reads tokenizer_config.json, completed by the older special_tokens_map.json."""
  config = _json(folder / "special_tokens_map.json") | _json(folder / "tokenizer_config.json")
  if isinstance(config.get("added_tokens_decoder", {}), dict):
    return config
  raise ValueError(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder is no table")


def _extended(spec: TokenizerSpec, config: Mapping[str, Any]) -> TokenizerSpec:
  """Returns the spec of a tokenizer.model with the tokens and rules of tokenizer_config.json."""
  tokens, types, scores = list(spec.tokens), list(spec.types), list(spec.scores)
  after, before = set(), set()
  entries = config.get("added_tokens_decoder", {})
  for key, entry in sorted(entries.items(), key=lambda item: _number(item[0])):
    i, text = _number(key), entry.get("content") if isinstance(entry, dict) else None
    if not isinstance(text, str) or not text or i > len(tokens):
      raise ValueError(
        f"added_tokens_decoder[{key!r}] = {entry!r}: expected a token of the next id"
      )
    if i == len(tokens):
      if text in spec.tokens:
        raise ValueError(f"added_tokens_decoder[{key!r}]: {text!r} is a token already")
      tokens.append(text)
      types.append("normal")
      scores += [-1e9] * bool(scores)
    tokens[i] = text
    if types[i] != "unknown":
      types[i] = "control" if entry.get("special") else "user"
    after |= {i} if entry.get("rstrip") else set()
    before |= {i} if entry.get("lstrip") else set()
  ids = {token: i for i, token in enumerate(tokens)}
  bos_id = named_id(config, "bos_token", ids)
  eos_id = named_id(config, "eos_token", ids)
  bos_id = spec.bos_id if bos_id is None else bos_id
  eos_id = spec.eos_id if eos_id is None else eos_id
  changed = (tuple(tokens), tuple(types)) != (spec.tokens, spec.types)
  spec = dataclasses.replace(
    spec,
    tokens=tuple(tokens),
    types=tuple(types),
    scores=tuple(scores),
    bos_id=bos_id,
    eos_id=eos_id,
    stop_ids=frozenset({eos_id} - {None}),
    add_bos=bool(config.get("add_bos_token", True)) and bos_id is not None,
    add_eos=bool(config.get("add_eos_token", False)) and eos_id is not None,
    strip_after_ids=frozenset(after),
    strip_before_ids=frozenset(before),
  )
  return with_tokens(spec) if changed and spec.kind == "sentencepiece" else spec


def _generation_stops(folder: Path, size: int) -> frozenset[int]:
  """Returns the ids that end a generation by generation_config.json, or else config.json."""
  for name in ("generation_config.json", "config.json"):
    value = _json(folder / name).get("eos_token_id")
    if value is None:
      continue
    values = value if isinstance(value, list) else [value]
    for i in values:
      if isinstance(i, bool) or not isinstance(i, int) or i < 0:
        raise ValueError(f"{folder / name}: eos_token_id = {value!r}: expected ids")
    # A row of the embedding may have no token, so no text stops there.
    return frozenset(i for i in values if i < size)
  return frozenset()


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
  """Returns the chat template; a separate template for tools is joined to it."""
  named: dict[str, str] = {}
  value = config.get("chat_template")
  if isinstance(value, str):
    named["default"] = value
  elif isinstance(value, list):
    for entry in value:
      if not isinstance(entry, dict) or not all(
        isinstance(entry.get(key), str) for key in ("name", "template")
      ):
        raise ValueError(
          f"chat_template in {folder} holds {entry!r:.80}: expected name and template"
        )
      named[entry["name"]] = entry["template"]
  elif value is not None:
    raise ValueError(f"chat_template in {folder} is {type(value).__name__}: expected text")
  if (path := folder / "chat_template.jinja").is_file():
    named["default"] = _text(path)
  more = folder / "additional_chat_templates"
  if (path := more / "tool_use.jinja").is_file():
    named["tool_use"] = _text(path)
  default = named.get("default")
  if default is None and isinstance(
    text := _json(folder / "chat_template.json").get("chat_template"), str
  ):
    default = text
  if default is None or "tool_use" not in named:
    return default
  # Expressions, not blocks, touch the templates: they keep line ends as they are.
  tool, default = (text.removesuffix("\n") for text in (named["tool_use"], default))
  return f"{{% if tools is not none %}}{{{{ '' }}}}{tool}{{{{ '' }}}}{{% else %}}{{{{ '' }}}}{default}{{{{ '' }}}}{{% endif %}}"


def _number(key: str) -> int:
  try:
    value = int(key)
  except (TypeError, ValueError):
    value = -1
  if value < 0:
    raise ValueError(f"added_tokens_decoder has the key {key!r}: expected an id")
  return value


def _json(path: Path) -> dict[str, Any]:
  if not path.is_file():
    return {}
  try:
    table = json.loads(_text(path))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path}: not JSON: {error}") from error
  if not isinstance(table, dict):
    raise ValueError(f"{path}: a {type(table).__name__}: expected a table")
  return table


def _bytes(path: Path) -> bytes:
  with path.open("rb") as file:
    return read_bounded(file, str(path), _MAX_BYTES, "a tokenizer's file")


def _text(path: Path) -> str:
  data = _bytes(path)
  try:
    return data.decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: not UTF-8 at byte {error.start}: get the file again") from error


def _with_name(path: Path, read: Any) -> TokenizerSpec:
  try:
    return read()
  except NotImplementedError as error:
    raise NotImplementedError(f"{path}: {error}") from error
  except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
    reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    raise ValueError(f"{path}: {reason}") from error
