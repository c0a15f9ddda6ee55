"""Tokenizers of folders: tokenizer.json as its library runs it, tokenizer.model as SentencePiece does."""

import base64
import dataclasses
import json
import random
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from neurojax.tokenizer import Tokenizer, spec_from_gguf
from neurojax.tokenizer.pretokenizers import PRE_TOKENIZERS
from neurojax.tokenizer.read.folder import spec_from_file, spec_from_folder
from neurojax.tokenizer.read.tokenizer_json import spec_from_library
from neurojax.tokenizer.read.tokenizer_model import spec_from_sentencepiece
from neurojax.tokenizer.spec_json import dump_spec, parse_spec
from neurojax.tokenizer.write.gguf import gguf_from_spec
from neurojax.tokenizer.write.gguf_terms import in_gguf_terms
from neurojax.tokenizer.write.tokenizer_json import json_from_spec

PIECES = json.loads((Path(__file__).parent / "golden" / "sentencepiece.json").read_text())
SPACE = "\u2581"
CORPUS = [
  "the cat and the thing in the hat, 1234 times; I'm here, you're there\n\n<b>the</b>",
  "camelCase HTMLParser été naïve 你好 世界 🦙 the the then  than   thin",
] * 6
BITS = (
  "the", " ", "  ", "\n", "\n\n", "é", "e\u0301", "\ufb01", "你好", "🦙", "\u200d", "it's", "1234", "\t", "\r\n",
  "\u2581", "<s>", "</s>", "<unk>", "<|end|>", "<tool>", "<", "|>", "<0x41>", "\u05d0", "\u00a0", "\x00", "\ufdd0",
)  # fmt: skip
SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>"]


def hostile(count: int, seed: int = 1) -> list[str]:
  draw = random.Random(seed)
  return ["".join(draw.choice(BITS) for _ in range(draw.randrange(30))) for _ in range(count)]


def byte_level(pre: str, normalizer=None) -> tokenizers.Tokenizer:
  made = tokenizers.Tokenizer(models.BPE(ignore_merges=PRE_TOKENIZERS[pre].whole_words))
  made.normalizer = normalizer
  splits = [
    pre_tokenizers.Split(tokenizers.Regex(p), "isolated") for p in PRE_TOKENIZERS[pre].patterns
  ]
  made.pre_tokenizer = pre_tokenizers.Sequence(
    [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
  )
  made.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
    vocab_size=340,
    special_tokens=SPECIAL[1:],
    initial_alphabet=sorted(alphabet),
    show_progress=False,
  )
  made.train_from_iterator(CORPUS, trainer)
  made.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
  return made


def on_text(kind: str) -> tokenizers.Tokenizer:
  """As Llama's ("prepend"), its later ones' ("first", "always") and Gemma's files."""
  spelled = [line.replace(" ", SPACE) for line in CORPUS]
  learner = tokenizers.Tokenizer(models.BPE())
  learner.train_from_iterator(
    spelled, trainers.BpeTrainer(vocab_size=110, show_progress=False, limit_alphabet=60)
  )
  learnt = json.loads(learner.to_str())["model"]
  tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(learnt["vocab"])]
  # Every pair that makes a piece merges, pieces in a row: as made from a SentencePiece model.
  vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
  pieces = dict.fromkeys("".join(merge) for merge in learnt["merges"])
  known = set(learnt["vocab"])
  merges = [
    (piece[:cut], piece[cut:])
    for piece in pieces
    for cut in range(1, len(piece))
    if piece[:cut] in known and piece[cut:] in known
  ]
  made = tokenizers.Tokenizer(
    models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
  )
  replace = normalizers.Replace(" ", SPACE)
  undo = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
  if kind == "gemma":
    made.normalizer = replace
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
  else:
    undo.append(decoders.Strip(" ", 1, 0))
    if kind == "prepend":
      made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
    else:
      made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
  made.decoder = decoders.Sequence(undo)
  made.add_special_tokens(SPECIAL)
  made.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
  made.post_processor = processors.TemplateProcessing(
    single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
  )
  return made


