"""Small SentencePiece models and their ids on hostile texts: sentencepiece.json.

python tests/tokenizer/golden/make_sentencepiece.py
"""

import base64
import io
import json
import random
from pathlib import Path

import sentencepiece

HERE = Path(__file__).parent
_SYLLABLES = (
  "the",
  "an",
  "ing",
  "to",
  "re",
  "é",
  "ion",
  "st",
  "a",
  "o",
  "i",
  "th",
  "er",
  "ou",
  "s",
  "1",
  "20",
)
_BITS = (
  "the ", "ing", " ", "  ", "   ", "\n", "\n\n", "é", "e\u0301", "你好", "🦙", "\u200d", "123", "\t",
  "<s>", "</s>", "<unk>", "<tool>", "\u2581", ".", " to", "thing", "\u00a0", "\r\n", "<0x41>", "\ufeff",
)  # fmt: skip
KINDS = {
  "llama": dict(add_dummy_prefix=True, byte_fallback=True),
  "gemma": dict(
    add_dummy_prefix=False,
    byte_fallback=True,
    user_defined_symbols=["\n\n", "<tool>"],
    pad_id=0,
    eos_id=1,
    bos_id=2,
    unk_id=3,
  ),
  "no bytes": dict(add_dummy_prefix=True, byte_fallback=False),
}
# GGUF has no words for these.
REFUSED = {
  "unigram": dict(model_type="unigram", byte_fallback=True),
  "trimmed": dict(remove_extra_whitespaces=True),
}


def corpus() -> list[str]:
  draw = random.Random(7)
  word = lambda: "".join(draw.choice(_SYLLABLES) for _ in range(draw.randrange(1, 4)))  # noqa: E731
  return [" ".join(word() for _ in range(12)) for _ in range(400)]


def texts() -> list[str]:
  draw = random.Random(8)
  return ["", " "] + [
    "".join(draw.choice(_BITS) for _ in range(draw.randrange(1, 22))) for _ in range(70)
  ]


def train(**options: object) -> bytes:
  made = io.BytesIO()
  settings = dict(
    model_type="bpe",
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True,
    hard_vocab_limit=False,
    vocab_size=330,
    minloglevel=2,
  )
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(corpus()), model_writer=made, **{**settings, **options}
  )
  return made.getvalue()


def main() -> None:
  answers: dict[str, dict] = {"texts": texts(), "models": {}, "refused": {}}
  for name, options in KINDS.items():
    data = train(**options)
    processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    answers["models"][name] = {
      "model": base64.b64encode(data).decode(),
      "ids": [processor.encode(text) for text in texts()],
      "bos": processor.bos_id(),
      "eos": processor.eos_id(),
    }
  for name, options in REFUSED.items():
    answers["refused"][name] = base64.b64encode(train(**{"vocab_size": 290, **options})).decode()
  (HERE / "sentencepiece.json").write_text(json.dumps(answers) + "\n")


if __name__ == "__main__":
  main()
