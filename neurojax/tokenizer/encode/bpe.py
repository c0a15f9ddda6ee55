"""Byte-pair encoding of the kinds "bpe" and "spm"."""

import itertools
import re
from collections.abc import Callable

import tokenizers
from tokenizers import models, pre_tokenizers

from neurojax.tokenizer.byte_alphabet import BYTE_TOKEN, SPACE, byte_alphabet
from neurojax.tokenizer.encode.merge import Merger
from neurojax.tokenizer.pretokenizers import PreTokenizer
from neurojax.tokenizer.tokenizer_spec import TokenizerSpec

# Types whose spelling in a text never becomes the token by merging.
_UNSPELLED = frozenset({"control", "unknown", "byte"})


def spelled_ids(spec: TokenizerSpec) -> dict[str, int]:
  """Returns the id of each piece that text may become. Raises: ValueError: two tokens are alike."""
  ids: dict[str, int] = {}
  for i, (token, kind) in enumerate(zip(spec.tokens, spec.types, strict=True)):
    if not token or kind in _UNSPELLED:
      continue
    if token in ids:
      raise ValueError(f"tokens {ids[token]} and {i} are both {token!r}; pieces must be unique")
    ids[token] = i
  return ids


def _merges(spec: TokenizerSpec, ids: dict[str, int]) -> dict[tuple[str, str], int]:
  """Returns the rank of each merge, without merges that would spell a control, unknown or byte token."""
  known = set(spec.tokens)
  ranks: dict[tuple[str, str], int] = {}
  for rank, line in enumerate(spec.merges):
    # A piece may itself begin with a space.
    cut = line.find(" ", 1)
    left, right = line[:cut], line[cut + 1 :]
    if cut < 0 or not right:
      raise ValueError(f"merge {rank} is {line!r}; it must be two pieces with a space between")
    for piece in (left, right, left + right):
      if piece not in known:
        raise ValueError(f"merge {rank} is {line!r}, but {piece!r} is not in the vocabulary")
    if left in ids and right in ids and left + right in ids:
      ranks.setdefault((left, right), rank)
  return ranks


def byte_level_bpe(spec: TokenizerSpec, rules: PreTokenizer) -> tokenizers.Tokenizer:
  ids = spelled_ids(spec)
  # A byte without a token keeps its neighbours apart, and is left out in the end.
  missing = {char: len(spec.tokens) + i for i, char in enumerate(set(byte_alphabet()) - ids.keys())}
  model = models.BPE(
    vocab=ids | missing, merges=list(_merges(spec, ids)), ignore_merges=rules.whole_words
  )
  fast = tokenizers.Tokenizer(model)
  fast.pre_tokenizer = byte_level_splitter(rules)
  return fast


def byte_level_splitter(rules: PreTokenizer) -> pre_tokenizers.PreTokenizer:
  """Returns byte-level rules as the library's pre-tokenizer."""
  return pre_tokenizers.Sequence(
    [
      *(pre_tokenizers.Split(tokenizers.Regex(p), behavior="isolated") for p in rules.patterns),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )


def _speller(spec: TokenizerSpec, ids: dict[str, int]) -> Callable[[list[str]], list[int]]:
  """Returns a function from pieces to ids.

  A piece without an id is spelled byte by byte. Where byte tokens are missing too, a run of such pieces
  is one unknown token, as in SentencePiece.
  """
  byte_ids = {
    int(match[1], 16): i
    for i, (token, kind) in enumerate(zip(spec.tokens, spec.types, strict=True))
    if kind == "byte" and (match := BYTE_TOKEN.fullmatch(token))
  }

  def missing(piece: str) -> list[int]:
    found = [byte_ids.get(byte) for byte in piece.encode("utf-8")]
    if None not in found:
      return found
    if spec.unknown_id is None:
      raise ValueError(
        f"the vocabulary cannot spell {piece!r}: it has neither byte tokens for it nor an unknown"
        " token; leave the character out"
      )
    return unknown

  unknown = [spec.unknown_id]

  def spell(pieces: list[str]) -> list[int]:
    out: list[int] = []
    for piece in pieces:
      token_id = ids.get(piece)
      if token_id is not None:
        out.append(token_id)
      elif (spelled := missing(piece)) != unknown or out[-1:] != unknown:
        out.extend(spelled)
    return out

  return spell


def text_bpe_encoder(spec: TokenizerSpec, rules: PreTokenizer) -> Callable[[str], list[int]]:
  """Returns the encoder of BPE on text itself (Gemma 4), which merges by rank, line by line."""
  ids = spelled_ids(spec)
  ranks = _merges(spec, ids)
  merger = Merger(lambda a, b: ranks.get((a, b)), {a[-1] + b[0] for a, b in ranks})
  spell = _speller(spec, ids)
  if rules.patterns != (r"[^\n]+|[\n]+",) or rules.whole_words:
    raise NotImplementedError(f"pre-tokenizer {spec.pre!r} has no implementation on raw text")
  lines = re.compile(rules.patterns[0])

  def encode(text: str) -> list[int]:
    out: list[int] = []
    for line in lines.findall(text.replace(" ", SPACE)):
      whole = rules.lines and line[0] == "\n" and line in ids
      out.extend(spell([line] if whole else merger.pieces(line)))
    return out

  return encode


def scored_bpe_encoder(spec: TokenizerSpec) -> Callable[[str], list[int]]:
  """Returns the encoder of SentencePiece's BPE: any two neighbours whose text is a piece join.

  The best score joins first.

  Source: Kudo and Richardson, arXiv:1808.06226; llama.cpp orders equal scores from the left.
  """
  ids = spelled_ids(spec)
  if not any(SPACE in token for token in ids):
    # llama2.c spells its pieces with plain spaces.
    ids = {token.replace(" ", SPACE): i for token, i in ids.items()}
  rank = {token: -spec.scores[i] for token, i in ids.items()}
  joints = {a + b for token in ids for a, b in itertools.pairwise(token)}
  merger = Merger(lambda a, b: rank.get(a + b), joints)
  spell = _speller(spec, ids)
  return lambda text: spell(merger.pieces(text.replace(" ", SPACE)))
