"""Turns text into token ids and back."""

import codecs
import functools
import json
import operator
from collections.abc import Iterable, Sequence

import tokenizers

from neurojax.tokenizer.byte_alphabet import BYTE_TOKEN, SPACE, byte_alphabet
from neurojax.tokenizer.encode.bpe import (
  byte_level_bpe,
  scored_bpe_encoder,
  spelled_ids,
  text_bpe_encoder,
)
from neurojax.tokenizer.encode.long_text import parts_at_spaces
from neurojax.tokenizer.encode.sentencepiece import SentencePieceEncoder
from neurojax.tokenizer.encode.tokenizer_json import JsonEncoder, encode_parts, piece_bytes
from neurojax.tokenizer.pretokenizers import pre_tokenizer
from neurojax.tokenizer.read.json_rules import decoding
from neurojax.tokenizer.tokenizer_spec import TokenizerSpec

# A noncharacter, which no text carries: it keeps apart what must not become a special token.
_GUARD = "\ufdd0"
_ASCII_SPACE = " \t\n\v\f\r"


class Tokenizer:
  """Encodes and decodes by a vocabulary; safe to share among threads.

  Ids are those of llama.cpp ("bpe" and "spm"), of the library `tokenizers` ("json") and of the library
  `sentencepiece` ("sentencepiece"). It differs from llama.cpp on purpose: no merge ever spells a
  control, unknown or byte token, so that plain text never injects one; unused tokens are rendered as
  their text; decoding keeps every space of "bpe" text.

  Raises: ValueError: the spec contradicts itself. NotImplementedError: unknown pre-tokenizer.

  Example:
    >>> import neurojax as nj
    >>> from neurojax.files.find import model_path
    >>> from neurojax.files.open import open_model
    >>> with open_model(model_path("neurollm")) as file:
    ...   tokenizer = nj.Tokenizer(file.tokenizer)
    >>> tokenizer.decode(tokenizer.encode("The sea"))
    'The sea'
  """

  def __init__(self, spec: TokenizerSpec):
    self.spec = spec
    self._fast: tokenizers.Tokenizer | None = None
    self._json: JsonEncoder | None = None
    self._sentencepiece: SentencePieceEncoder | None = None
    if spec.kind == "json":
      control = {t: i for i, t in enumerate(spec.tokens) if spec.types[i] in ("control", "unknown")}
      self._json = json_encoder = JsonEncoder(spec.source, control)
      self._encode_text = functools.partial(json_encoder.encode, parse_special=False)
    elif spec.kind == "sentencepiece":
      self._sentencepiece = SentencePieceEncoder(spec)
      self._encode_text = self._sentencepiece.encode
    elif spec.kind == "spm":
      self._encode_text = scored_bpe_encoder(spec)
    elif (rules := pre_tokenizer(spec.pre)).byte_level:
      self._fast = fast = byte_level_bpe(spec, rules)
      split = parts_at_spaces if rules.cuts_at_spaces else lambda text: [text]
      self._encode_text = lambda text: self._known(encode_parts(fast, split(text)))
      # Few vocabularies lack one.
      self._lacks_bytes = not byte_alphabet().keys() <= spelled_ids(spec).keys()
    else:
      self._encode_text = text_bpe_encoder(spec, rules)
    self._pieces = tuple(_pieces(spec))
    self._hidden = tuple(kind in ("control", "unknown") for kind in spec.types)
    strips = spec.strip_after_ids | spec.strip_before_ids
    specials = [
      (len(token.encode("utf-8", "surrogatepass")), token, i, spec.types[i] == "user")
      for i, token in enumerate(spec.tokens)
      if token
      and spec.types[i] in ("control", "unknown", "user")
      # The library cuts out its own user-defined pieces, without a space in front of what follows.
      and not (self._sentencepiece and spec.types[i] == "user" and i not in strips)
    ]
    specials.sort(key=lambda special: (-special[0], special[2]))
    self._specials = [(token, i, user) for _, token, i, user in specials]

  @property
  def vocab_size(self) -> int:
    return len(self.spec.tokens)

  @property
  def bos_id(self) -> int | None:
    return self.spec.bos_id

  @property
  def eos_id(self) -> int | None:
    return self.spec.eos_id

  @property
  def stop_ids(self) -> frozenset[int]:
    return self.spec.stop_ids

  def encode(
    self,
    text: str,
    *,
    parse_special: bool = False,
    add_special: bool = False,
    guarded: bool = False,
  ) -> list[int]:
    """Returns the ids of a text.

    A byte-level vocabulary that lacks a byte (StarCoder's lack those of far planes) leaves it out, as
    llama.cpp and the library do.

    Args:
      parse_special: Whether control tokens spelled in the text are recognised; leave it off for
        text that a user wrote. User-defined tokens are always recognised.
      add_special: Whether BOS and EOS are added where the vocabulary says so, even if the text
        already spells them.
      guarded: Whether parts of the text went through `guard`, whose marks are then removed.
    Raises: ValueError: text is not a string, holds a lone surrogate, or has a character that the
      vocabulary cannot spell.
    """
    _check_text(text)
    ids: list[int] = []
    if add_special and self.spec.add_bos:
      ids.append(self.spec.bos_id)
    if self._json is None:
      self._extend(ids, text, parse_special, guarded)
    elif guarded and parse_special:
      ids += self._json.encode_guarded(text, _GUARD)
    else:
      text = text.replace(_GUARD, "") if guarded else text
      ids += self._json.encode(text, parse_special=parse_special)
    if add_special and self.spec.add_eos:
      ids.append(self.spec.eos_id)
    return ids

  @property
  def cuts_at_spaces(self) -> bool:
    """Tells whether a text may be cut in front of a space between two letters, its parts encoded alone.

    Nearly all byte-level vocabularies start a piece there. Tokens that are recognised anywhere in a
    text forbid it.
    """
    if self._fast is None or not pre_tokenizer(self.spec.pre).cuts_at_spaces:
      return False
    return not any(user for _, _, user in self._specials)

  def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
    """Encodes each text, with most vocabularies on all cores. Raises as `encode` does."""
    if self._json is not None:
      for text in texts:
        _check_text(text)
      return self._json.encode_many(texts)
    if self._sentencepiece is not None and not any(user for _, _, user in self._specials):
      for text in texts:
        _check_text(text)
      return self._sentencepiece.encode_many(texts)
    if self._fast is None or not self.cuts_at_spaces:
      return [self.encode(text) for text in texts]
    for text in texts:
      _check_text(text)
    encoded = self._fast.encode_batch_fast(texts, add_special_tokens=False)
    return [self._known(each.ids) for each in encoded]

  def _known(self, ids: list[int]) -> list[int]:
    """Drops the ids that stand for a byte without a token."""
    if not self._lacks_bytes:
      return ids
    size = len(self.spec.tokens)
    return [i for i in ids if i < size]

  def guard(self, text: str) -> str:
    """Marks a user's text for a chat template, so that control tokens that it spells stay text.

    `encode(rendered, parse_special=True, guarded=True)` then recognises only the template's control
    tokens. The marks sit inside the spelled tokens; other text comes back as it was.
    """
    _check_text(text)
    text = text.replace(_GUARD, "")
    for token, _, user in self._specials:
      if not user and len(token) > 1 and token in text:
        text = text.replace(token, token[0] + _GUARD + token[1:])
    return text

  def decode(self, ids: Iterable[int], *, special: bool = False, continues: bool = False) -> str:
    """Returns the text of ids; bytes that are not UTF-8 become U+FFFD.

    Args:
      special: Whether control and unknown tokens are rendered as their text, or left out.
      continues: Whether other text comes before these ids. If not, the space that encoding puts in
        front of the first text token is taken away (with `add_space_prefix`).
    Raises: ValueError: an id is outside the vocabulary.
    """
    stream = self.stream(special=special, continues=continues)
    parts = [stream.push(token_id) for token_id in ids]
    parts.append(stream.finish())
    return "".join(parts)

  def piece(self, token_id: int) -> bytes:
    """Returns the bytes of one token, possibly part of a character. Control tokens give their text.

    Raises: ValueError: the id is outside the vocabulary.
    """
    return self._pieces[self._checked(token_id)]

  def stream(self, *, special: bool = False, continues: bool = False) -> "Detokenizer":
    """Returns a decoder that takes one id at a time; arguments as in `decode`."""
    return Detokenizer(self, special=special, continues=continues)

  def _checked(self, token_id: int) -> int:
    try:
      index = operator.index(token_id)
    except TypeError:
      raise ValueError(f"token id {token_id!r} is not an integer") from None
    if not 0 <= index < len(self._pieces):
      raise ValueError(f"token id {index} is outside the vocabulary of {len(self._pieces)}")
    return index

  def _extend(self, ids: list[int], text: str, parse_special: bool, guarded: bool):
    """Adds the ids of a text, special tokens and what lies between them."""
    prefix = self.spec.kind == "spm" and self.spec.add_space_prefix
    after_special = True
    for part in self._partition(text, parse_special):
      if isinstance(part, int):
        ids.append(part)
        after_special = True
        continue
      if guarded:
        part = part.replace(_GUARD, "")
      if part:
        ids.extend(self._encode_text(" " + part if prefix and after_special else part))
        after_special = False

  def _partition(self, text: str, parse_special: bool) -> list[str | int]:
    """Cuts out the special tokens, the longest first wherever it occurs."""
    parts: list[str | int] = [text]
    present: dict[str, bool] = {}
    for token, token_id, user in self._specials:
      if not user and not parse_special:
        continue
      # Asking for the first two characters first keeps thousands of tokens cheap.
      if (start := token[:2]) not in present:
        present[start] = start in text
      if not present[start] or token not in text:
        continue
      swallows_after = token_id in self.spec.strip_after_ids
      swallows_before = token_id in self.spec.strip_before_ids
      cut: list[str | int] = []
      for part in parts:
        if isinstance(part, int):
          cut.append(part)
          continue
        for i, rest in enumerate(pieces := part.split(token)):
          if i:
            cut.append(token_id)
            rest = rest.lstrip(_ASCII_SPACE) if swallows_after else rest
          if swallows_before and i < len(pieces) - 1:
            rest = rest.rstrip(_ASCII_SPACE)
          if rest:
            cut.append(rest)
      parts = cut
    return [part for part in parts if part != ""]


