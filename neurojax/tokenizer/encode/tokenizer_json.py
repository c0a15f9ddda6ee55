"""Encodes the kind "json" by the library `tokenizers`, without special tokens from free text.

The ids are the library's own. Decoding is done here, piece by piece, so that it can stream. It equals
the library's on every text that is valid UTF-8.
"""

import json
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import tokenizers

from neurojax.tokenizer.byte_alphabet import BYTE_TOKEN, SPACE, byte_alphabet
from neurojax.tokenizer.encode.long_text import parts_at_spaces
from neurojax.tokenizer.encode.words import WordEncoder
from neurojax.tokenizer.pretokenizers import PRE_TOKENIZERS
from neurojax.tokenizer.read.json_rules import pre_name
from neurojax.tokenizer.read.tokenizer_json import load, read_table

# Shorter texts are not worth a second set of rules.
_LONG = 1 << 16


class JsonEncoder:
  """Turns text into ids by a tokenizer.json; safe to share among threads.

  Args:
    source: The text of the tokenizer.json.
    control: The ids of the special tokens by their spelling.
  Raises: ValueError: as `load`.
  """

  def __init__(self, source: str, control: Mapping[str, int]):
    self._source = source
    self._control = control
    self._fast = load(source)
    self._plain: tokenizers.Tokenizer | None = None
    self._words: WordEncoder | Literal[False] | None = None
    # No text contains this token by chance or guess.
    self._start = f"<{secrets.token_hex(24)}>"
    table = read_table(source)
    self._parts = _splitter(table, control)
    self._others = frozenset(a["content"] for a in table.get("added_tokens") or ()) - control.keys()
    self._cuts_at_spaces = _cuts_at_spaces(table)

  def encode(self, text: str, *, parse_special: bool) -> list[int]:
    """Returns the library's ids; without `parse_special` no special token is recognised."""
    spelled = _spells(text, self._control)
    fast = self._without_control() if spelled and not parse_special else self._fast
    if len(text) > _LONG and not spelled and not _spells(text, self._others):
      if self._cuts_at_spaces:
        return _run(fast, parts_at_spaces(text))
      if (words := self._by_words()) is not None:
        return words.encode(text)
    return _run(fast, [text])

  def encode_guarded(self, text: str, guard: str) -> list[int]:
    """Recognises special tokens that have no guard inside, and removes the guards."""
    if guard not in text:
      return self.encode(text, parse_special=True)
    plain = self._without_control()
    ids: list[int] = []
    first = True
    for part in self._parts(text):
      if isinstance(part, int):
        ids.append(part)
      elif rest := part.replace(guard, ""):
        # Some rules differ at the start of a text, where this part is not.
        ids += _run(plain, [rest]) if first else _run(plain, [self._start + rest])[1:]
      first = False
    return ids

  def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
    """Encodes each text without special tokens, on all cores."""
    if any(_spells(text, self._control) for text in texts):
      return [self.encode(text, parse_special=False) for text in texts]
    return [each.ids for each in self._fast.encode_batch_fast(texts, add_special_tokens=False)]

  def _by_words(self) -> WordEncoder | None:
    if self._words is None:
      try:
        self._words = WordEncoder(self._source)
      except (NotImplementedError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        self._words = False
    return self._words or None

  def _without_control(self) -> tokenizers.Tokenizer:
    """Returns the same rules on a vocabulary that no text can spell a special token of."""
    if self._plain is None:
      table = json.loads(self._source)
      _rename(table, {token: f"<{i}{self._start}" for i, token in enumerate(self._control)})
      plain = load(json.dumps(table))
      plain.add_special_tokens([tokenizers.AddedToken(self._start, normalized=False)])
      self._plain = plain
    return self._plain


def encode_parts(fast: tokenizers.Tokenizer, parts: list[str]) -> list[int]:
  """Encodes the parts of one text; several parts use all cores."""
  encoded = fast.encode_batch_fast(parts, add_special_tokens=False)
  return encoded[0].ids if len(encoded) == 1 else [i for each in encoded for i in each.ids]


def _spells(text: str, tokens: Collection[str]) -> bool:
  # Most special tokens begin with the same few characters.
  starts = {start for start in {token[:2] for token in tokens} if start in text}
  return any(token in text for token in tokens if token[:2] in starts)


def _cuts_at_spaces(table: Mapping[str, Any]) -> bool:
  """Tells whether the rules are known to begin a piece at each space between two letters."""
  if table.get("normalizer") not in (
    None,
    {"type": "NFC"},
    {"type": "Sequence", "normalizers": []},
  ):
    return False
  model, pre = table["model"], table.get("pre_tokenizer")
  if model.get("type", "BPE") != "BPE" or model.get("dropout"):
    return False
  try:
    name = pre_name(pre, whole_words=bool(model.get("ignore_merges")))
  except (NotImplementedError, KeyError, TypeError):
    return False
  return PRE_TOKENIZERS[name].cuts_at_spaces


def _run(fast: tokenizers.Tokenizer, parts: list[str]) -> list[int]:
  try:
    return encode_parts(fast, parts)
  except Exception as error:
    raise ValueError(f"the tokenizer cannot encode this text: {error}") from error
  except BaseException as error:
    if isinstance(error, KeyboardInterrupt | SystemExit):
      raise
    raise ValueError(f"the tokenizer breaks on this text: {error}") from error


def _rename(table: dict[str, Any], names: Mapping[str, str]) -> None:
  """Gives tokens of a tokenizer.json other spellings, and drops the merges that make them."""
  model = table["model"]
  for added in table.get("added_tokens") or ():
    added["content"] = names.get(added["content"], added["content"])
  vocab = model["vocab"]
  if isinstance(vocab, dict):
    model["vocab"] = {names.get(token, token): i for token, i in vocab.items()}
    merges = [m.split(" ", 1) if isinstance(m, str) else m for m in model.get("merges") or ()]
    kept = [[a, b] for a, b in merges if not {a, b, a + b} & names.keys()]
    model["merges"] = kept
    if model.get("unk_token") is not None:
      model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
  else:
    model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
  # The post-processor names tokens by their spelling, and is not used here.
  table["post_processor"] = None


def _splitter(
  table: Mapping[str, Any], control: Mapping[str, int]
) -> Callable[[str], Iterator[str | int]]:
  """Returns a function that cuts a text at special tokens as the library does.

  The leftmost token is cut out first, and the longest of those that begin there.
  """
  flags = {added["content"]: added for added in table.get("added_tokens") or ()}
  patterns = []
  for token in sorted(control, key=len, reverse=True):
    rule = flags.get(token, {})
    pattern = re.escape(token)
    if rule.get("single_word"):
      pattern = rf"(?<!\w){pattern}(?!\w)"
    before = r"\s*" if rule.get("lstrip") else ""
    after = r"\s*" if rule.get("rstrip") else ""
    patterns.append(f"{before}({pattern}){after}")
  every = re.compile("|".join(patterns) or "(?!)")

  def split(text: str) -> Iterator[str | int]:
    start = 0
    for match in every.finditer(text):
      if match.start() > start:
        yield text[start : match.start()]
      yield control[match[match.lastindex]]
      start = match.end()
    if start < len(text):
      yield text[start:]

  return split


def piece_bytes(token: str, *, byte_level: bool, byte_fallback: bool) -> bytes:
  """Returns the bytes that a token adds to the text."""
  if byte_level:
    alphabet = byte_alphabet()
    if all(char in alphabet for char in token):
      return bytes(map(alphabet.__getitem__, token))
    return token.encode("utf-8", "replace")
  if byte_fallback and (match := BYTE_TOKEN.fullmatch(token)):
    return bytes([int(match[1], 16)])
  return token.replace(SPACE, " ").encode("utf-8", "replace")
