"""A TokenizerSpec to SentencePiece's tokenizer.model: the inverse of `sentencepiece`, or a refusal.

Source: `sentencepiece_model.proto` of https://github.com/google/sentencepiece; the protocol buffers
wire format.
"""

import struct

from neurojax.tokenizer.read.tokenizer_model import spec_from_sentencepiece
from neurojax.tokenizer.tokenizer_spec import TokenizerSpec

_TYPES = {"normal": 1, "unknown": 2, "control": 3, "user": 4, "unused": 5, "byte": 6}
_VARINT, _BYTES, _FIXED32 = 0, 2, 5


def sentencepiece_from_spec(spec: TokenizerSpec) -> bytes:
  """A BPE model without any normalisation. What it does not say (a chat template, whether bos and eos
  are added) is for tokenizer_config.json.

  Raises: NotImplementedError: a tokenizer of another kind, or one that reading would not give back.
  """
  if spec.kind != "spm":
    raise NotImplementedError(
      f"a tokenizer of kind {spec.kind!r} (pre {spec.pre!r}): tokenizer.model holds SentencePiece"
    )
  pieces = b"".join(
    _message(1, _message(1, token.encode()) + _float(2, score) + _number(3, _TYPES[kind]))
    for token, score, kind in zip(spec.tokens, spec.scores, spec.types, strict=True)
  )
  byte_fallback = "byte" in spec.types
  unknown = -1 if spec.unknown_id is None else spec.unknown_id
  trainer = (
    _number(3, 2)
    + _number(4, len(spec.tokens))
    + _number(35, int(byte_fallback))
    + _number(40, unknown)
    + _number(41, -1 if spec.bos_id is None else spec.bos_id)
    + _number(42, -1 if spec.eos_id is None else spec.eos_id)
    + _number(43, -1)
  )
  normalizer = (
    _message(1, b"identity")
    + _number(3, int(spec.add_space_prefix))
    + _number(4, 0)
    + _number(5, 1)
  )
  data = pieces + _message(2, trainer) + _message(3, normalizer)
  try:
    again = spec_from_sentencepiece(data)
  except ValueError as error:
    raise NotImplementedError(f"this tokenizer has no place in tokenizer.model: {error}") from error
  for field in ("tokens", "types", "scores", "bos_id", "eos_id", "unknown_id", "add_space_prefix"):
    mine, read = getattr(spec, field), getattr(again, field)
    if mine != read and field != "scores":
      raise NotImplementedError(
        f"the tokenizer's {field} = {str(mine)[:80]} would be read back as {str(read)[:80]}"
      )
  return data


def _varint(value: int) -> bytes:
  value &= 2**64 - 1
  out = bytearray()
  while value > 127:
    out.append(value & 127 | 128)
    value >>= 7
  return bytes([*out, value])


def _number(field: int, value: int) -> bytes:
  return _varint(field << 3 | _VARINT) + _varint(value)


def _float(field: int, value: float) -> bytes:
  return _varint(field << 3 | _FIXED32) + struct.pack("<f", value)


def _message(field: int, data: bytes) -> bytes:
  return _varint(field << 3 | _BYTES) + _varint(len(data)) + data