MAKERS = {
  "llama-bpe": lambda: byte_level("llama-bpe"),
  "qwen2": lambda: byte_level("qwen2", normalizers.NFC()),
  "tekken": lambda: byte_level("tekken"),
  **{kind: lambda kind=kind: on_text(kind) for kind in ("prepend", "first", "always", "gemma")},
}


@pytest.fixture(scope="module")
def made() -> dict[str, tokenizers.Tokenizer]:
  return {name: make() for name, make in MAKERS.items()}


def save(folder: Path, fast: tokenizers.Tokenizer, **config: object) -> Path:
  folder.mkdir(parents=True, exist_ok=True)
  fast.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return folder


@pytest.mark.parametrize("name", MAKERS)
def test_ids_and_texts_are_the_librarys(name: str, made: dict, tmp_path: Path):
  fast = made[name]
  ours = Tokenizer(spec_from_folder(save(tmp_path, fast, eos_token="</s>")))
  for text in hostile(120):
    ids = fast.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, parse_special=True) == ids
    assert ours.encode(text, parse_special=True, add_special=True) == fast.encode(text).ids
    if "\ufffd" not in (theirs := fast.decode(ids, skip_special_tokens=False)):
      assert ours.decode(ids, special=True) == theirs
      assert ours.decode(ids) == fast.decode(ids)
    stream = ours.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == ours.decode(ids)


@pytest.mark.parametrize("name", MAKERS)
def test_no_text_spells_a_special_token(name: str, made: dict):
  ours = Tokenizer(spec_from_library(made[name].to_str(), {"eos_token": "</s>"}))
  special = {i for i, kind in enumerate(ours.spec.types) if kind in ("control", "unknown")}
  assert len(special) >= 3
  for text in hostile(60, seed=2):
    ids = ours.encode(text)
    assert not special & set(ids)
    # A guarded text inside a template's: its own special tokens and no others.
    rendered = f"<s>{ours.guard(text)}<|end|>{ours.guard(text)}</s>"
    ids = ours.encode(rendered, parse_special=True, guarded=True)
    assert [ours.spec.tokens[i] for i in ids if i in special] == ["<s>", "<|end|>", "</s>"]
    plain = text.replace("\ufdd0", "")
    if not any(token in plain for token in SPECIAL):
      assert ids == ours.encode(f"<s>{plain}<|end|>{plain}</s>", parse_special=True)
    if name in ("llama-bpe", "tekken"):
      assert ours.decode(ids) == plain * 2


@pytest.mark.parametrize("name", MAKERS)
def test_a_tokenizer_json_becomes_gguf_or_is_refused(name: str, made: dict):
  spec = spec_from_library(made[name].to_str(), {"eos_token": "</s>", "bos_token": "<s>"})
  metaspace = name in ("first", "always")
  size = len(spec.tokens) + 3
  again = spec_from_gguf(gguf_from_spec(spec, size))
  assert again.kind == ("spm" if metaspace or name == "prepend" else "bpe")
  assert len(again.tokens) == size and again.stop_ids >= spec.stop_ids
  ours, theirs = Tokenizer(again), Tokenizer(spec)
  for text in hostile(80, seed=3):
    text = unicodedata.normalize("NFC", text.replace("<tool>", ""))
    # In front of a space these put no other, unlike SentencePiece and llama.cpp.
    text = text.lstrip(" " + SPACE) if metaspace else text
    assert ours.encode(text) == theirs.encode(text), text
  assert json_from_spec(spec) == spec.source
  assert parse_spec(dump_spec(spec)) == spec


