"""GGUF metadata to a spec: llama.cpp's defaults, and what is refused."""

import pytest

from neurojax.tokenizer import Tokenizer, spec_from_gguf
from tests.tokenizer import vocab

NUMBERS = {"normal": 1, "unknown": 2, "control": 3, "user": 4, "unused": 5, "byte": 6}


def metadata(spec, model: str, /, **changes) -> dict[str, object]:
  values = {
    "model": model,
    "tokens": list(spec.tokens),
    "token_type": [NUMBERS[kind] for kind in spec.types],
    "bos_token_id": spec.bos_id,
    "eos_token_id": spec.eos_id,
  }
  values |= (
    {"pre": spec.pre, "merges": list(spec.merges)} if spec.pre else {"scores": list(spec.scores)}
  )
  values |= changes
  return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def bpe(**changes):
  return metadata(vocab.tiny_bpe(), "gpt2", **changes)


def spm(**changes):
  return metadata(vocab.tiny_spm(), "llama", **changes)


def test_byte_level():
  spec = spec_from_gguf(
    bpe(add_bos_token=True, add_eos_token=True)
    | {"tokenizer.chat_template": "{{ 1 }}", "general.architecture": "llama"}
  )
  expected = vocab.tiny_bpe(stop_ids=frozenset({260}), chat_template="{{ 1 }}")
  assert spec == expected


def test_scored_with_its_defaults():
  assert spec_from_gguf(spm(bos_token_id=None, eos_token_id=None)) == vocab.tiny_spm()
  spec = spec_from_gguf(spm(add_bos_token=False, add_space_prefix=False))
  assert not spec.add_bos and not spec.add_space_prefix


@pytest.mark.parametrize(
  ("pre", "adds"), [("llama-bpe", True), ("tekken", True), ("gpt-2", False), ("qwen2", False)]
)
def test_bos_by_pre_tokenizer(pre: str, adds: bool):
  assert spec_from_gguf(bpe(pre=pre)).add_bos is adds
  assert spec_from_gguf(bpe(pre=pre, add_bos_token=not adds)).add_bos is not adds


def test_a_mask_that_swallows_the_space_before_it():
  base = vocab.tiny_bpe()
  tokens = [*base.tokens[:-1], "<mask>"]
  for pre, expected in (("jina-v2-code", [257, 262]), ("gpt-2", [257, ord(" "), 262])):
    spec = spec_from_gguf(bpe(tokens=tokens, pre=pre))
    assert Tokenizer(spec).encode("the <mask>") == expected


def test_gemma4_always_adds_bos():
  spec = spec_from_gguf(metadata(vocab.tiny_bpe(), "gemma4", add_bos_token=False))
  assert spec.pre == "gemma4" and spec.add_bos


@pytest.mark.parametrize(
  "text", ["<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|endoftext|>", "<|end|>", "<|fim_pad|>"]
)
def test_stops_known_by_their_text(text: str):
  base = vocab.tiny_bpe()
  for number in NUMBERS.values():
    values = bpe(
      tokens=[*base.tokens, text], token_type=[*(NUMBERS[t] for t in base.types), number]
    )
    spec = spec_from_gguf(values)
    assert spec.stop_ids == {260, 263}
    # Whatever the file calls it, a user's text must not end a turn.
    assert spec.types[263] == "control"
    assert 263 not in Tokenizer(spec).encode(text)


def test_a_stop_that_merges_spell_is_text():
  base = vocab.tiny_bpe()
  tokens = ["[EOT]" if t == "the" else "[E" if t == "th" else t for t in base.tokens]
  tokens += ["OT]", "OT"]
  types = [NUMBERS[t] for t in base.types] + [1, 1]
  values = bpe(
    tokens=tokens, token_type=types, merges=["[ E", "O T", "OT ]", "[E OT]"], eos_token_id=None
  )
  spec = spec_from_gguf(values)
  # "</s>" is a control token here.
  assert spec.stop_ids == {260}
  assert spec.types[257] == "normal"
  assert Tokenizer(spec).decode([257]) == "[EOT]"


