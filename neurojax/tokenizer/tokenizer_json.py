"""tokenizer.json, the format of the tokenizers library, for byte-level BPE: read and written.

Format: https://github.com/huggingface/tokenizers. What is read is what llama.cpp has a name for:
anything else in the file would be lost on the way to GGUF, and is refused by name.
"""

import json
from collections.abc import Mapping
from typing import Any

from neurojax.tokenizer.pretokenizers import PRE_TOKENIZERS, PreTokenizer, pre_tokenizer
from neurojax.tokenizer.spec import TokenizerSpec

_FIRST = ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o")
"""Names that are preferred where several have the same rules."""

# What `ByteLevel(use_regex=True)` and `Digits(individual_digits=True)` cut by: the library's source.
_BYTE_LEVEL = PRE_TOKENIZERS["gpt-2"].patterns[0]
_DIGIT = r"\p{N}"


def spec_from_json(
  text: str,
  *,
  bos: str | None = None,
  eos: str | None = None,
  unknown: str | None = None,
  chat_template: str | None = None,
) -> TokenizerSpec:
  """The tokenizer of a tokenizer.json.

  Args:
    text: The file's text.
    bos, eos, unknown: Spellings of special tokens, which the file does not tell apart. `eos` ends
      a generation.
  Raises:
    ValueError: no tokenizer.json, ids with gaps, or a spelling that is no token.
    NotImplementedError: a model, normalizer, pre-tokenizer or post-processor that GGUF has no name
      for.
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


def json_from_spec(spec: TokenizerSpec) -> str:
  """A tokenizer.json with the same ids: the inverse of `spec_from_json`, or of `portable` for Gemma 4's;
  a "json" spec's own source.

  Raises: NotImplementedError: a tokenizer other than byte-level BPE and Gemma 4's, or one of the latter
    whose ids no tokenizer.json would give.
  """
  if spec.kind == "json":
    return spec.source
  if spec.kind == "bpe" and spec.pre == "gemma4":
    return json.dumps(_spaced_table(spec), ensure_ascii=False, indent=1)
  rules = pre_tokenizer(spec.pre) if spec.kind == "bpe" else None
  if rules is None or not rules.byte_level:
    raise NotImplementedError(
      f"a tokenizer of kind {spec.kind!r} (pre {spec.pre!r}): only byte-level BPE and Gemma 4's are written as"
      " tokenizer.json; a GGUF file holds this one"
    )
  table = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": _added_tokens(spec),
    "normalizer": None,
    "pre_tokenizer": {
      "type": "Sequence",
      "pretokenizers": [*map(_split, rules.patterns), _byte_level(use_regex=False)],
    },
    "post_processor": _post_processor(spec),
    "decoder": _byte_level(use_regex=True),
    "model": {
      "type": "BPE",
      "dropout": None,
      "unk_token": None,
      "continuing_subword_prefix": None,
      "end_of_word_suffix": None,
      "fuse_unk": False,
      "byte_fallback": False,
      "ignore_merges": rules.whole_words,
      "vocab": {token: i for i, token in enumerate(spec.tokens)},
      "merges": [_halves(line) for line in spec.merges],
    },
  }
  return json.dumps(table, ensure_ascii=False, indent=1)


def _added_tokens(spec: TokenizerSpec) -> list[dict[str, Any]]:
  special = {"control": True, "unknown": True, "user": False}
  return [
    {"id": i, "content": token, "single_word": False, "lstrip": i in spec.strip_before_ids,
     "rstrip": i in spec.strip_after_ids, "normalized": False, "special": special[kind]}
    for i, (token, kind) in enumerate(zip(spec.tokens, spec.types, strict=True))
    if kind in special
  ]  # fmt: skip


def _spaced_table(spec: TokenizerSpec) -> dict[str, Any]:
  """BPE on text with U+2581 for a space, as Gemma's files have it."""
  vocab = {token: i for i, token in enumerate(spec.tokens)}
  if missing := [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in vocab]:
    raise NotImplementedError(
      f"the vocabulary has no token {missing[0]}: tokenizer.json would make it unknown, GGUF leaves"
      " the byte out"
    )
  merges = [_halves(line) for line in spec.merges]
  for left, right in merges:
    # GGUF's rule cuts between lines and line ends; a tokenizer.json of this kind cuts nowhere.
    if (left[-1] == "\n") != (right[0] == "\n"):
      raise NotImplementedError(f"the merge {left!r} {right!r} joins a line and its end: not here")
  post = _post_processor(spec)
  return {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": _added_tokens(spec),
    "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    "pre_tokenizer": {
      "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
    },
    "post_processor": None if post["type"] == "ByteLevel" else post,
    "decoder": {
      "type": "Sequence",
      "decoders": [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
      ],
    },
    "model": {
      "type": "BPE", "dropout": None,
      "unk_token": None if spec.unknown_id is None else spec.tokens[spec.unknown_id],
      "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
      "byte_fallback": True, "ignore_merges": False, "vocab": vocab, "merges": merges,
    },
  }  # fmt: skip