class Detokenizer:
  """Turns ids into text one at a time; the strings together are what `Tokenizer.decode` gives.

  A character is returned whole, once its last byte is known.
  """

  def __init__(self, tokenizer: Tokenizer, *, special: bool = False, continues: bool = False):
    self._tokenizer = tokenizer
    self._special = special
    spec = tokenizer.spec
    self._strip = spec.kind != "bpe" and spec.add_space_prefix and not continues
    self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

  def push(self, token_id: int) -> str:
    """Returns the text that this id completes, often "". Raises ValueError: no id of the vocabulary."""
    token_id = self._tokenizer._checked(token_id)
    piece = self._tokenizer._pieces[token_id]
    if self._tokenizer._hidden[token_id]:
      if not self._special:
        return ""
      self._strip = self._strip and self._tokenizer.spec.kind != "json"
      return self._utf8.decode(piece)
    if self._strip:
      spec = self._tokenizer.spec
      if spec.kind == "spm":
        # llama.cpp takes it off a first word, the libraries off whatever comes first.
        self._strip = False
        piece = piece if spec.types[token_id] == "user" else piece.removeprefix(b" ")
      elif spec.kind == "json":
        self._strip = not piece
        piece = piece.removeprefix(b" ")
      else:
        is_byte, given = spec.types[token_id] == "byte", piece
        piece = piece if is_byte else piece.removeprefix(b" ")
        # A model that removes white space takes away all of it at the start of a text.
        all_of_it = self._tokenizer._sentencepiece.removes_spaces
        self._strip = not is_byte and not (piece if all_of_it else given)
    return self._utf8.decode(piece)

  def finish(self) -> str:
    """Returns U+FFFD if the last character was never completed, else ""."""
    return self._utf8.decode(b"", final=True)


