"""Writes a TokenizerSpec as GGUF's `tokenizer.*` keys, the inverse of `read.gguf`."""

import dataclasses
from typing import Any

from neurojax.tokenizer.read.gguf import spec_from_gguf
from neurojax.tokenizer.tokenizer_spec import TokenizerSpec
from neurojax.tokenizer.write.gguf_terms import in_gguf_terms

_PREFIX = "tokenizer.ggml."
_NUMBERS = {"normal": 1, "unknown": 2, "control": 3, "user": 4, "unused": 5, "byte": 6}


def gguf_from_spec(spec: TokenizerSpec | None, vocab_size: int) -> dict[str, Any]:
  """Returns the plain Python values of a tokenizer by GGUF key.

  Args:
    spec: The tokenizer, or None for a model that is fed with ids.
    vocab_size: Rows of the embedding. Ids that the tokenizer does not have become unused tokens.
  Raises:
    ValueError: the tokenizer has more tokens than the embedding has rows, or a "bpe" no merges.
    NotImplementedError: GGUF has no key for something in the spec, so that reading would give another.
  """
  if spec is None:
    return {_PREFIX + "model": "no_vocab"}
  free = spec.kind == "json"
  spec = in_gguf_terms(spec)
  spec = padded(spec, vocab_size)
  keys: dict[str, Any] = {_PREFIX + "model": _model(spec)}
  if spec.pre is not None:
    keys[_PREFIX + "pre"] = spec.pre
  keys[_PREFIX + "tokens"] = list(spec.tokens)
  keys[_PREFIX + "token_type"] = [_NUMBERS[kind] for kind in spec.types]
  if spec.kind == "spm":
    keys[_PREFIX + "scores"] = [float(score) for score in spec.scores]
    keys[_PREFIX + "add_space_prefix"] = spec.add_space_prefix
  else:
    if not spec.merges:
      raise ValueError("a tokenizer without merges: GGUF has no empty lists: train a larger one")
    keys[_PREFIX + "merges"] = list(spec.merges)
  ids = {"bos": spec.bos_id, "eos": spec.eos_id, "unknown": spec.unknown_id}
  for name, value in ids.items():
    if value is not None:
      keys[f"{_PREFIX}{name}_token_id"] = value
  keys[_PREFIX + "add_bos_token"] = spec.add_bos
  keys[_PREFIX + "add_eos_token"] = spec.add_eos
  if spec.chat_template is not None:
    keys["tokenizer.chat_template"] = spec.chat_template
  # Most tokens that end a generation are known by their text; two more have keys.
  unnamed = sorted(spec.stop_ids - spec_from_gguf(keys).stop_ids)
  for name, value in zip(("eot", "eom"), unnamed, strict=False):
    keys[f"{_PREFIX}{name}_token_id"] = value
  again = spec_from_gguf(keys)
  if free and spec.stop_ids <= again.stop_ids:
    # GGUF's readers know more tokens that end a generation, by their text.
    spec = dataclasses.replace(spec, stop_ids=again.stop_ids, types=again.types)
  for field in dataclasses.fields(spec):
    mine, read = getattr(spec, field.name), getattr(again, field.name)
    if mine != read:
      raise NotImplementedError(
        f"the tokenizer's {field.name} = {str(mine)[:80]} has no place in GGUF, whose reader would"
        f" take it for {str(read)[:80]}"
      )
  return keys


def padded(spec: TokenizerSpec, vocab_size: int) -> TokenizerSpec:
  """Returns the tokenizer with an unused token for each further row of an embedding.

  Raises: ValueError: the tokenizer has more tokens than the embedding has rows.
  """
  more = vocab_size - len(spec.tokens)
  if more < 0:
    raise ValueError(
      f"the tokenizer has {len(spec.tokens)} tokens and the embedding {vocab_size} rows: this is"
      " not the tokenizer of this model"
    )
  return dataclasses.replace(
    spec,
    tokens=spec.tokens + tuple(f"[PAD{len(spec.tokens) + i}]" for i in range(more)),
    types=spec.types + ("unused",) * more,
    scores=spec.scores + (-1e9,) * (more if spec.kind == "spm" else 0),
  )


def _model(spec: TokenizerSpec) -> str:
  if spec.kind == "spm":
    return "llama"
  return "gemma4" if spec.pre == "gemma4" else "gpt2"
