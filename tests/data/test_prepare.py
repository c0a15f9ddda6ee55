"""Prepared data: what went in comes out, whole or not at all."""

import dataclasses
import io
import json
import lzma
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from neurojax.cli import main
from neurojax.data.prepare import Preparation, partial_folder, prepare
from neurojax.data.token_shards import META, SPEC, Tokens, check_digests, read_meta, read_spec
from neurojax.data.vocabulary import read_vocabulary
from neurojax.tokenizer import Tokenizer
from neurojax.tokenizer.pretokenizers import PRE_TOKENIZERS
from neurojax.tokenizer.spec_json import dump_spec, parse_spec
from neurojax.tokenizer.vocabulary_training import END_OF_TEXT, train_bpe
from tests import tinymodel

HOSTILE = [
  "plain words and words and words",
  f"text that spells {END_OF_TEXT} is text",
  "\0\x01\x7f\ufeff\ufffd\ufdd0",
  " leading, trailing and  double   spaces \n\n\n tabs\t\t \r\n",
  "e\u0301 é 漢字仮名 한국어 עברית العربية ไทย 𝄞 👩‍👩‍👧 \u202e rtl",
  "1234567890 3.14 1,000,000 ²³ Ⅷ",
  "it's IT'S we'll 'Sam ſ",
  "a" * 3000,
  "x " * 1500,
  "\n" * 50,
]


def write(path: Path, documents: list[str]) -> Path:
  path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
  return path


def documents_of(folder: Path, split: str) -> list[str]:
  spec, tokens = read_spec(folder), Tokens(folder, split)
  tokenizer = Tokenizer(spec)
  ids = tokens.read(0, len(tokens))
  assert ids[-1] == spec.eos_id
  ends = np.flatnonzero(ids == spec.eos_id)
  return [tokenizer.decode(part[:-1]) for part in np.split(ids, ends[:-1] + 1)]


def prepared(out: Path, **plan) -> Path:
  with partial_folder(out) as folder:
    prepare(Preparation(**plan), folder)
  return out


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return write(tmp_path_factory.mktemp("corpus") / "hostile.jsonl", HOSTILE * 4)


@pytest.fixture(scope="module")
def data(corpus: Path) -> Path:
  return prepared(corpus.with_name("data"), inputs=(corpus,), vocab_size=400, valid_fraction=0.25)


def test_hostile_text_comes_back(data: Path):
  train, valid = documents_of(data, "train"), documents_of(data, "valid")
  assert sorted(train + valid) == sorted(HOSTILE * 4)
  meta = read_meta(data)
  assert (meta.train.documents, meta.valid.documents) == (len(train), len(valid)) and valid
  assert meta.train_text_bytes == sum(len(d.encode()) for d in train)
  check_digests(data)


def test_the_same_again_is_the_same(data: Path, corpus: Path, tmp_path: Path):
  other = prepared(tmp_path / "o", inputs=(corpus,), vocab_size=400, valid_fraction=0.25)
  assert read_meta(other).identity() == read_meta(data).identity()
  seeded = prepared(tmp_path / "s", inputs=(corpus,), vocab_size=400, valid_fraction=0.25, seed=1)
  assert read_meta(seeded).identity() != read_meta(data).identity()