def _check_text(text: str):
  if not isinstance(text, str):
    raise ValueError(f"text is {type(text).__name__}; decode it to str first")
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise ValueError(
      f"text holds a lone surrogate {text[error.start]!r} at {error.start}; it is not Unicode text"
    ) from None


def _pieces(spec: TokenizerSpec) -> Iterable[bytes]:
  if spec.kind == "json":
    table = json.loads(spec.source)
    byte_level, _ = decoding(table.get("decoder"))
    fallback = bool(table["model"].get("byte_fallback"))
    for token in spec.tokens:
      yield piece_bytes(token, byte_level=byte_level, byte_fallback=fallback)
    return
  byte_level = spec.kind == "bpe" and pre_tokenizer(spec.pre).byte_level
  alphabet = byte_alphabet()
  for token, kind in zip(spec.tokens, spec.types, strict=True):
    if kind == "byte" and (match := BYTE_TOKEN.fullmatch(token)):
      yield bytes([int(match[1], 16)])
    elif kind in ("normal", "unused", "byte") or (kind == "user" and spec.kind == "sentencepiece"):
      if not byte_level:
        yield token.replace(SPACE, " ").encode("utf-8", "replace")
      elif all(char in alphabet for char in token):
        yield bytes(map(alphabet.__getitem__, token))
      else:
        yield token.encode("utf-8", "replace")
    else:
      yield token.encode("utf-8", "replace")
