"""SentencePiece's tokenizer.model, read without its library.

Source: `sentencepiece_model.proto` of https://github.com/google/sentencepiece; the protocol buffers
wire format. What a BPE model of a language model needs is read; the rest is refused by name.
"""

import dataclasses
import struct
from collections.abc import Iterator

from neurojax.tokenizer.tokenizer_spec import TokenizerSpec

_KINDS = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}
_TYPES = {1: "normal", 2: "unknown", 3: "control", 4: "user", 5: "unused", 6: "byte"}
_AGAIN = "this is no tokenizer.model, or a damaged one: get it again"


@dataclasses.dataclass
class _Model:
  """The fields that matter, with the format's defaults."""

  pieces: list[tuple[str, float, str]]
  kind: int = 1
  bos_id: int = 1
  eos_id: int = 2
  suffix_spaces: bool = False
  charsmap_bytes: int = 0
  add_dummy_prefix: bool = True
  remove_extra_whitespaces: bool = True
  escape_whitespaces: bool = True


def spec_from_sentencepiece(data: bytes) -> TokenizerSpec:
  """The tokenizer of a tokenizer.model, which adds BOS, as Llama's and Gemma's do.

  Raises:
    ValueError: damaged, or no such file.
    NotImplementedError: a model other than BPE, or one that changes the text before it cuts it.
  """
  model = _read(data)
  if model.kind != 2:
    raise NotImplementedError(
      f"tokenizer.model of kind {_KINDS.get(model.kind, model.kind)}: only BPE is here"
    )
  changes = {
    "a map of characters (such as NFKC)": model.charsmap_bytes > 0,
    "remove_extra_whitespaces": model.remove_extra_whitespaces,
    "escape_whitespaces off": not model.escape_whitespaces,
    "treat_whitespace_as_suffix": model.suffix_spaces,
  }
  if asked := [name for name, on in changes.items() if on]:
    raise NotImplementedError(f"tokenizer.model with {', '.join(asked)}: not here")
  tokens = tuple(piece for piece, _, _ in model.pieces)
  types = tuple(kind for _, _, kind in model.pieces)
  if len(set(tokens)) != len(tokens):
    raise ValueError(f"tokenizer.model holds a piece twice; {_AGAIN}")
  bos_id = model.bos_id if 0 <= model.bos_id < len(tokens) else None
  eos_id = model.eos_id if 0 <= model.eos_id < len(tokens) else None
  return TokenizerSpec(
    kind="spm",
    tokens=tokens,
    types=types,
    scores=tuple(score for _, score, _ in model.pieces),
    bos_id=bos_id,
    eos_id=eos_id,
    unknown_id=types.index("unknown") if "unknown" in types else None,
    stop_ids=frozenset() if eos_id is None else frozenset({eos_id}),
    add_bos=bos_id is not None,
    add_space_prefix=model.add_dummy_prefix,
  )


def _read(data: bytes) -> _Model:
  model = _Model([])
  for field, value in _fields(data):
    if field == 1:
      model.pieces.append(_piece(_message(value)))
    elif field == 2:
      for inner, entry in _fields(_message(value)):
        if inner == 3:
          model.kind = _signed(entry)
        elif inner == 41:
          model.bos_id = _signed(entry)
        elif inner == 42:
          model.eos_id = _signed(entry)
        elif inner == 24:
          model.suffix_spaces = bool(_signed(entry))
    elif field == 3:
      for inner, entry in _fields(_message(value)):
        if inner == 2:
          model.charsmap_bytes = len(_message(entry))
        elif inner == 3:
          model.add_dummy_prefix = bool(_signed(entry))
        elif inner == 4:
          model.remove_extra_whitespaces = bool(_signed(entry))
        elif inner == 5:
          model.escape_whitespaces = bool(_signed(entry))
  if not model.pieces:
    raise ValueError(f"tokenizer.model without a piece: {_AGAIN}")
  return model


def _piece(data: bytes) -> tuple[str, float, str]:
  piece, score, kind = "", 0.0, 1
  for field, value in _fields(data):
    if field == 1:
      try:
        piece = _message(value).decode("utf-8")
      except UnicodeDecodeError as error:
        raise ValueError(f"tokenizer.model: a piece is no UTF-8 ({error}); {_AGAIN}") from error
    elif field == 2:
      if not isinstance(value, bytes) or len(value) != 4:
        raise ValueError(f"tokenizer.model: a score of the wrong type; {_AGAIN}")
      (score,) = struct.unpack("<f", value)
    elif field == 3:
      kind = _signed(value)
  if kind not in _TYPES:
    raise ValueError(f"tokenizer.model: a piece of type {kind}; {_AGAIN}")
  return piece, score, _TYPES[kind]


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
  """Numbers and values of a message: integers, or bytes of what has a length or a fixed width."""
  at = 0
  while at < len(data):
    key, at = _varint(data, at)
    field, wire = key >> 3, key & 7
    if wire == 0:
      value, at = _varint(data, at)
      yield field, value
      continue
    if wire == 2:
      size, at = _varint(data, at)
    elif wire in (1, 5):
      size = 8 if wire == 1 else 4
    else:
      raise ValueError(f"tokenizer.model: wire type {wire} at byte {at}; {_AGAIN}")
    if size > len(data) - at:
      raise ValueError(f"tokenizer.model ends within a field at byte {at}; {_AGAIN}")
    yield field, data[at : at + size]
    at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
  value = 0
  for shift in range(0, 70, 7):
    if at >= len(data):
      break
    byte = data[at]
    at += 1
    value |= (byte & 0x7F) << shift
    if byte < 0x80:
      return value, at
  raise ValueError(f"tokenizer.model: no number at byte {at}; {_AGAIN}")


def _message(value: int | bytes) -> bytes:
  if isinstance(value, int):
    raise ValueError(f"tokenizer.model: a number where a message belongs; {_AGAIN}")
  return value


def _signed(value: int | bytes) -> int:
  if isinstance(value, bytes):
    raise ValueError(f"tokenizer.model: a message where a number belongs; {_AGAIN}")
  return value - (1 << 64) if value >= 1 << 63 else value
