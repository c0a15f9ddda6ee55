"""What llama.cpp makes of hostile texts under every pre-tokenizer it knows: pretokenizers.json.

    python -m tests.tokenizer.golden.make_pretokenizers PATH/llama-tokenize

The vocabulary is the bytes and a merge of every two bytes that are neighbours in the texts, in an
order that a seed makes, so that nearly every cut shows in the ids. Of those a checksum is kept.
Texts leave out what llama.cpp is known to do by approximation (`neurojax/tokenizer/pretokenizers.py`
says where); tests say literally what is right there.
"""

import itertools
import json
import random
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import gguf

from neurojax.tokenizer import TokenizerSpec
from neurojax.tokenizer.pretokenizers import PRE_TOKENIZERS
from neurojax.tokenizer.write.gguf import gguf_from_spec
from tests.tokenizer import vocab

HERE = Path(__file__).parent
_BITS = (
  "I'm", "HE'LL", "they've", "O'", "12", "123456", "1,000,000", "x1y22", "٣٤٥", "²", "Ⅷ", "½", "\n",
  "\n\n", "\r\n", "\n \n", "é", "e\u0301", "क्षि", "ไทย", "עברית", "العربية", "\u200f", "\u200d", "🦙",
  "👩\u200d👧", "你好", "世界。", "ひらがな", "カタカナ", "한국어", "ǅ", "ʰ", "ß", "CamelCase", "HTMLParser",
  "_", "__init__", "foo.bar(baz)", "//", "/*", "!?", "...", "…", "—", "“q”", "$", "+=", "`", "~", "^",
  "|", "<s>", "</s>", "▁", "\ufeff", "\x07", "the", "ing", "Ａ１", "ﬁ", "ー", "، ", "।", "(s|", "ကခ",
)  # fmt: skip
_SPACES = (" ", "  ", "   ", "\u00a0", "\t", "\u3000 x")


def texts(count: int = 28) -> list[str]:
  """Words, and in half of the texts runs of white space, which tiny_aya and afmoe do not get."""
  draw = random.Random(11)
  made = []
  for i in range(count):
    spaces = _SPACES if i % 2 else (" ",)
    made.append("".join(draw.choice(draw.choice((_BITS, _BITS, spaces))) for _ in range(22)))
  return made


def pairs(made: list[str]) -> tuple[str, ...]:
  """Merges of two bytes each."""
  letters = vocab.alphabet()
  spelled = ["".join(letters[byte] for byte in text.encode()) for text in made]
  found = sorted({a + " " + b for text in spelled for a, b in itertools.pairwise(text)})
  random.Random(12).shuffle(found)
  return tuple(found)


def spec(pre: str, merges: tuple[str, ...]) -> TokenizerSpec:
  tokens = (*vocab.alphabet(), *(merge.replace(" ", "") for merge in merges), "<end>")
  return TokenizerSpec(
    kind="bpe",
    tokens=tokens,
    types=("normal",) * (len(tokens) - 1) + ("control",),
    merges=merges,
    pre=pre,
    eos_id=len(tokens) - 1,
    stop_ids=frozenset({len(tokens) - 1}),
  )


def checksum(ids: list[int]) -> int:
  return zlib.crc32(json.dumps(ids).encode())


def names() -> list[str]:
  return [name for name, rules in PRE_TOKENIZERS.items() if rules.byte_level]


def _ask(program: str, model: Path, folder: Path, text: str) -> list[int]:
  (folder / "text").write_bytes(text.encode())
  command = [program, "-m", model, "-f", folder / "text", "--ids", "--no-bos", "--no-escape",
             "--no-parse-special", "--log-disable"]  # fmt: skip
  answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
  return json.loads(answer[answer.index("[") :])


def main(program: str) -> None:
  made = texts()
  merges = pairs(made)
  answers = {}
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    for pre in names():
      writer = gguf.GGUFWriter(folder / "v.gguf", "llama")
      for key, value in gguf_from_spec(spec(pre, merges), len(spec(pre, merges).tokens)).items():
        _write(writer, key, value)
      writer.write_header_to_file()
      writer.write_kv_data_to_file()
      writer.close()
      answers[pre] = [checksum(_ask(program, folder / "v.gguf", folder, text)) for text in made]
  (HERE / "pretokenizers.json").write_text(json.dumps(answers, indent=0) + "\n")


def _write(writer: gguf.GGUFWriter, key: str, value: object) -> None:
  match value:
    case bool():
      writer.add_bool(key, value)
    case int():
      writer.add_uint32(key, value)
    case str():
      writer.add_string(key, value)
    case list():
      writer.add_array(key, value)


if __name__ == "__main__":
  main(*sys.argv[1:])
