"""Recognises the rules of a tokenizer.json that GGUF has names for.

Format: https://github.com/huggingface/tokenizers.
"""

import json
from collections.abc import Mapping
from typing import Any, Literal

from neurojax.tokenizer.pretokenizers import PRE_TOKENIZERS, PreTokenizer

_FIRST = ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o")
"""Names to prefer where several have the same rules."""

# `ByteLevel(use_regex=True)` and `Digits(individual_digits=True)` cut by these, in the library's source.
_BYTE_LEVEL = PRE_TOKENIZERS["gpt-2"].patterns[0]
_DIGIT = r"\p{N}"

_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
_PREPEND = {"type": "Prepend", "prepend": "\u2581"}

Prefix = Literal["never", "prepend", "always", "first"]


def check_model(model: Mapping[str, Any]) -> None:
  """Raises NotImplementedError where a model is no plain BPE."""
  if model.get("type", "BPE") != "BPE":
    raise NotImplementedError(f"model {model['type']!r}: GGUF's 'gpt2' is BPE")
  for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
    if model.get(key):
      raise NotImplementedError(f"model.{key} = {model[key]!r}: GGUF's 'gpt2' has no such thing")


def pre_name(table: Mapping[str, Any] | None, *, whole_words: bool) -> str:
  """Returns GGUF's name of a pre-tokenizer that cuts as this one does.

  Raises: NotImplementedError: GGUF has no name for it.
  """
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
  """Writes out the line ends of a pattern, which files have either way."""
  return pattern.replace("\r", r"\r").replace("\n", r"\n")


def merge_line(merge: str | list[str]) -> str:
  """Returns a merge as "left right"; newer files have a list of two."""
  return merge if isinstance(merge, str) else " ".join(merge)


def decoding(decoder: Mapping[str, Any] | None) -> tuple[bool, bool]:
  """Describes the decoder of a tokenizer.json.

  Returns: Whether pieces are in GPT-2's byte alphabet (else spaces are U+2581 and bytes `<0xNN>`), and
    whether a text's first space is taken away.
  Raises: NotImplementedError: the decoder does something else.
  """
  steps = [decoder] if decoder is not None else []
  while any(step.get("type") == "Sequence" for step in steps):
    steps = [
      inner
      for step in steps
      for inner in (step["decoders"] if step.get("type") == "Sequence" else [step])
    ]
  byte_level = strips = False
  for step in steps:
    match step:
      case {"type": "ByteLevel"}:
        byte_level = True
      case {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}:
        pass
      case {"type": "ByteFallback" | "Fuse"}:
        pass
      case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
        strips = True
      case {"type": "Metaspace", "replacement": "\u2581"}:
        strips = step.get("prepend_scheme", "always") != "never"
      case _:
        raise NotImplementedError(
          f"decoder {json.dumps(step)[:120]} of tokenizer.json: only byte-level and SentencePiece's"
          " are here"
        )
  if not steps:
    raise NotImplementedError("tokenizer.json without a decoder: it would put a space between all")
  return byte_level, strips


def prefix_rule(table: Mapping[str, Any]) -> Prefix:
  """Tells when a tokenizer.json of SentencePiece's kind puts a space in front of a text.

  "prepend" always does, "always" and "first" unless the text begins with one, and "first" only at the
  very start.

  Raises: NotImplementedError: the file does something else to a text.
  """
  normalizer, pre = table.get("normalizer"), table.get("pre_tokenizer")
  steps = (
    normalizer["normalizers"] if (normalizer or {}).get("type") == "Sequence" else [normalizer]
  )
  match pre:
    case {"type": "Metaspace", "replacement": "\u2581", "split": False} if normalizer is None:
      scheme = pre.get("prepend_scheme", "always")
      if scheme in ("never", "always", "first"):
        return scheme
    # All spaces are gone by then: this cuts nothing.
    case None | {"type": "Split", "pattern": {"String": " "}}:
      if steps == [_REPLACE]:
        return "never"
      if steps == [_PREPEND, _REPLACE]:
        return "prepend"
  raise NotImplementedError(
    f"normalizer {normalizer!r:.120} with pre-tokenizer {pre!r:.120}: GGUF has no name for it"
  )
