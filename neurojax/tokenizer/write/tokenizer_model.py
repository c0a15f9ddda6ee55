"""Writes a TokenizerSpec as a tokenizer.model, the inverse of `read.tokenizer_model`."""

import base64

from sentencepiece import sentencepiece_model_pb2 as proto

from neurojax.tokenizer.read.tokenizer_model import PIECE_TYPES, spec_from_sentencepiece
from neurojax.tokenizer.tokenizer_spec import TokenizerSpec

_COMPARED = (
  "kind", "tokens", "types", "bos_id", "eos_id", "unknown_id", "add_space_prefix",
)  # fmt: skip


def sentencepiece_from_spec(spec: TokenizerSpec) -> bytes:
  """Returns a BPE model without any normalisation ("spm"), or the model of a "sentencepiece" spec.

  A tokenizer.model holds no chat template and does not say whether BOS and EOS are added: that is for
  tokenizer_config.json.

  Raises: NotImplementedError: a tokenizer of another kind, or one that reading would not give back.
  """
  if spec.kind == "sentencepiece":
    return base64.b64decode(spec.source or "")
  if spec.kind != "spm":
    raise NotImplementedError(
      f"a tokenizer of kind {spec.kind!r} (pre {spec.pre!r}): tokenizer.model holds SentencePiece"
    )
  numbers = {kind: number for number, kind in PIECE_TYPES.items()}
  model = proto.ModelProto()
  for token, score, kind in zip(spec.tokens, spec.scores, spec.types, strict=True):
    model.pieces.add(piece=token, score=score, type=numbers[kind])
  trainer, normalizer = model.trainer_spec, model.normalizer_spec
  trainer.model_type = proto.TrainerSpec.BPE
  trainer.vocab_size = len(spec.tokens)
  trainer.byte_fallback = "byte" in spec.types
  for name, value in (("unk", spec.unknown_id), ("bos", spec.bos_id), ("eos", spec.eos_id)):
    setattr(trainer, f"{name}_id", -1 if value is None else value)
    # The library finds these tokens by their spelling, not by their id.
    if value is not None:
      setattr(trainer, f"{name}_piece", spec.tokens[value])
  trainer.pad_id = -1
  normalizer.name = "identity"
  normalizer.add_dummy_prefix = spec.add_space_prefix
  normalizer.remove_extra_whitespaces = False
  normalizer.escape_whitespaces = True
  data = model.SerializeToString(deterministic=True)
  try:
    again = spec_from_sentencepiece(data)
  except ValueError as error:
    raise NotImplementedError(f"this tokenizer has no place in tokenizer.model: {error}") from error
  for field in _COMPARED:
    mine, read = getattr(spec, field), getattr(again, field)
    if mine != read:
      raise NotImplementedError(
        f"the tokenizer's {field} = {str(mine)[:80]} would be read back as {str(read)[:80]}"
      )
  return data
