"""The tokenizer of a Hugging Face model folder.

`tokenizer.json` decides ids where it is there (as in transformers), else `tokenizer.model`. What they
do not say (special tokens, BOS and EOS, the chat template) is in `tokenizer_config.json` and the
small files beside it.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neurojax.tokenizer.library import decoding, load, read_table
from neurojax.tokenizer.sentencepiece import spec_from_sentencepiece
from neurojax.tokenizer.spec import TokenizerSpec
from neurojax.tokenizer.stops import STOP_TEXTS

_MAX_BYTES = 512 << 20
# Ids beyond a vocabulary are for rows without a token, never many times more.
_MAX_GAPS = 1 << 20


def spec_from_folder(folder: str | Path) -> TokenizerSpec | None:
  """The tokenizer of a folder, or None where it has neither tokenizer.json nor tokenizer.model.

  Raises:
    ValueError: a file is damaged or contradicts itself.
    NotImplementedError: a kind of tokenizer that is not here, by its name in the file.
  """
  folder = Path(folder)
  for name in ("tokenizer.json", "tokenizer.model"):
    if (folder / name).is_file():
      return spec_from_file(folder / name)
  return None


def spec_from_file(path: str | Path) -> TokenizerSpec:
  """The tokenizer of a tokenizer.json or tokenizer.model, with what the files beside it say.

  Raises: as `spec_from_folder`; FileNotFoundError: no such file.
  """
  path = Path(path)
  folder, config = path.parent, _config(path.parent)
  if path.suffix == ".model":
    spec = _with_name(path, lambda: _extended(spec_from_sentencepiece(_bytes(path)), config))
  else:
    spec = _with_name(path, lambda: spec_from_library(_text(path), config))
  stops = spec.stop_ids | _generation_stops(folder, len(spec.tokens))
  return dataclasses.replace(spec, stop_ids=stops, chat_template=_template(folder, config))


def spec_from_library(source: str, config: Mapping[str, Any] | None = None) -> TokenizerSpec:
  """The tokenizer of a tokenizer.json's text, with ids as the library `tokenizers` gives them.

  Args:
    config: What tokenizer_config.json says: `bos_token`, `eos_token`, `unk_token`. Without it nothing
      ends a generation but tokens known by their text. Its `add_bos_token` is not asked: the file's
      own post-processor decides, as in transformers.
  Raises: ValueError, NotImplementedError: as `spec_from_folder`.
  """
  config = config or {}
  fast = load(source)
  table = read_table(source)
  _, strips = decoding(table.get("decoder"))
  ids = fast.get_vocab(with_added_tokens=True)
  if not ids:
    raise ValueError("tokenizer.json has no tokens: get it again")
  size = max(ids.values()) + 1
  if size > len(ids) + _MAX_GAPS:
    raise ValueError(f"tokenizer.json has {len(ids)} tokens but the id {size - 1}: it is damaged")
  tokens = [""] * size
  for token, i in ids.items():
    tokens[i] = token
  types = ["normal" if token else "unused" for token in tokens]
  added = fast.get_added_tokens_decoder()
  if table["model"].get("byte_fallback"):
    for byte in range(256):
      if (i := ids.get(f"<0x{byte:02X}>")) is not None:
        types[i] = "byte"
  for i, token in added.items():
    types[i] = "control" if token.special else "user"
  unknown_id = _id(config, "unk_token", ids)
  if unknown_id is None:
    unknown_id = ids.get(table["model"].get("unk_token"))
  if unknown_id is not None and types[unknown_id] == "control":
    types[unknown_id] = "unknown"
  first, last = _ends(fast)
  bos_id, eos_id = _id(config, "bos_token", ids), _id(config, "eos_token", ids)
  for name, mine, its in (("bos", bos_id, first), ("eos", eos_id, last)):
    if mine is not None and its is not None and mine != its:
      raise NotImplementedError(
        f"{tokens[its]!r} is added to texts, but {name}_token is {tokens[mine]!r}: not here"
      )
  bos_id, eos_id = (bos_id, first)[bos_id is None], (eos_id, last)[eos_id is None]
  stops = {i for i, token in added.items() if token.special and token.content in STOP_TEXTS}
  return TokenizerSpec(
    kind="json",
    tokens=tuple(tokens),
    types=tuple(types),
    bos_id=bos_id,
    eos_id=eos_id,
    unknown_id=unknown_id,
    stop_ids=frozenset({eos_id} - {None} or stops),
    add_bos=first is not None,
    add_eos=last is not None,
    add_space_prefix=strips,
    source=source,
  )


def _ends(fast: Any) -> tuple[int | None, int | None]:
  """The ids that the file's own rule puts in front of and behind a text."""
  bare = fast.encode("a", add_special_tokens=False).ids
  full = fast.encode("a", add_special_tokens=True).ids
  for at in range(len(full) - len(bare) + 1):
    front, back = full[:at], full[at + len(bare) :]
    if full[at : at + len(bare)] == bare and len(front) <= 1 and len(back) <= 1:
      return (front[0] if front else None), (back[0] if back else None)
  raise NotImplementedError(
    f"the post-processor makes {full} of {bare}: one token in front and one behind are here"
  )


def _config(folder: Path) -> dict[str, Any]:
  """tokenizer_config.json, with what only older files beside it say."""
  config = _json(folder / "special_tokens_map.json") | _json(folder / "tokenizer_config.json")
  if isinstance(config.get("added_tokens_decoder", {}), dict):
    return config
  raise ValueError(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder is no table")


def _extended(spec: TokenizerSpec, config: Mapping[str, Any]) -> TokenizerSpec:
  """A tokenizer.model with the tokens and rules that tokenizer_config.json adds."""
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
      scores.append(-1e9)
    tokens[i] = text
    if types[i] != "unknown":
      types[i] = "control" if entry.get("special") else "user"
    after |= {i} if entry.get("rstrip") else set()
    before |= {i} if entry.get("lstrip") else set()
  ids = {token: i for i, token in enumerate(tokens)}
  bos_id = _id(config, "bos_token", ids)
  eos_id = _id(config, "eos_token", ids)
  bos_id = spec.bos_id if bos_id is None else bos_id
  eos_id = spec.eos_id if eos_id is None else eos_id
  return dataclasses.replace(
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


def _generation_stops(folder: Path, size: int) -> frozenset[int]:
  """The ids that end a generation, by generation_config.json or else config.json."""
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
  """The chat template; where there is another one for tools, the two become one."""
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


def _id(config: Mapping[str, Any], name: str, ids: Mapping[str, int]) -> int | None:
  value = config.get(name)
  text = value.get("content") if isinstance(value, dict) else value
  if text is None:
    return None
  if not isinstance(text, str):
    raise ValueError(f"{name} = {value!r}: expected a token's text")
  # transformers would add a token that is not there; no embedding has its row.
  return ids.get(text)


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
  size = path.stat().st_size
  if size > _MAX_BYTES:
    raise ValueError(f"{path}: {size} bytes: no tokenizer has more than {_MAX_BYTES}")
  return path.read_bytes()


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
