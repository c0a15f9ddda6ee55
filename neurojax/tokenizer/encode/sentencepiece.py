"""Encodes the kind "sentencepiece" by the library `sentencepiece`."""

import os
from collections.abc import Sequence

import sentencepiece

from neurojax.tokenizer.read.tokenizer_model import model_of_spec
from neurojax.tokenizer.tokenizer_spec import TokenizerSpec


class SentencePieceEncoder:
  """Turns text into the library's ids; safe to share among threads.

  The library recognises user-defined pieces anywhere in a text. It never gives the id of a control
  token, whatever the text spells.

  Attributes:
    removes_spaces: Tells whether white space at the ends of a text, and repeated within, is removed.

  Raises: ValueError: the library does not take the spec's tokenizer.model.
  """

  def __init__(self, spec: TokenizerSpec):
    model = model_of_spec(spec)
    self.removes_spaces = model.normalizer_spec.remove_extra_whitespaces
    try:
      self._processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    except RuntimeError as error:
      raise ValueError(
        f"tokenizer.model is refused by the library `sentencepiece`: {error}"
      ) from error

  def encode(self, text: str) -> list[int]:
    return self._run(text)

  def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
    """Encodes each text, on all cores."""
    return self._run(list(texts), num_threads=os.cpu_count() or 1)

  def _run(self, text: str | list[str], **options: int) -> list:
    try:
      return self._processor.encode(text, **options)
    except RuntimeError as error:
      raise ValueError(f"the library `sentencepiece` cannot encode this text: {error}") from error
