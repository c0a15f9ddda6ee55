"""The vocabulary and the rules of a tokenizer, as a model file states them."""

import dataclasses
import math
from typing import Literal

KINDS = ("bpe", "spm", "json", "sentencepiece")
TOKEN_TYPES = ("normal", "unknown", "control", "user", "unused", "byte")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerSpec:
  """A vocabulary and its rules, free of any file format.

  Attributes:
    kind: "bpe" is BPE with merges, "spm" SentencePiece's BPE with scores. "json" is any
      tokenizer.json, "sentencepiece" any tokenizer.model; their `source` holds the file.
    tokens: The piece of each id, in the spelling of the kind (byte-level alphabet for "bpe",
      U+2581 for a space in "spm"; a vocabulary without any U+2581 may use plain spaces). Byte
      tokens are spelled `<0xNN>`. Pieces are unique, but for empty ones, which no text produces.
    types: The type of each id: "normal", "unknown", "control", "user", "unused" or "byte".
    merges: Pairs "left right", best first ("bpe" only).
    scores: The score of each id; the higher merges first ("spm" only).
    pre: The name of the pre-tokenizer (GGUF's `tokenizer.ggml.pre`), "bpe" only.
    bos_id, eos_id, unknown_id: Ids, or None where the vocabulary has none.
    stop_ids: The ids that end a generation (eos, end of turn, ...).
    add_bos, add_eos: Whether `encode(..., add_special=True)` adds BOS and EOS.
    add_space_prefix: Whether encoding puts a space in front of text at the start and after a special
      token ("spm" only), and decoding takes the first one away (all but "bpe").
    strip_after_ids: Special tokens that swallow the white space after them in parsed text.
    strip_before_ids: Special tokens that swallow the white space before them.
    chat_template: Jinja source, or None.
    source: The text of a tokenizer.json ("json"), or a tokenizer.model in base64 ("sentencepiece").
      It alone says how these kinds encode.

  Raises: ValueError: lengths differ, an id is out of range, or a value is not one of the above.
  """

  kind: Literal["bpe", "spm", "json", "sentencepiece"]
  tokens: tuple[str, ...]
  types: tuple[str, ...]
  merges: tuple[str, ...] = ()
  scores: tuple[float, ...] = ()
  pre: str | None = None
  bos_id: int | None = None
  eos_id: int | None = None
  unknown_id: int | None = None
  stop_ids: frozenset[int] = frozenset()
  add_bos: bool = False
  add_eos: bool = False
  add_space_prefix: bool = False
  strip_after_ids: frozenset[int] = frozenset()
  strip_before_ids: frozenset[int] = frozenset()
  chat_template: str | None = None
  source: str | None = None

  def __post_init__(self):
    size = len(self.tokens)
    if self.kind not in KINDS:
      raise ValueError(f"kind is {self.kind!r}; it must be one of {', '.join(KINDS)}")
    if not size:
      raise ValueError("tokens is empty; a vocabulary needs at least one token")
    if len(self.types) != size:
      raise ValueError(f"types has {len(self.types)} entries for {size} tokens; give one for each")
    if unknown := set(self.types) - set(TOKEN_TYPES):
      raise ValueError(f"types holds {sorted(map(str, unknown))}; use only {TOKEN_TYPES}")
    if self.kind == "spm":
      if len(self.scores) != size:
        raise ValueError(
          f"scores has {len(self.scores)} entries for {size} tokens; 'spm' needs one for each"
        )
      if any(math.isnan(score) for score in self.scores):
        raise ValueError("scores holds NaN, which has no order; the file is damaged")
    elif self.kind in ("json", "sentencepiece"):
      if not isinstance(self.source, str):
        raise ValueError(f"source is no text; {self.kind!r} needs the tokenizer that it stands for")
    elif self.pre is None:
      raise ValueError("pre is None; 'bpe' needs the name of its pre-tokenizer")
    ids = [("bos_id", self.bos_id), ("eos_id", self.eos_id), ("unknown_id", self.unknown_id)]
    ids += [("stop_ids", i) for i in self.stop_ids]
    ids += [("strip_after_ids", i) for i in self.strip_after_ids]
    ids += [("strip_before_ids", i) for i in self.strip_before_ids]
    for name, value in ids:
      if value is not None and not 0 <= value < size:
        raise ValueError(f"{name} is {value}, outside the vocabulary of {size}; correct or omit it")
    if self.add_bos and self.bos_id is None:
      raise ValueError("add_bos is set but bos_id is None; name the token or clear add_bos")
    if self.add_eos and self.eos_id is None:
      raise ValueError("add_eos is set but eos_id is None; name the token or clear add_eos")
