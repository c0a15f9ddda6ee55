"""Text of known entropy, for runs of configs/train/tiny.toml."""

import json
import math
from pathlib import Path

import numpy as np

from neurojax.data.prepare import Preparation, partial_folder, prepare

TINY = Path(__file__).parents[2] / "configs" / "train" / "tiny.toml"
WORDS, CHOICES, LENGTH = 32, 4, 500
BLIND, LEAST = math.log(WORDS), math.log(CHOICES)
"""Nats per word for who knows the words only, and for who has learnt everything."""


def write_chain(folder: Path, *, documents: int = 400, valid_fraction: float = 0.05) -> Path:
  """Prepared documents in which each word is one of four, evenly, that the word before the last
  allows: without attention to that word nothing is to be gained."""
  rng = np.random.default_rng(0)
  words = [f"{a}{e}{b}o" for a in "bdfg" for b in "klmn" for e in "ai"]
  follow = np.stack([rng.permutation(WORDS)[:CHOICES] for _ in range(WORDS)])

  def document() -> str:
    chain = list(rng.integers(0, WORDS, 2))
    while len(chain) < LENGTH:
      chain.append(follow[chain[-2], rng.integers(CHOICES)])
    return " ".join(words[i] for i in chain)

  source = folder / "chain.jsonl"
  source.write_text("".join(json.dumps({"text": document()}) + "\n" for _ in range(documents)))
  plan = Preparation(inputs=(source,), vocab_size=512, valid_fraction=valid_fraction)
  with partial_folder(folder / "chain") as partial:
    prepare(plan, partial)
  return folder / "chain"
