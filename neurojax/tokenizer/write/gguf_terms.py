"""Expresses any tokenizer in the kinds that GGUF holds, "bpe" and "spm"."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as proto

from neurojax.tokenizer.read.json_rules import (
  check_model,
  decoding,
  merge_line,
  pre_name,
  prefix_rule,
)
from neurojax.tokenizer.read.tokenizer_model import model_of_spec
from neurojax.tokenizer.tokenizer_spec import TokenizerSpec


def in_gguf_terms(spec: TokenizerSpec) -> TokenizerSpec:
  """Returns the same tokenizer as "bpe" or "spm"; a spec of these kinds comes back as it is.

  Some rules of a tokenizer.json are lost, as in llama.cpp's own converter: NFC, which puts letters and
  their marks together before cutting; the order in which two splits of one piece merge ("spm"); and
  that newer files put no space in front of a text that begins with one, or after a special token.

  Raises: NotImplementedError: GGUF has no place for a rule of the tokenizer.
  """
  if spec.kind == "sentencepiece":
    raise NotImplementedError(
      f"a SentencePiece {_model_name(spec)}: GGUF is written only for SentencePiece's BPE without"
      " changes of the text: write a folder, which holds this tokenizer, or learn a vocabulary with"
      " `neurojax data prepare --vocab spm`"
    )
  if spec.kind != "json":
    return spec
  table = json.loads(spec.source)
  model = table["model"]
  if model.get("type", "BPE") != "BPE":
    raise NotImplementedError(
      f"model {model['type']!r} of tokenizer.json: only BPE is written to GGUF"
    )
  byte_level, _ = decoding(table.get("decoder"))
  after, before = set(), set()
  ids = {token: i for i, token in enumerate(spec.tokens)}
  for added in table.get("added_tokens") or ():
    after |= {ids[added["content"]]} if added.get("rstrip") else set()
    before |= {ids[added["content"]]} if added.get("lstrip") else set()
    if added.get("single_word"):
      raise NotImplementedError(
        f"added token {added['content']!r} is a single word: no such in GGUF"
      )
  spec = dataclasses.replace(
    spec,
    # The library has no token for these ids either.
    tokens=tuple(token or f"[PAD{i}]" for i, token in enumerate(spec.tokens)),
    source=None,
    add_space_prefix=False,
    strip_after_ids=frozenset(after),
    strip_before_ids=frozenset(before),
    kind="bpe",
    pre="default",
    merges=tuple(merge_line(merge) for merge in model.get("merges") or ()),
  )
  if byte_level:
    check_model(model)
    if table.get("normalizer") not in (
      None,
      {"type": "NFC"},
      {"type": "Sequence", "normalizers": []},
    ):
      raise NotImplementedError(f"normalizer {table['normalizer']!r:.120}: GGUF has none")
    whole_words = bool(model.get("ignore_merges"))
    return dataclasses.replace(
      spec, pre=pre_name(table.get("pre_tokenizer"), whole_words=whole_words)
    )
  if not model.get("byte_fallback") or model.get("ignore_merges"):
    raise NotImplementedError("BPE on text without byte tokens: GGUF has no name for it")
  if prefix_rule(table) == "never":
    return dataclasses.replace(spec, pre="gemma4")
  return dataclasses.replace(
    spec, kind="spm", pre=None, merges=(), add_space_prefix=True, scores=_scores(spec, model)
  )


def _model_name(spec: TokenizerSpec) -> str:
  model = model_of_spec(spec)
  name = proto.TrainerSpec.ModelType.Name(model.trainer_spec.model_type).lower()
  rule = model.normalizer_spec.name
  return f"{name} model" + (
    f" with the normaliser {rule!r}" if rule not in ("", "identity") else ""
  )


def _scores(spec: TokenizerSpec, model: Mapping[str, Any]) -> tuple[float, ...]:
  """Returns scores that merge as the merges do.

  Raises: NotImplementedError: two pieces that make a third have no merge, or the merges that make one
    piece are not in a row.
  """
  rank: dict[str, int] = {}
  merges = set()
  last = None
  for line in spec.merges:
    cut = line.find(" ", 1)
    pair = line[:cut], line[cut + 1 :]
    piece = "".join(pair)
    if piece != last and piece in rank:
      raise NotImplementedError(
        f"the merges that make {piece!r} are not in a row: no score says so"
      )
    rank.setdefault(piece, len(rank))
    merges.add(pair)
    last = piece
  normal = {token for token, kind in zip(spec.tokens, spec.types, strict=True) if kind == "normal"}
  for token in normal:
    for cut in range(1, len(token)):
      pair = token[:cut], token[cut:]
      if pair not in merges and pair[0] in normal and pair[1] in normal:
        raise NotImplementedError(f"{pair[0]!r} and {pair[1]!r} have no merge: no score says so")
  return tuple(-float(rank.get(token, len(rank))) for token in spec.tokens)
