"""Learns a vocabulary from a corpus: byte-level BPE, or SentencePiece's BPE or unigram model."""

import dataclasses
import io
import json
from collections.abc import Iterable, Iterator
from typing import Literal

import sentencepiece
import tokenizers
from tokenizers import models, trainers

from neurojax.tokenizer.byte_alphabet import byte_alphabet
from neurojax.tokenizer.encode.bpe import byte_level_splitter
from neurojax.tokenizer.pretokenizers import pre_tokenizer
from neurojax.tokenizer.read.json_rules import merge_line
from neurojax.tokenizer.read.tokenizer_model import spec_from_sentencepiece
from neurojax.tokenizer.tokenizer_spec import TokenizerSpec

END_OF_TEXT = "<|endoftext|>"
_SMALLEST = 256 + 1
# SentencePiece's unigram model depends on the number of threads, so it is the same everywhere.
_THREADS = 8
# SentencePiece leaves out longer lines. Pieces have at most 16 characters, so little is lost by cutting.
_LINE_CHARACTERS = 1 << 14


def train_bpe(texts: Iterable[str], *, vocab_size: int, pre: str = "qwen2") -> TokenizerSpec:
  """Learns merges by frequency: byte-pair encoding (Sennrich et al., arXiv:1508.07909) of bytes.

  Token 0 is `END_OF_TEXT`, which ends a document. It is BOS too, as in GPT-2, since what follows it
  in training is the start of another document. The texts are cut as `pre` says, so that llama.cpp
  can name the rules. The same texts give the same vocabulary.

  Args:
    texts: The corpus, in pieces of any size; small ones (a few kB) are cut fastest.
    vocab_size: Tokens of the result, unless the corpus is too small to give so many.
    pre: A byte-level entry of `PRE_TOKENIZERS`.
  Raises:
    ValueError: vocab_size leaves no room for a merge beside the 256 bytes, or there is no text.
    NotImplementedError: the pre-tokenizer is unknown, or works on text and not on bytes.
  """
  if vocab_size <= _SMALLEST:
    raise ValueError(
      f"vocab_size = {vocab_size}: at least {_SMALLEST + 1}, for 256 bytes, the end of a text and a"
      " merge"
    )
  rules = pre_tokenizer(pre)
  if not rules.byte_level:
    raise NotImplementedError(f"pre-tokenizer {pre!r} works on text: choose a byte-level one")
  learner = tokenizers.Tokenizer(models.BPE(ignore_merges=rules.whole_words))
  learner.pre_tokenizer = byte_level_splitter(rules)
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[END_OF_TEXT],
    initial_alphabet=sorted(byte_alphabet()),
    limit_alphabet=256,
    show_progress=False,
  )
  learner.train_from_iterator(iter(texts), trainer=trainer)
  model = learner.model
  size = learner.get_vocab_size()
  if size <= _SMALLEST:
    raise ValueError("the corpus holds no two bytes side by side: no vocabulary can be learnt")
  tokens = tuple(model.id_to_token(i) for i in range(size))
  merges = json.loads(learner.to_str())["model"]["merges"]
  # A text that spells the token learns pieces of it like any other; the token itself is no merge.
  return TokenizerSpec(
    kind="bpe",
    tokens=tokens,
    types=("control", *("normal",) * (size - 1)),
    merges=tuple(map(merge_line, merges)),
    pre=pre,
    bos_id=0,
    eos_id=0,
    stop_ids=frozenset({0}),
    add_bos=True,
  )


def train_sentencepiece(
  texts: Iterable[str], *, vocab_size: int, model: Literal["bpe", "unigram"]
) -> TokenizerSpec:
  """Learns pieces of words by the library `sentencepiece`, without any change of the text.

  Token 0 is unknown, token 1 is `END_OF_TEXT`, which ends a document and is BOS too. Then come the 256
  bytes, which spell characters without a piece, and digits are pieces of their own, as in Llama 2. The
  same texts give the same vocabulary on every machine. U+2581, which stands for a space, comes back from
  decoding as a space.

  Args:
    texts: The corpus, in pieces of any size.
    vocab_size: Tokens of the result, unless the corpus is too small to give so many.
    model: "bpe" gives a spec of kind "spm", which GGUF can hold; "unigram" one of kind "sentencepiece".
  Raises: ValueError: vocab_size leaves no room for the characters of the corpus, or there is no text.
  Source: Kudo and Richardson, arXiv:1808.06226; unigram: Kudo, arXiv:1804.10959.
  """
  least = _SMALLEST + 2
  if vocab_size < least:
    raise ValueError(
      f"vocab_size = {vocab_size}: at least {least}, for 256 bytes, the unknown token, the end of a"
      " text and a piece"
    )
  lines = _Lines(texts)
  made = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(lines),
      model_writer=made,
      model_type=model,
      vocab_size=vocab_size,
      hard_vocab_limit=False,
      num_threads=_THREADS,
      normalization_rule_name="identity",
      remove_extra_whitespaces=False,
      allow_whitespace_only_pieces=True,
      add_dummy_prefix=True,
      byte_fallback=True,
      split_digits=True,
      character_coverage=0.99995,
      max_sentence_length=4 * _LINE_CHARACTERS,
      unk_id=0,
      eos_id=1,
      bos_id=-1,
      pad_id=-1,
      eos_piece=END_OF_TEXT,
      minloglevel=2,
    )
  except RuntimeError as error:
    if lines.error is not None:
      raise lines.error from None
    # Lines with a NUL or U+2585 are left out by the library.
    if not lines.count or "sentences_.empty" in str(error):
      raise ValueError("the corpus holds no text: no vocabulary can be learnt") from error
    if "required_chars" in str(error):
      raise ValueError(
        f"vocab_size = {vocab_size} leaves no room for a piece beside 256 bytes and each character of"
        " the corpus: take a larger one"
      ) from error
    raise ValueError(f"the library `sentencepiece` learns no vocabulary: {error}") from error
  spec = spec_from_sentencepiece(made.getvalue())
  return dataclasses.replace(spec, bos_id=spec.eos_id, add_bos=True)


class _Lines:
  """Lines of texts, long ones cut at a space, with the error that ended them.

  SentencePiece learns nothing across a line end, and hides the error of an iterator.
  """

  def __init__(self, texts: Iterable[str]):
    self._texts = texts
    self.count = 0
    self.error: Exception | None = None

  def __iter__(self) -> Iterator[str]:
    try:
      for text in self._texts:
        for line in text.split("\n"):
          while len(line) > _LINE_CHARACTERS:
            cut = line.rfind(" ", 1, _LINE_CHARACTERS)
            cut = cut if cut > 0 else _LINE_CHARACTERS
            self.count += 1
            yield line[:cut]
            line = line[cut:]
          if line:
            self.count += 1
            yield line
    except Exception as error:
      self.error = error
      raise
