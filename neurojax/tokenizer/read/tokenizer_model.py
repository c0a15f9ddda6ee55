"""Reads a tokenizer.model, the format of the library `sentencepiece`.

Source: `sentencepiece_model.proto` of https://github.com/google/sentencepiece.
"""

import base64
import dataclasses
from typing import Any

from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet
from sentencepiece import sentencepiece_model_pb2 as proto

from neurojax.tokenizer.tokenizer_spec import TokenizerSpec

PIECE_TYPES = {1: "normal", 2: "unknown", 3: "control", 4: "user", 5: "unused", 6: "byte"}
"""A piece's type in the file, and the type of the token."""

# Published files have 5 MB at most. The limits bound the memory that a hostile file can take.
_MAX_BYTES = 16 << 20
_MAX_PIECES = 1 << 20
# NFKC writes 33 bytes for U+FDFA, its longest. Without a limit one letter could become a megabyte.
_MAX_REPLACEMENT_BYTES = 64
_AGAIN = "this is no tokenizer.model, or a damaged one: get it again"


def spec_from_sentencepiece(data: bytes) -> TokenizerSpec:
  """Returns the tokenizer of a tokenizer.model, which adds BOS, as Llama's and Gemma's do.

  A BPE model that leaves the text as it is becomes "spm", which GGUF can hold. Any other model
  (unigram, a normaliser such as NFKC, white space removed) becomes "sentencepiece", which the library
  encodes.

  Raises:
    ValueError: the file is damaged, or no such file.
    NotImplementedError: the model spells spaces behind words, makes text many times as long, or changes
      text when it decodes.
  """
  model = parse_model(data)
  if model.trainer_spec.treat_whitespace_as_suffix:
    raise NotImplementedError(
      "tokenizer.model with treat_whitespace_as_suffix is not read: convert it to a tokenizer.json"
    )
  if model.denormalizer_spec.precompiled_charsmap:
    raise NotImplementedError(
      "tokenizer.model with a map of characters for decoding is not read: convert it to a tokenizer.json"
    )
  rules = model.normalizer_spec
  longest = _longest_replacement(rules.precompiled_charsmap)
  if longest > _MAX_REPLACEMENT_BYTES:
    raise NotImplementedError(
      f"tokenizer.model with a map of characters that writes {longest} bytes for one: no more than"
      f" {_MAX_REPLACEMENT_BYTES} are allowed"
    )
  plain = (
    model.trainer_spec.model_type == proto.TrainerSpec.BPE
    and rules.escape_whitespaces
    and not rules.precompiled_charsmap
    and not rules.remove_extra_whitespaces
  )
  tokens = tuple(piece.piece for piece in model.pieces)
  types = tuple(PIECE_TYPES[piece.type] for piece in model.pieces)
  bos_id, eos_id = (
    i if 0 <= i < len(tokens) else None
    for i in (model.trainer_spec.bos_id, model.trainer_spec.eos_id)
  )
  return TokenizerSpec(
    kind="spm" if plain else "sentencepiece",
    tokens=tokens,
    types=types,
    scores=tuple(piece.score for piece in model.pieces) if plain else (),
    bos_id=bos_id,
    eos_id=eos_id,
    unknown_id=types.index("unknown") if "unknown" in types else None,
    stop_ids=frozenset() if eos_id is None else frozenset({eos_id}),
    add_bos=bos_id is not None,
    add_space_prefix=rules.add_dummy_prefix or (not plain and rules.remove_extra_whitespaces),
    source=None if plain else base64.b64encode(data).decode(),
  )