def test_small_parts_and_batches_change_no_token(
  data: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr("neurojax.data.corpus._PART", 6)
  monkeypatch.setattr("neurojax.data.prepare._BATCH", 300)
  other = prepared(
    tmp_path / "o",
    inputs=(corpus,),
    tokenizer=read_spec(data),
    valid_fraction=0.25,
    shard_tokens=50,
  )
  for split in ("train", "valid"):
    a, b = Tokens(data, split), Tokens(other, split)
    assert len(a) == len(b) and np.array_equal(a.read(0, len(a)), b.read(0, len(b)))


@pytest.fixture(scope="module")
def learnt() -> dict[str, Tokenizer]:
  """A vocabulary for each set of rules that can be learnt with."""
  names = {rules: name for name, rules in PRE_TOKENIZERS.items() if rules.byte_level}
  return {name: Tokenizer(train_bpe(HOSTILE, vocab_size=320, pre=name)) for name in names.values()}


@settings(max_examples=100, deadline=None)
@given(left=st.text(max_size=12), right=st.text(max_size=12), a=st.characters(), b=st.characters())
def test_a_cut_in_front_of_a_space_between_letters_changes_no_token(
  learnt: dict[str, Tokenizer], left: str, right: str, a: str, b: str
):
  a, b = (c if c.isalpha() else "x" for c in (a, b))
  for name, tokenizer in learnt.items():
    if name in ("superbpe", "exaone-moe"):
      assert not tokenizer.cuts_at_spaces
      continue
    assert tokenizer.cuts_at_spaces
    parts = tokenizer.encode_many([left + a, " " + b + right])
    assert tokenizer.encode(left + a + " " + b + right) == parts[0] + parts[1], name


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_a_learnt_vocabulary_spells_any_text(learnt: dict[str, Tokenizer], wanted: str):
  for tokenizer in learnt.values():
    assert tokenizer.decode(tokenizer.encode(wanted)) == wanted
    assert tokenizer.spec.eos_id not in tokenizer.encode(wanted + END_OF_TEXT)


def test_a_vocabulary_is_learnt_to_its_size_and_says_what_cannot_be():
  spec = train_bpe(["the cat sat on the mat, the cat sat"] * 3, vocab_size=265)
  assert len(spec.tokens) == 265 and len(spec.merges) == 8 and spec.tokens[0] == END_OF_TEXT
  assert spec == train_bpe(["the cat sat on the mat, the cat sat"] * 3, vocab_size=265)
  with pytest.raises(ValueError, match="vocab_size = 257"):
    train_bpe(["text"], vocab_size=257)
  with pytest.raises(ValueError, match="no two bytes"):
    train_bpe(["a", "b"], vocab_size=300)
  with pytest.raises(NotImplementedError, match="gemma4"):
    train_bpe(["text"], vocab_size=300, pre="gemma4")


def test_a_stored_vocabulary_is_the_same(data: Path, tmp_path: Path):
  spec = read_spec(data)
  odd = dataclasses.replace(spec, strip_after_ids=frozenset({0}), chat_template="{{ x }}")
  assert parse_spec(dump_spec(odd)) == odd
  # Fields that came later are absent at their defaults: digests of data prepared before still hold.
  later = {"strip_before_ids", "source"}
  assert not later & set(json.loads(dump_spec(spec)))
  stripping = dataclasses.replace(spec, strip_before_ids=frozenset({0}))
  assert parse_spec(dump_spec(stripping)) == stripping != spec
  for damage in ("", "[]", '{"format": "x"}', dump_spec(spec).replace('"bpe"', '"bpx"'),
                 dump_spec(spec).replace('"eos_id": 0', '"eos_id": 9999'),
                 dump_spec(spec).replace('"kind"', '"kid"')):  # fmt: skip
    with pytest.raises(ValueError, match="here"):
      parse_spec(damage, where="here")


def test_a_given_vocabulary_is_taken(data: Path, corpus: Path, tmp_path: Path):
  model = tinymodel.write(tmp_path / "tiny.gguf")
  spm = read_vocabulary(model)
  assert spm.kind == "spm"
  letters = write(tmp_path / "l.jsonl", ["abc def", "jig fad", "𝄞\n "])
  out = prepared(tmp_path / "spm", inputs=(letters,), tokenizer=spm, valid_fraction=0.0)
  assert documents_of(out, "train") == ["abc def", "jig fad", "𝄞\n "]
  assert not (out / "tokenizer.json").exists() and not read_meta(out).valid.documents
  again = read_vocabulary(data)
  assert again == read_spec(data)
  # tokenizer.json does not say what ends a text.
  with pytest.raises(ValueError, match="--eos"):
    read_vocabulary(data / "tokenizer.json")
  other = read_vocabulary(data / "tokenizer.json", eos=END_OF_TEXT)
  assert (other.tokens, other.merges, other.eos_id) == (again.tokens, again.merges, again.eos_id)
  with pytest.raises(ValueError, match="its own end of text"):
    read_vocabulary(model, eos="<x>")


def test_a_tokenizer_json_of_another_kind_is_taken_as_the_library_has_it(tmp_path: Path):
  made = Library(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("ab", -1.0), ("a", -3.0),
                                 ("b", -3.0)], unk_id=0))  # fmt: skip
  made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
  path = tmp_path / "tokenizer.json"
  made.save(str(path))
  with pytest.raises(ValueError, match="--eos"):
    read_vocabulary(path)
  with pytest.raises(ValueError, match="'</end>' is no token"):
    read_vocabulary(path, eos="</end>")
  spec = read_vocabulary(path, eos="</s>")
  assert (spec.kind, spec.tokens[spec.eos_id]) == ("json", "</s>") and spec.eos_id in spec.stop_ids
  text = "ab a b abab"
  source = write(tmp_path / "t.jsonl", [text])
  out = prepared(tmp_path / "out", inputs=(source,), tokenizer=spec, valid_fraction=0.0)
  tokens = Tokens(out, "train")
  assert list(tokens.read(0, len(tokens))) == [*made.encode(text).ids, spec.eos_id]
  assert read_vocabulary(out) == spec
  # What stands beside the file says what ends a text.
  (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
  assert read_vocabulary(path).eos_id == spec.eos_id


def test_held_out_documents_are_those_of_the_files_given(tmp_path: Path):
  train = write(tmp_path / "t.jsonl", [f"train {i}" for i in range(30)])
  valid = write(tmp_path / "v.jsonl", ["valid one", "valid two"])
  out = prepared(tmp_path / "out", inputs=(train,), valid_inputs=(valid,), vocab_size=270)
  assert documents_of(out, "valid") == ["valid one", "valid two"]
  assert len(documents_of(out, "train")) == 30


def test_a_split_without_documents_is_an_error_with_the_remedy(tmp_path: Path):
  one = tmp_path / "one.txt"
  one.write_text("a single document " * 9)
  with pytest.raises(ValueError, match=r"no held-out document.*--valid"):
    prepared(tmp_path / "out", inputs=(one,), vocab_size=260)
  one.write_bytes(b"\xff\n" * 3)
  with pytest.raises(ValueError, match=r"no training document: 0 documents and 3 bad rows.*line 1"):
    prepared(tmp_path / "out", inputs=(one,), vocab_size=260)
  assert list(tmp_path.iterdir()) == [one]


def test_what_exists_is_kept_unless_told_otherwise(tmp_path: Path):
  source = write(tmp_path / "t.jsonl", ["some words"] * 9)
  plan = {"inputs": (source,), "vocab_size": 260, "valid_fraction": 0.3}
  out = prepared(tmp_path / "out", **plan)
  with pytest.raises(ValueError, match="--overwrite"), partial_folder(out):
    pass
  with pytest.raises(RuntimeError), partial_folder(out, overwrite=True):
    raise RuntimeError
  check_digests(out)
  with partial_folder(out, overwrite=True) as folder:
    prepare(Preparation(**plan), folder)
    with pytest.raises(ValueError, match="another process"), partial_folder(out, overwrite=True):
      pass
  check_digests(out)
  mine = tmp_path / "mine"
  mine.mkdir()
  (mine / "thesis.txt").write_text("all of it")
  with pytest.raises(ValueError, match="not prepared data"), partial_folder(mine, overwrite=True):
    pass
  mine.rename(tmp_path / "new.partial")
  with pytest.raises(ValueError, match="in the way"), partial_folder(tmp_path / "new"):
    pass
  assert (tmp_path / "new.partial" / "thesis.txt").read_text() == "all of it"


def test_a_killed_run_leaves_nothing_that_looks_finished(tmp_path: Path):
  source = write(tmp_path / "t.jsonl", [f"document {i} of many words" for i in range(3000)])
  script = f"""
import os, signal
from pathlib import Path
from neurojax.data import prepare as p
write = p.write_synced
def killing(path, text):
  if path.name == {META!r}:
    os.kill(os.getpid(), signal.SIGKILL)
  write(path, text)
p.write_synced = killing
with p.partial_folder(Path({str(tmp_path / "out")!r})) as folder:
  p.prepare(p.Preparation(inputs=(Path({str(source)!r}),), vocab_size=300), folder)
"""
  done = subprocess.run([sys.executable, "-c", script], capture_output=True)
  assert done.returncode == -signal.SIGKILL, done.stderr
  assert not (tmp_path / "out").exists()
  left = tmp_path / "out.partial"
  assert (left / "train-00000.bin").stat().st_size and not (left / META).exists()
  prepared(tmp_path / "out", inputs=(source,), vocab_size=300)
  assert not left.exists() and (tmp_path / "out" / SPEC).exists()
  check_digests(tmp_path / "out")


def run(capsys, *argv: str) -> tuple[int, str, str]:
  try:
    code = main(["data", *argv])
  except SystemExit as error:
    code = int(error.code or 0)
  out, err = capsys.readouterr()
  return code, out, err


def test_the_command_line(capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  source = tmp_path / "books.txt"
  source.write_bytes(b"###".join([b"one book of words\n"] * 30) + b"\xff\n")
  options = ("--document-separator", "###", "--vocab-size", "270", "--valid-fraction", "0.2")
  out = str(tmp_path / "out")
  code, said, err = run(capsys, "prepare", str(source), "--out", out, *options)
  assert code == 0, err
  assert "1 of 31 rows were bad" in said and "books.txt, line 31: not UTF-8" in said
  assert run(capsys, "check", out)[0] == 0
  # A pipe is another name for the same text.
  pipe = io.TextIOWrapper(io.BytesIO(source.read_bytes()))
  monkeypatch.setattr(sys, "stdin", pipe)
  piped = str(tmp_path / "piped")
  code, said, err = run(capsys, "prepare", "-", "--out", piped, *options, "--json")
  assert code == 0, err
  assert json.loads(said)["sources"][0]["file"] == "standard input"
  assert read_meta(out).identity() == read_meta(piped).identity()
  assert not (Path(piped) / "stdin").exists()
  for wrong, named in {
    (str(tmp_path / "none"), "--out", "x"): "no such file",
    (str(source), "--out", out): "--overwrite",
    (str(source), "--out", "x", "--vocab-size", "3"): "vocab_size = 3",
    (str(source), "--out", "x", "--pre-tokenizer", "mine"): "'mine' is not known",
    (str(source), "--out", "x", "--valid-fraction", "1"): "below 1",
    (str(source), "--out", "x", "--valid", str(source)): "both for training and held out",
    (str(source), "--out", "x", "--eos", "</s>"): "--eos goes with --tokenizer",
    (str(source), "--out", "x", "--tokenizer", str(source)): "unknown format",
    ("-", "-", "--out", "x"): "named twice",
  }.items():
    code, _, err = run(capsys, "prepare", *wrong)
    assert code == 2 and named in err, err
  assert not Path("x").exists() and not Path("x.partial").exists()


@pytest.mark.parametrize("vocab", ["spm", "unigram"])
def test_a_sentencepiece_vocabulary_is_learnt(capsys, tmp_path: Path, vocab: str):
  source = write(tmp_path / "t.jsonl", [f"document {i} of many words" for i in range(300)])
  options = (str(source), "--vocab", vocab, "--vocab-size", "300", "--valid-fraction", "0.1")
  outs = [tmp_path / name for name in ("one", "two")]
  for out in outs:
    code, _, err = run(capsys, "prepare", *options, "--out", str(out))
    assert code == 0 and ("GGUF file cannot hold a unigram" in err) == (vocab == "unigram"), err
  assert read_meta(outs[0]).identity() == read_meta(outs[1]).identity()
  spec = read_spec(outs[0])
  assert spec.kind == {"spm": "spm"}.get(vocab, "sentencepiece")
  found = documents_of(outs[0], "train") + documents_of(outs[0], "valid")
  assert sorted(found) == sorted(f"document {i} of many words" for i in range(300))
  theirs = sentencepiece.SentencePieceProcessor(model_file=str(outs[0] / "tokenizer.model"))
  for text in HOSTILE:
    assert Tokenizer(spec).encode(text) == theirs.encode(text)
  # The file beside the data is a vocabulary to take, as the folder is.
  again = read_vocabulary(outs[0] / "tokenizer.model")
  assert (again.tokens, again.eos_id) == (spec.tokens, spec.eos_id)
  assert read_vocabulary(outs[0]) == spec
  code, _, err = run(capsys, "prepare", *options, "--out", "x", "--pre-tokenizer", "qwen2")
  assert code == 2 and "--pre-tokenizer goes with --vocab bpe" in err


def test_mostly_bad_rows_and_a_small_vocabulary_are_said_in_a_line(capsys, tmp_path: Path):
  source = tmp_path / "t.jsonl"
  source.write_text("{\n" * 297 + '{"text": "the cat sat"}\n' * 3)
  options = (str(source), "--valid-fraction", "0")
  for json_too in ((), ("--json",)):
    out = str(tmp_path / f"out{len(json_too)}")
    code, _, err = run(capsys, "prepare", *options, "--out", out, *json_too)
    assert code == 0
    bad, small = (line for line in err.splitlines() if line.startswith("neurojax: warning"))
    assert "297 of 300 rows (99.0%) were bad and left out, first" in bad
    assert bad.count(", line ") == 3 and "line 1: not JSON" in bad
    size = read_meta(out).vocab_size
    assert f"the vocabulary has {size} tokens where 8,192 were asked for" in small
  source.write_text("{\n" + '{"text": "the cat sat"}\n' * 3)
  code, _, err = run(
    capsys, "prepare", *options, "--out", str(tmp_path / "o"), "--vocab-size", "258"
  )
  assert code == 0 and "warning" not in err
  source.write_text("{\n" * 9)
  code, _, err = run(capsys, "prepare", *options, "--out", str(tmp_path / "none"))
  assert code == 2 and "0 documents and 9 bad rows in all, the first" in err


def test_a_pipe_without_an_end_and_a_document_too_long_are_refused(
  capsys, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  with open("/dev/zero", "rb") as zeros:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(zeros))
    code, _, err = run(capsys, "prepare", "-", "--out", str(tmp_path / "out"))
    assert code == 2 and "standard input: many of its bytes are NUL" in err
  # A short archive has many too.
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lzma.compress(b"the cat sat"))))
  options = ("--tokenizer", str(data), "--valid-fraction", "0")
  assert run(capsys, "prepare", "-", "--out", str(tmp_path / "xz"), *options)[0] == 0
  monkeypatch.setattr("neurojax.data.corpus._LONGEST_DOCUMENT", 50)
  long = tmp_path / "long.txt"
  long.write_text("words and " * 9)
  for vocab, refused in (("spm", True), ("bpe", False)):
    options = ("--vocab", vocab, "--vocab-size", "270", "--valid-fraction", "0")
    code, _, err = run(capsys, "prepare", str(long), "--out", str(tmp_path / vocab), *options)
    assert (code == 2 and "a document of more than 50 characters" in err) == refused, err


def test_a_tokenizer_json_of_the_vocabulary_gives_the_same_ids(data: Path):
  import tokenizers

  ours, theirs = (
    Tokenizer(read_spec(data)),
    tokenizers.Tokenizer.from_file(str(data / "tokenizer.json")),
  )
  for document in HOSTILE:
    if END_OF_TEXT not in document:
      assert theirs.encode(document, add_special_tokens=False).ids == ours.encode(document)
