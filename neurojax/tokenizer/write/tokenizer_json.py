"""Writes a TokenizerSpec as a tokenizer.json."""

import json
from typing import Any

from neurojax.tokenizer.pretokenizers import pre_tokenizer
from neurojax.tokenizer.tokenizer_spec import TokenizerSpec


def json_from_spec(spec: TokenizerSpec) -> str:
  """Returns a tokenizer.json with the same ids.

  This is the inverse of `spec_from_json`, for Gemma 4's tokenizer the inverse of `in_gguf_terms`, and
  for a "json" spec its own source.

  Raises: NotImplementedError: the tokenizer is neither byte-level BPE nor Gemma 4's, or no
    tokenizer.json would give its ids.
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
  """Returns the table of BPE on text with U+2581 for a space, as Gemma's files have it."""
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


def _post_processor(spec: TokenizerSpec) -> dict[str, Any]:
  """Returns the post-processor that adds the BOS and EOS that the spec adds."""
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


def _halves(line: str) -> list[str]:
  # A piece may itself begin with a space, see `Tokenizer`.
  cut = line.find(" ", 1)
  return [line[:cut], line[cut + 1 :]]
