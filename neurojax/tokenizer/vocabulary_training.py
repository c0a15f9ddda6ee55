"""A byte-level BPE vocabulary learnt from a corpus."""

from collections.abc import Iterable

import tokenizers
from tokenizers import models, trainers

from neurojax.tokenizer.byte_alphabet import byte_alphabet
from neurojax.tokenizer.encode.bpe import byte_level_splitter
from neurojax.tokenizer.pretokenizers import pre_tokenizer
from neurojax.tokenizer.tokenizer_spec import TokenizerSpec

END_OF_TEXT = "<|endoftext|>"
_SMALLEST = 256 + 1


def train_bpe(texts: Iterable[str], *, vocab_size: int, pre: str = "qwen2") -> TokenizerSpec:
  """Learn merges by frequency: byte-pair encoding (Sennrich et al., arXiv:1508.07909) of bytes.

  Token 0 is `END_OF_TEXT`, which ends a document; it is BOS too, as in GPT-2, since what follows it
  in training is the start of another document. The texts are cut as `pre` says, so that llama.cpp
  can name the rules. The same texts give the same vocabulary.

  Args:
    texts: The corpus, in pieces of any size; small ones (a few kB) are cut fastest.
    vocab_size: Of the result, unless the corpus is too small to give so many pieces.
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
  # A text that spells the token learns pieces of it like any other; the token itself is no merge.
  return TokenizerSpec(
    kind="bpe",
    tokens=tokens,
    types=("control", *("normal",) * (size - 1)),
    merges=_merges(learner),
    pre=pre,
    bos_id=0,
    eos_id=0,
    stop_ids=frozenset({0}),
    add_bos=True,
  )


def _merges(learner: tokenizers.Tokenizer) -> tuple[str, ...]:
  import json

  merges = json.loads(learner.to_str())["model"]["merges"]
  return tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in merges)