def test_gemmas_tokenizer_goes_from_gguf_to_a_folder(made: dict):
  given = in_gguf_terms(spec_from_library(made["gemma"].to_str(), {"eos_token": "</s>"}))
  assert (given.kind, given.pre) == ("bpe", "gemma4")
  text = json_from_spec(given)
  again = spec_from_library(text, {"eos_token": "</s>"})
  assert in_gguf_terms(again) == given
  ours, theirs = Tokenizer(given), tokenizers.Tokenizer.from_str(text)
  for sample in hostile(150, seed=9):
    sample = sample.replace("<tool>", "")
    wanted = theirs.encode(sample, add_special_tokens=False).ids
    assert ours.encode(sample, parse_special=True) == wanted, sample
    assert Tokenizer(again).encode(sample) == ours.encode(sample), sample
  joined = dataclasses.replace(given, merges=(*given.merges, "\n t"))
  with pytest.raises(NotImplementedError, match=r"joins a line and its end"):
    json_from_spec(joined)


def test_long_texts_are_cut_without_a_trace(made: dict, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr("neurojax.tokenizer.encode.long_text._PART", 7)
  monkeypatch.setattr("neurojax.tokenizer.encode.tokenizer_json._LONG", 1)
  text = " ".join(hostile(30)) + " the cat  sat on the été mat " * 4
  for name in ("llama-bpe", "qwen2"):
    for sample in (text, text.replace("<", "")):
      ours = Tokenizer(spec_from_library(made[name].to_str()))
      assert ours.encode(sample, parse_special=True) == made[name].encode(sample).ids
      assert ours.encode_many([sample, "the"]) == [ours.encode(sample), ours.encode("the")]


@pytest.mark.parametrize("name", ["prepend", "first", "always", "gemma"])
def test_long_texts_by_words_have_the_same_ids(
  name: str, made: dict, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr("neurojax.tokenizer.encode.tokenizer_json._LONG", 0)
  ours = Tokenizer(spec_from_library(made[name].to_str()))
  for text in hostile(150, seed=4):
    text = text.replace("<tool>", "thing")
    if not any(token in text for token in SPECIAL):
      assert ours.encode(text) == made[name].encode(text, add_special_tokens=False).ids
  assert ours._json._words


def test_what_the_files_beside_it_say(made: dict, tmp_path: Path):
  fast = made["llama-bpe"]
  folder = save(
    tmp_path,
    fast,
    bos_token={"content": "<s>", "lstrip": False},
    eos_token="</s>",
    add_bos_token=True,  # not asked, as in transformers
    chat_template=[
      {"name": "default", "template": "plain\n{% if true %}\nx{% endif %}\n"},
      {"name": "tool_use", "template": "\ntools {{ tools | length }}\n"},
    ],
  )
  (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2, 99999]}))
  spec = spec_from_folder(folder)
  names = {name: fast.token_to_id(name) for name in SPECIAL[1:]}
  assert (spec.bos_id, spec.eos_id) == (names["<s>"], names["</s>"])
  assert spec.stop_ids == {1, 2, names["</s>"]} and not spec.add_bos and not spec.add_eos
  assert spec.types[fast.token_to_id("<tool>")] == "user"
  assert Tokenizer(spec).encode("the", add_special=True) == fast.encode("the").ids
  from neurojax.tokenizer import ChatTemplate

  template = ChatTemplate(spec.chat_template)
  hello = [{"role": "user", "content": "x"}]
  assert template.render(hello) == "plain\nx"
  assert template.render(hello, tools=[{"a": 1}]) == "\ntools 1"
  (folder / "chat_template.jinja").write_text("from a file")
  assert "from a file" in spec_from_folder(folder).chat_template
  assert spec_from_file(folder / "tokenizer.json") == spec_from_folder(folder)
  assert spec_from_folder(tmp_path / "nothing") is None


