"""The same ids as llama.cpp, on its own test vectors and on its answers to the golden prompts."""

import itertools
import json

import pytest

from neurojax.tokenizer import Tokenizer
from tests.shared import shared
from tests.tokenizer import vocab


@pytest.mark.parametrize("name", vocab.NAMES)
def test_vectors_of_llama_cpp(name: str):
  tokenizer = vocab.real(name)
  texts = shared("data", "vocab", f"ggml-vocab-{name}.gguf.inp").read_bytes().decode()
  answers = shared("data", "vocab", f"ggml-vocab-{name}.gguf.out").read_text().splitlines()
  texts = texts.removesuffix("\n__ggml_vocab_test__\n").split("\n__ggml_vocab_test__\n")
  assert len(texts) == len(answers) > 40
  for text, answer in zip(texts, answers, strict=True):
    ids = tokenizer.encode(text)
    assert ids == [int(word) for word in answer.split()], text
    assert tokenizer.decode(ids) == text


def test_golden_prompts_of_smollm2():
  tokenizer = vocab.smollm2()
  cases = json.loads(shared("golden", "smollm2.json").read_text())["cases"]
  for case in cases:
    ids = tokenizer.encode(case["prompt"], parse_special=True, add_special=True)
    assert ids == case["prompt_tokens"]
    text = tokenizer.decode(case["tokens"], special=False, continues=True)
    assert text == case["text"]


def test_stories260k_reads_its_own_story():
  # Ids by llama2.c's run.c, whose merge takes the best score, the leftmost among equals.
  tokenizer = Tokenizer(vocab.tok512())
  text = shared("data", "stories260K", "greedy200.txt").read_text().strip("\n")
  ids = tokenizer.encode(text, add_special=True)
  assert ids == _llama2c(tokenizer.spec.tokens, tokenizer.spec.scores, text)
  assert tokenizer.decode(ids) == text


def _llama2c(tokens: tuple[str, ...], scores: tuple[float, ...], text: str) -> list[int]:
  """The encoder of llama2.c: merge the best neighbouring pair until none is a piece."""
  index = {token: i for i, token in enumerate(tokens)}
  ids = [index[" "]]
  for char in text:
    ids += [index[char]] if char in index else [byte + 3 for byte in char.encode()]
  while True:
    pairs = [tokens[a] + tokens[b] for a, b in itertools.pairwise(ids)]
    known = [(-scores[index[pair]], i) for i, pair in enumerate(pairs) if pair in index]
    if not known:
      return [1, *ids]
    _, i = min(known)
    ids[i : i + 2] = [index[pairs[i]]]


@pytest.mark.parametrize("name", ["gpt-2", "llama-spm"])
def test_a_long_text_takes_seconds(name: str):
  tokenizer = vocab.real(name)
  text = shared("data", "wikitext-2", "wiki.test.raw").read_text()
  ids = tokenizer.encode(text)
  assert 280_000 < len(ids) < 340_000
  assert tokenizer.decode(ids) == text
