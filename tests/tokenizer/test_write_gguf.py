"""A tokenizer to GGUF's keys and to tokenizer.json: the same tokenizer comes back, or none goes."""

import dataclasses
import json
import random

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from neurojax.tokenizer import Tokenizer, TokenizerSpec, spec_from_gguf
from neurojax.tokenizer.read.tokenizer_json import spec_from_json
from neurojax.tokenizer.write.gguf import gguf_from_spec, padded
from neurojax.tokenizer.write.tokenizer_json import json_from_spec
from tests.tokenizer import vocab

TEXTS = ["the theatre", "  two\n\n\tlines ", "1234 5é中\U0001f600", "it's I'LL <s>", "", "a\r\n b"]


def random_text(seed: int) -> str:
  rng = random.Random(seed)
  pieces = ["the ", "th", "\n", "  ", "9", "'s", "\u00e9", "\u4e2d", "<s>", "e", "\t", ".", "A"]
  return "".join(rng.choice(pieces) for _ in range(60))


@pytest.mark.parametrize(
  "spec",
  [
    vocab.tiny_bpe(),
    vocab.tiny_bpe(add_bos=False, add_eos=False, bos_id=None, eos_id=None, stop_ids={260}),
    vocab.tiny_bpe(pre="llama-bpe", add_bos=False, stop_ids={259, 260, 261}),
    vocab.tiny_bpe(pre="gemma4", chat_template="{{ 1 }}"),
    vocab.tiny_spm(),
    vocab.tiny_spm(add_space_prefix=False, add_bos=False, add_eos=True),
  ],
)
def test_keys_make_the_same_tokenizer(spec: TokenizerSpec):
  spec = dataclasses.replace(spec, stop_ids=frozenset(spec.stop_ids))
  assert spec_from_gguf(gguf_from_spec(spec, len(spec.tokens))) == spec
  wide = spec_from_gguf(gguf_from_spec(spec, len(spec.tokens) + 5))
  assert wide == padded(spec, len(spec.tokens) + 5)
  for text in TEXTS if spec.pre != "gemma4" else ["the"]:
    ids = Tokenizer(wide).encode(text, add_special=True)
    assert ids == Tokenizer(spec).encode(text, add_special=True)


@pytest.mark.parametrize("name", vocab.NAMES)
def test_real_tokenizers_come_back(name: str):
  spec = vocab.real(name).spec
  assert spec_from_gguf(gguf_from_spec(spec, len(spec.tokens))) == spec


def test_what_has_no_key_is_refused_by_name():
  size = len(vocab.tiny_bpe().tokens)
  with pytest.raises(NotImplementedError, match="strip_after_ids"):
    gguf_from_spec(vocab.tiny_bpe(strip_after_ids=frozenset({260})), size)
  with pytest.raises(NotImplementedError, match="stop_ids"):
    gguf_from_spec(vocab.tiny_bpe(stop_ids=frozenset({1, 2, 3, 260})), size)
  with pytest.raises(NotImplementedError, match="'no-such'"):
    gguf_from_spec(vocab.tiny_bpe(pre="no-such"), size)
  with pytest.raises(ValueError, match="263 tokens and the embedding 262 rows"):
    gguf_from_spec(vocab.tiny_bpe(), 262)
  with pytest.raises(ValueError, match="without merges"):
    gguf_from_spec(vocab.tiny_bpe(merges=()), size)
  assert spec_from_gguf(gguf_from_spec(vocab.tiny_bpe(), 263)).pre == "gpt-2"
  assert gguf_from_spec(None, 10) == {"tokenizer.ggml.model": "no_vocab"}


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o"])
@pytest.mark.parametrize("adds", [(False, False), (True, False), (True, True)])
def test_tokenizer_json_is_read_by_its_library_and_by_us(pre: str, adds: tuple[bool, bool]):
  spec = vocab.tiny_bpe(pre=pre, add_bos=adds[0], add_eos=adds[1], stop_ids=frozenset({260}))
  text = json_from_spec(spec)
  again = spec_from_json(text, bos="<s>", eos="</s>")
  assert again == spec
  theirs, ours = tokenizers.Tokenizer.from_str(text), Tokenizer(spec)
  for sample in [*TEXTS, *map(random_text, range(40))]:
    ids = ours.encode(sample, parse_special=True, add_special=True)
    assert theirs.encode(sample).ids == ids
    assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids, special=True)


@pytest.mark.parametrize(
  ("name", "cut"),
  [
    ("gpt-2", [pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    (
      "smollm",
      [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)],
    ),
  ],
)
def test_what_the_library_trains_is_known_by_name(name: str, cut: list):
  trained = tokenizers.Tokenizer(models.BPE())
  trained.pre_tokenizer = pre_tokenizers.Sequence(cut) if len(cut) > 1 else cut[0]
  trained.decoder, trained.post_processor = decoders.ByteLevel(), processors.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
  )  # fmt: skip
  trained.train_from_iterator(map(random_text, range(200)), trainer)
  spec = spec_from_json(trained.to_str(), eos="<|endoftext|>", bos="<|endoftext|>")
  assert (spec.pre, spec.eos_id, spec.types[0]) == (name, 0, "control")
  assert spec_from_gguf(gguf_from_spec(spec, len(spec.tokens))) == spec
  ours = Tokenizer(spec)
  for sample in [*TEXTS, *map(random_text, range(300, 340))]:
    assert ours.encode(sample, parse_special=True) == trained.encode(sample).ids
    assert ours.decode(ours.encode(sample)) == sample


def changed(*path: str, to: object) -> str:
  table = json.loads(json_from_spec(vocab.tiny_bpe()))
  inner = table
  for key in path[:-1]:
    inner = inner[key]
  inner[path[-1]] = to
  return json.dumps(table)


@pytest.mark.parametrize(
  ("text", "error", "reason"),
  [
    ("{", ValueError, "not JSON"),
    ("[]", ValueError, "no tokenizer.json"),
    (changed("model", "type", to="Unigram"), NotImplementedError, "model 'Unigram'"),
    (changed("model", "byte_fallback", to=True), NotImplementedError, "model.byte_fallback"),
    (changed("normalizer", to={"type": "NFC"}), NotImplementedError, "normalizer 'NFC'"),
    (changed("pre_tokenizer", to={"type": "Whitespace"}), NotImplementedError, "Whitespace"),
    (changed("pre_tokenizer", to=None), NotImplementedError, "no name for it"),
    (changed("model", "ignore_merges", to=True), NotImplementedError, "ignore_merges True"),
    (changed("model", "vocab", "the", to=9999), ValueError, "263 tokens whose ids are not 0 to"),
    (changed("post_processor", to={"type": "BertProcessing"}), NotImplementedError, "BertProc"),
  ],
)
def test_a_tokenizer_json_that_gguf_has_no_words_for_is_refused(text, error, reason):
  with pytest.raises(error, match=reason):
    spec_from_json(text)


def test_special_tokens_must_be_tokens_and_other_kinds_are_refused():
  text = json_from_spec(vocab.tiny_bpe())
  with pytest.raises(ValueError, match="unknown = '<unk>' is no token"):
    spec_from_json(text, unknown="<unk>")
  with pytest.raises(
    NotImplementedError, match=r"only byte-level BPE and Gemma 4's are written as"
  ):
    json_from_spec(vocab.tiny_spm())
  with pytest.raises(NotImplementedError, match="the vocabulary has no token <0x00>"):
    json_from_spec(vocab.tiny_bpe(pre="gemma4"))
