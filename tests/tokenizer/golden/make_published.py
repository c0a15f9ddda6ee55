"""Cuts by published regexes under another regex engine: published.json.

    python -m tests.tokenizer.golden.make_published      (needs the package `regex`)

For the names whose rules llama.cpp approximates, or whose regexes this package writes otherwise. The
patterns are those of the models' tokenizer.json (superbpe: OLMo2-8B-SuperBPE)
and, for kimi-k2, of its tokenization_kimi.py.
"""

import json
import random
from pathlib import Path

from tests.tokenizer.golden.make_pretokenizers import texts

HERE = Path(__file__).parent
_CASES = (
  r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
  r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
)
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PUBLISHED = {
  "gpt-4o": [_CASES + r"\p{N}{1,3}|" + _REST],
  "tekken": [_CASES.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "") + r"\p{N}|" + _REST],
  "superbpe": [r"\p{N}+", r"(?=(\d{3})+(?!\d))"],
  "kimi-k2": [
    r"[\p{Han}]+|"
    + _CASES.replace(r"\p{M}]", r"\p{M}&&[^\p{Han}]]")
    + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
  ],
}


def samples() -> list[str]:
  """Hostile texts, and runs of digits of many lengths and neighbours."""
  draw = random.Random(13)
  bits = (
    "1",
    "22",
    "1234567",
    "²",
    "٣",
    "a",
    " ",
    "  ",
    "\n",
    "_",
    "-",
    "é",
    "Ⅷ",
    "000000",
    "中",
    "'S",
  )
  return texts() + ["".join(draw.choice(bits) for _ in range(14)) for _ in range(60)]


def cut(text: str, patterns: list[str]) -> list[str]:
  """Each pattern cuts every piece into its matches and what lies between."""
  import regex

  pieces = [text]
  for pattern in patterns:
    every = regex.compile(pattern, regex.V1)
    smaller = []
    for piece in pieces:
      at = 0
      for match in every.finditer(piece):
        smaller += [piece[at : match.start()], match[0]]
        at = match.end()
      smaller.append(piece[at:])
    pieces = [piece for piece in smaller if piece]
  return pieces


def main() -> None:
  answers = {
    name: ["|".join(str(len(piece)) for piece in cut(text, patterns)) for text in samples()]
    for name, patterns in PUBLISHED.items()
  }
  (HERE / "published.json").write_text(json.dumps(answers, indent=0) + "\n")


if __name__ == "__main__":
  main()
