"""Reads a tokenizer.json, the format of the library `tokenizers`.

Format: https://github.com/huggingface/tokenizers.
"""

import json
from collections.abc import Mapping
from typing import Any

import tokenizers

from neurojax.tokenizer.read.json_rules import check_model, decoding, merge_line, pre_name
from neurojax.tokenizer.stop_tokens import STOP_TEXTS
from neurojax.tokenizer.tokenizer_spec import TokenizerSpec

# Ids beyond a vocabulary are for rows without a token, never many times more.
_MAX_GAPS = 1 << 20
_MAX_GROWTH = 64


def spec_from_json(
  text: str,
  *,
  bos: str | None = None,
  eos: str | None = None,
  unknown: str | None = None,
  chat_template: str | None = None,
) -> TokenizerSpec:
  """Reads a byte-level BPE tokenizer.json in GGUF's terms, as a spec of kind "bpe".

  Args:
    text: The file's text.
    bos, eos, unknown: Spellings of special tokens, which the file does not tell apart. `eos` ends
      a generation.
  Raises:
    ValueError: this is no tokenizer.json, ids have gaps, or a spelling is no token.
    NotImplementedError: GGUF has no name for the model, normalizer, pre-tokenizer or post-processor.
  """
  try:
    table = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"not JSON: {error}") from error
  model = table.get("model") if isinstance(table, dict) else None
  if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
    raise ValueError("no tokenizer.json: it has no model with a vocabulary")
  check_model(model)
  if table.get("normalizer") is not None:
    raise NotImplementedError(f"normalizer {_kind(table['normalizer'])}: GGUF's 'gpt2' has none")
  pre = pre_name(table.get("pre_tokenizer"), whole_words=bool(model.get("ignore_merges")))

  ids: dict[str, int] = dict(model["vocab"])
  types = dict.fromkeys(ids, "normal")
  for added in table.get("added_tokens") or ():
    ids[added["content"]] = added["id"]
    types[added["content"]] = "control" if added.get("special") else "user"
  tokens = sorted(ids, key=lambda token: ids[token])
  if [ids[token] for token in tokens] != list(range(len(tokens))):
    raise ValueError(f"{len(tokens)} tokens whose ids are not 0 to {len(tokens) - 1}: train anew")

  def identify(name: str, spelling: str | None) -> int | None:
    if spelling is None:
      return None
    if spelling not in ids:
      raise ValueError(f"{name} = {spelling!r} is no token of this vocabulary")
    return ids[spelling]

  first, last = _added(table.get("post_processor"))
  bos, eos = first or bos, last or eos
  eos_id = identify("eos", eos)
  return TokenizerSpec(
    kind="bpe",
    tokens=tuple(tokens),
    types=tuple(types[token] for token in tokens),
    merges=tuple(merge_line(merge) for merge in model.get("merges") or ()),
    pre=pre,
    bos_id=identify("bos", bos),
    eos_id=eos_id,
    unknown_id=identify("unknown", unknown),
    stop_ids=frozenset() if eos_id is None else frozenset({eos_id}),
    add_bos=first is not None,
    add_eos=last is not None,
    chat_template=chat_template,
  )


def _added(table: Mapping[str, Any] | None) -> tuple[str | None, str | None]:
  """Returns the tokens that a post-processor puts in front of and behind every text."""
  if table is None or table["type"] == "ByteLevel":
    return None, None
  if table["type"] == "Sequence":
    found = [_added(part) for part in table["processors"]]
    firsts, lasts = [f for f, _ in found if f], [e for _, e in found if e]
    if len(firsts) <= 1 and len(lasts) <= 1:
      return (firsts or [None])[0], (lasts or [None])[0]
  elif table["type"] == "TemplateProcessing":
    names = [part.get("SpecialToken", {}).get("id") for part in table["single"]]
    at = names.index(None) if names.count(None) == 1 else len(names)
    if at <= 1 and len(names) - at <= 2:
      return (names[0] if at else None), (names[-1] if len(names) - at == 2 else None)
  raise NotImplementedError(f"post_processor {json.dumps(table)[:120]}: GGUF adds bos and eos only")


def _kind(table: object) -> str:
  return repr(table.get("type")) if isinstance(table, dict) else repr(table)


def load(source: str) -> tokenizers.Tokenizer:
  """Loads a tokenizer.json by the library `tokenizers`, without truncation or padding.

  Raises: ValueError: the library does not read it.
  """
  try:
    fast = tokenizers.Tokenizer.from_str(source)
    fast.no_truncation()
    fast.no_padding()
    # Some contradictions, as a special token that is none, break it only here.
    fast.encode("a")
  except Exception as error:
    raise ValueError(f"tokenizer.json is not read by the library `tokenizers`: {error}") from error
  except BaseException as error:
    # A panic of the library is no Exception.
    if isinstance(error, KeyboardInterrupt | SystemExit):
      raise
    raise ValueError(f"tokenizer.json breaks the library `tokenizers`: {error}") from error
  return fast


def read_table(source: str) -> dict[str, Any]:
  """Returns a tokenizer.json, which the library has read, as a table.

  Raises: NotImplementedError: a normalizer makes text much longer, which could take all memory.
  """
  table = json.loads(source)
  growth = 1
  steps = [table.get("normalizer")]
  while steps:
    step = steps.pop()
    if not isinstance(step, dict):
      continue
    kind = step.get("type")
    if kind == "Sequence":
      steps += step.get("normalizers") or []
    elif kind == "Precompiled":
      raise NotImplementedError("normalizer 'Precompiled' (SentencePiece's map of characters)")
    growth *= max(len(str(step.get("content", ""))), len(str(step.get("prepend", ""))), 1)
  if growth > _MAX_GROWTH:
    raise NotImplementedError(f"normalizers that make text {growth} times as long")
  return table


def spec_from_library(source: str, config: Mapping[str, Any] | None = None) -> TokenizerSpec:
  """Reads any tokenizer.json as a spec of kind "json", which the library `tokenizers` encodes.

  Args:
    source: The file's text.
    config: The table of tokenizer_config.json, for `bos_token`, `eos_token` and `unk_token`. Without it
      only tokens known by their text end a generation. Its `add_bos_token` is not asked: the file's own
      post-processor decides, as in transformers.
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
  unknown_id = named_id(config, "unk_token", ids)
  if unknown_id is None:
    unknown_id = ids.get(table["model"].get("unk_token"))
  if unknown_id is not None and types[unknown_id] == "control":
    types[unknown_id] = "unknown"
  first, last = _ends(fast)
  bos_id, eos_id = named_id(config, "bos_token", ids), named_id(config, "eos_token", ids)
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
  """Returns the ids that the file's own rule puts in front of and behind a text."""
  bare = fast.encode("a", add_special_tokens=False).ids
  full = fast.encode("a", add_special_tokens=True).ids
  for at in range(len(full) - len(bare) + 1):
    front, back = full[:at], full[at + len(bare) :]
    if full[at : at + len(bare)] == bare and len(front) <= 1 and len(back) <= 1:
      return (front[0] if front else None), (back[0] if back else None)
  raise NotImplementedError(
    f"the post-processor makes {full} of {bare}: one token in front and one behind are here"
  )


def named_id(config: Mapping[str, Any], name: str, ids: Mapping[str, int]) -> int | None:
  value = config.get(name)
  text = value.get("content") if isinstance(value, dict) else value
  if text is None:
    return None
  if not isinstance(text, str):
    raise ValueError(f"{name} = {value!r}: expected a token's text")
  # transformers would add a token that is not there; no embedding has its row.
  return ids.get(text)