def check_model(model: Mapping[str, Any]) -> None:
  if model.get("type", "BPE") != "BPE":
    raise NotImplementedError(f"model {model['type']!r}: GGUF's 'gpt2' is BPE")
  for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
    if model.get(key):
      raise NotImplementedError(f"model.{key} = {model[key]!r}: GGUF's 'gpt2' has no such thing")


def pre_name(table: Mapping[str, Any] | None, *, whole_words: bool) -> str:
  """The name of a pre-tokenizer that cuts as this one does."""
  parts = [] if table is None else [table]
  while any(part["type"] == "Sequence" for part in parts):
    parts = [
      inner
      for part in parts
      for inner in (part["pretokenizers"] if part["type"] == "Sequence" else [part])
    ]
  patterns: list[str] = []
  spells_bytes = False
  for part in parts:
    match part:
      case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"} if not part.get(
        "invert"
      ):
        patterns.append(pattern)
      case {"type": "Digits", "individual_digits": True}:
        patterns.append(_DIGIT)
      case {"type": "ByteLevel", "add_prefix_space": False}:
        patterns += [_BYTE_LEVEL] if part.get("use_regex", True) else []
        spells_bytes = True
      case _:
        raise NotImplementedError(
          f"pre-tokenizer {json.dumps(part)[:120]}: GGUF has no name for it: train with one of"
          f" {', '.join(_FIRST)}"
        )
  wanted = PreTokenizer(patterns=tuple(patterns), whole_words=whole_words)
  for name in (*_FIRST, *PRE_TOKENIZERS):
    rules = PRE_TOKENIZERS[name]
    if spells_bytes and (tuple(map(_escaped, rules.patterns)), rules.byte_level, rules.whole_words) == (
      tuple(map(_escaped, wanted.patterns)), True, whole_words,
    ):  # fmt: skip
      return name
  raise NotImplementedError(
    f"pre-tokenizer {patterns}, ignore_merges {whole_words}: GGUF has no name for it: train with"
    f" one of {', '.join(_FIRST)}"
  )


def _escaped(pattern: str) -> str:
  """Line ends in a pattern may be themselves or written out."""
  return pattern.replace("\r", r"\r").replace("\n", r"\n")


def _added(table: Mapping[str, Any] | None) -> tuple[str | None, str | None]:
  """The tokens that are put in front of and behind every text."""
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


def _post_processor(spec: TokenizerSpec) -> dict[str, Any]:
  """Adds what the spec adds."""
  bos = spec.tokens[spec.bos_id] if spec.add_bos and spec.bos_id is not None else None
  eos = spec.tokens[spec.eos_id] if spec.add_eos and spec.eos_id is not None else None
  if bos is None and eos is None:
    return _byte_level(use_regex=True)

  def template(*sequences: str) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for kind, sequence in enumerate(sequences):
      parts += [{"SpecialToken": {"id": bos, "type_id": kind}}] if bos else []
      parts += [{"Sequence": {"id": sequence, "type_id": kind}}]
      parts += [{"SpecialToken": {"id": eos, "type_id": kind}}] if eos else []
    return parts

  tokens = {
    text: {"id": text, "ids": [spec.tokens.index(text)], "tokens": [text]}
    for text in (bos, eos)
    if text is not None
  }
  return {
    "type": "TemplateProcessing",
    "single": template("A"),
    "pair": template("A", "B"),
    "special_tokens": tokens,
  }


def _split(pattern: str) -> dict[str, Any]:
  return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
  return {
    "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex,
  }  # fmt: skip


def merge_line(merge: str | list[str]) -> str:
  return merge if isinstance(merge, str) else " ".join(merge)


def _halves(line: str) -> list[str]:
  # A piece may itself begin with a space, see `Tokenizer`.
  cut = line.find(" ", 1)
  return [line[:cut], line[cut + 1 :]]


def _kind(table: object) -> str:
  return repr(table.get("type")) if isinstance(table, dict) else repr(table)