@pytest.mark.parametrize("name", PIECES["models"])
def test_sentencepiece_models_give_its_ids(name: str, tmp_path: Path):
  model = PIECES["models"][name]
  data = base64.b64decode(model["model"])
  spec = spec_from_sentencepiece(data)
  assert (spec.bos_id, spec.eos_id, spec.add_bos) == (model["bos"], model["eos"], True)
  ours = Tokenizer(spec)
  for text, ids in zip(PIECES["texts"], model["ids"], strict=True):
    assert ours.encode(text) == ids, text
    if name != "no bytes":
      assert ours.decode(ids) == text.replace(SPACE, " ")
  (tmp_path / "tokenizer.model").write_bytes(data)
  size = len(spec.tokens)
  added = {
    "1": {"content": "<s>", "special": True},
    str(size): {"content": "<new>", "rstrip": True},
  }
  (tmp_path / "tokenizer_config.json").write_text(
    json.dumps({"added_tokens_decoder": added, "add_bos_token": False})
  )
  more = spec_from_folder(tmp_path)
  assert (more.tokens[size], more.types[size], more.add_bos) == ("<new>", "user", False)
  assert Tokenizer(more).encode("<new>  ") == [size]


@pytest.mark.parametrize("name", PIECES["refused"])
def test_other_sentencepiece_models_are_the_librarys(name: str):
  """GGUF has no words for these; tests of what the library makes of texts are in test_sentencepiece."""
  data = base64.b64decode(PIECES["refused"][name])
  spec = spec_from_sentencepiece(data)
  assert spec.kind == "sentencepiece"
  theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
  for text in PIECES["texts"]:
    assert Tokenizer(spec).encode(text) == theirs.encode(text)


def test_damaged_files_are_errors_with_their_names(made: dict, tmp_path: Path):
  draw = random.Random(5)
  data = base64.b64decode(PIECES["models"]["llama"]["model"])
  refused = 0
  for _ in range(300):
    at = draw.randrange(len(data))
    damaged = data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]
    damaged = damaged[: draw.randrange(len(data))] if draw.random() < 0.3 else damaged
    try:
      spec_from_sentencepiece(damaged)
    except (ValueError, NotImplementedError) as error:
      refused += 1
      assert "tokenizer.model" in str(error) or "outside" in str(error) or "scores" in str(error)
  assert 50 < refused < 300
  source = made["prepend"].to_str()
  path = tmp_path / "tokenizer.json"
  refused = 0
  for _ in range(150):
    table = json.loads(source)
    _damage(table, draw)
    path.write_text(json.dumps(table))
    try:
      Tokenizer(spec_from_folder(tmp_path)).encode("the <s> cat", parse_special=True)
    except (ValueError, NotImplementedError):
      refused += 1
  assert refused > 50
  for text in ("", "{", "[]", '{"model": 3}', "[" * 100_000, '{"a":' * 2_000):
    path.write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
      spec_from_folder(tmp_path)
  path.write_bytes(b"\xff")
  with pytest.raises(ValueError, match="not UTF-8 at byte 0"):
    spec_from_folder(tmp_path)


def _damage(value: object, draw: random.Random) -> None:
  """Puts something odd somewhere into a table."""
  odd = (None, -1, 1 << 40, 1.5, "", "\x00", [], {}, True, "BPE", "<s>", [["a"]])
  while True:
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = draw.choice(list(keys))
    inner = value[key]
    if not isinstance(inner, dict | list) or not inner or draw.random() < 0.2:
      if isinstance(value, dict) and draw.random() < 0.3:
        del value[key]
      else:
        value[key] = draw.choice(odd)
      return
    value = inner


GROWING = {
  "type": "Sequence",
  "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}] * 2,
}


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, "WordPiece"),
    ({"decoder": None}, "without a decoder"),
    ({"normalizer": GROWING}, "1000000 times as long"),
    ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}, "Precompiled|not read"),
    ({"post_processor": {"type": "BertProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0]}}, None),
  ],
)
def test_what_is_not_here_is_named(change: dict, words: str | None, made: dict):
  table = json.loads(made["llama-bpe"].to_str()) | change
  if words is None:
    assert spec_from_library(json.dumps(table)).add_eos
    return
  with pytest.raises((NotImplementedError, ValueError), match=words):
    spec_from_library(json.dumps(table))
