"""Encodes long texts fast by a tokenizer.json of SentencePiece's kind, which merges texts as a whole."""

import itertools
import json
import operator

import tokenizers

from neurojax.tokenizer.byte_alphabet import SPACE
from neurojax.tokenizer.read.json_rules import prefix_rule


class WordEncoder:
  """Encodes a long text word by word, each word once. It cuts where no merge reaches across.

  Raises: NotImplementedError: under these rules a cut could change an id.
  """

  def __init__(self, source: str):
    table = json.loads(source)
    self._prefix = prefix_rule(table)
    model = table["model"]
    spelled = model["vocab"]
    odd = [
      key
      for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
      if model.get(key)
    ]
    if odd or model.get("type", "BPE") != "BPE" or not model.get("byte_fallback"):
      raise NotImplementedError("no plain BPE with byte tokens")
    # With a token for each byte nothing is unknown, and no run of unknowns crosses a cut.
    if not all(f"<0x{byte:02X}>" in spelled for byte in range(256)):
      raise NotImplementedError("not every byte has a token")
    merges = (m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"])
    self._joints = frozenset(left[-1] + right[0] for left, right in merges)
    bare = {
      **table,
      "normalizer": None,
      "pre_tokenizer": None,
      "post_processor": None,
      "added_tokens": [],
    }
    self._fast = tokenizers.Tokenizer.from_str(json.dumps(bare))

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a whole text that spells no added token."""
    text = text.replace(" ", SPACE)
    if self._prefix == "prepend" or (self._prefix != "never" and not text.startswith(SPACE)):
      text = SPACE + text if text else text
    pairs = map(operator.add, text, itertools.islice(text, 1, None))
    joints = self._joints
    cuts = [i for i, pair in enumerate(pairs, 1) if pair not in joints]
    words = [text[a:b] for a, b in itertools.pairwise((0, *cuts, len(text)))]
    unique = list(dict.fromkeys(words))
    encoded = self._fast.encode_batch_fast(unique, add_special_tokens=False)
    ids = {word: each.ids for word, each in zip(unique, encoded, strict=True)}
    return list(itertools.chain.from_iterable(map(ids.__getitem__, words)))