def parse_model(data: bytes) -> Any:
  """Parses a tokenizer.model into the library's `ModelProto`.

  Raises: ValueError: the file is damaged or too large, a piece is no UTF-8, has a score that is no
    number, or comes twice.
  """
  if len(data) > _MAX_BYTES:
    raise ValueError(
      f"tokenizer.model has {len(data)} bytes: no tokenizer has more than {_MAX_BYTES}; {_AGAIN}"
    )
  try:
    model = proto.ModelProto.FromString(data)
  except DecodeError as error:
    raise ValueError(f"tokenizer.model does not parse ({error}); {_AGAIN}") from error
  if not model.pieces:
    raise ValueError(f"tokenizer.model without a piece: {_AGAIN}")
  if len(model.pieces) > _MAX_PIECES:
    raise ValueError(
      f"tokenizer.model has {len(model.pieces)} pieces: no tokenizer has more than {_MAX_PIECES};"
      f" {_AGAIN}"
    )
  seen = set()
  for i, piece in enumerate(model.pieces):
    # Protobuf gives bytes for what is no UTF-8.
    if not isinstance(piece.piece, str):
      raise ValueError(f"tokenizer.model: piece {i} is no UTF-8; {_AGAIN}")
    if piece.piece in seen:
      raise ValueError(f"tokenizer.model holds the piece {piece.piece!r:.80} twice; {_AGAIN}")
    if piece.score != piece.score:
      raise ValueError(f"tokenizer.model: the score of piece {i} is no number; {_AGAIN}")
    if _has_unknown(piece, proto.ModelProto.SentencePiece.TYPE_FIELD_NUMBER):
      raise ValueError(f"tokenizer.model: piece {i} has an unknown type; {_AGAIN}")
    seen.add(piece.piece)
  if _has_unknown(model.trainer_spec, proto.TrainerSpec.MODEL_TYPE_FIELD_NUMBER):
    raise ValueError(f"tokenizer.model has an unknown type of model; {_AGAIN}")
  return model


def _longest_replacement(charsmap: bytes) -> int:
  """Returns the bytes of the longest text that a normaliser's map of characters puts for another.

  Source: sentencepiece's `normalizer.cc`: the size of a trie, the trie, texts that end in NUL.
  """
  trie_bytes = int.from_bytes(charsmap[:4], "little")
  return max(map(len, charsmap[4 + trie_bytes :].split(b"\0")))


def _has_unknown(message: Message, number: int) -> bool:
  """Tells whether a field has a value that its enum lacks: protobuf would give the default."""
  return any(field.field_number == number for field in UnknownFieldSet(message))


def model_of_spec(spec: TokenizerSpec) -> Any:
  """Returns the library's `ModelProto` of a spec of kind "sentencepiece".

  Raises: ValueError: its source is no such file, or has other tokens than the spec.
  """
  try:
    data = base64.b64decode(spec.source or "", validate=True)
  except ValueError as error:
    raise ValueError(f"source holds no tokenizer.model in base64: {error}") from error
  model = parse_model(data)
  # An embedding may have more rows than the model has pieces.
  pieces = [(piece.piece, PIECE_TYPES[piece.type]) for piece in model.pieces]
  named = list(zip(spec.tokens, spec.types, strict=True))
  if named[: len(pieces)] != pieces or {kind for _, kind in named[len(pieces) :]} - {"unused"}:
    raise ValueError("source holds a tokenizer.model with other tokens than the vocabulary")
  return model


def with_tokens(spec: TokenizerSpec) -> TokenizerSpec:
  """Returns a spec of kind "sentencepiece" whose source has the tokens and types of the spec.

  The library then knows tokens that stand beside a tokenizer.model, and never spells a control token.
  """
  model = proto.ModelProto.FromString(base64.b64decode(spec.source or ""))
  numbers = {kind: number for number, kind in PIECE_TYPES.items()}
  for i, (token, kind) in enumerate(zip(spec.tokens, spec.types, strict=True)):
    piece = model.pieces[i] if i < len(model.pieces) else model.pieces.add()
    piece.piece, piece.type = token, numbers[kind]
  data = model.SerializeToString(deterministic=True)
  parse_model(data)
  return dataclasses.replace(spec, source=base64.b64encode(data).decode())