def test_stops_named_by_keys():
  spec = spec_from_gguf(bpe(eot_token_id=261, eom_token_id=5, fim_sep_token_id=6))
  assert spec.stop_ids == {260, 261, 5, 6}


def test_harmony_ends_a_message_without_ending_the_turn():
  base = vocab.tiny_bpe()
  tokens = [*base.tokens, "<|end|>", "<|return|>", "<|call|>"]
  spec = spec_from_gguf(bpe(tokens=tokens, token_type=[NUMBERS[t] for t in base.types] + [3] * 3))
  assert spec.stop_ids == {260, 264, 265}


def test_phi3_swallows_space():
  assert spec_from_gguf(spm() | {"general.name": "Phi-3-mini"}).strip_after_ids == {2}
  assert spec_from_gguf(spm() | {"general.name": "Other"}).strip_after_ids == frozenset()


@pytest.mark.parametrize("key", ["model", "tokens", "token_type", "merges", "pre"])
def test_missing_keys_are_named(key: str):
  with pytest.raises(ValueError, match=f"tokenizer.ggml.{key} is missing"):
    spec_from_gguf(bpe(**{key: None}))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(model="nonsense"), "model is 'nonsense'"),
    (dict(model=3), "model is 3"),
    (dict(tokens="abc"), "tokens is a str"),
    (dict(tokens=[1, 2]), r"tokens\[0\] is 1"),
    (dict(tokens=["a"]), "token_type has 263 entries"),
    (dict(token_type=[1]), "token_type has 1 entries"),
    (dict(token_type=[9] * 263), r"token_type\[0\] is 9"),
    (dict(merges=[b"t h"]), r"merges\[0\]"),
    (dict(bos_token_id=263), "bos_token_id is 263; expected an id below 263"),
    (dict(eos_token_id=-1), "eos_token_id is -1"),
    (dict(eot_token_id=2**32 - 1), "eot_token_id is 4294967295"),
    (dict(bos_token_id=True), "bos_token_id is True"),
    (dict(add_bos_token=1), "add_bos_token is 1"),
    (dict(pre=7), "pre is 7"),
    (dict(bos_token_id=None, add_bos_token=True), "bos_id is None"),
  ],
)
def test_damage_is_named(changes: dict, message: str):
  values = bpe()
  for key, value in changes.items():
    if value is None:
      del values[f"tokenizer.ggml.{key}"]
    else:
      values[f"tokenizer.ggml.{key}"] = value
  with pytest.raises(ValueError, match=message):
    spec_from_gguf(values)


def test_scores_must_match():
  with pytest.raises(ValueError, match="scores has 1 entries"):
    spec_from_gguf(spm(scores=[1.0]))
  with pytest.raises(ValueError, match="scores is missing"):
    spec_from_gguf(spm(scores=None))


def test_what_is_not_supported_is_named():
  with pytest.raises(NotImplementedError, match="'whitespace'"):
    spec_from_gguf(bpe(pre="whitespace"))
  with pytest.raises(NotImplementedError, match="'bert'"):
    spec_from_gguf(bpe(model="bert"))


def test_the_template_is_a_string():
  with pytest.raises(ValueError, match="chat_template is a list"):
    spec_from_gguf(bpe() | {"tokenizer.chat_template": ["a"]})


@pytest.mark.parametrize(
  ("name", "stops"),
  [
    ("gpt-2", {"<|endoftext|>"}),
    ("llama-bpe", {"<|end_of_text|>", "<|eot_id|>"}),
    ("llama-spm", {"</s>"}),
    # llama.cpp also stops at "</s>", a piece of ordinary text in this vocabulary.
    ("qwen2", {"<|endoftext|>", "<|im_end|>"}),
    ("gemma-4", {"<eos>", "<turn|>", "<|tool_response>"}),
  ],
)
def test_stops_of_real_files(name: str, stops: set[str]):
  spec = vocab.real(name).spec
  assert {spec.tokens[i] for i in spec.stop_ids} == stops
