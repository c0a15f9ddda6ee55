"""`neurojax tokenize`: ids of a file's exact text, from every kind of model argument."""

import io
import json
import sys
from pathlib import Path

import pytest

from neurojax.cli import main
from neurojax.cli.tokenize import Tokenize
from neurojax.tokenizer import Tokenizer
from neurojax.tokenizer.write.tokenizer_json import json_from_spec
from tests import tinymodel
from tests.tokenizer import vocab

TEXT = "the <s>\r\n  the<turn> \u00e9\U0001f999\x00"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
  folder = tmp_path_factory.mktemp("tokenize")
  (folder / "tokenizer.json").write_text(json_from_spec(vocab.tiny_bpe()))
  (folder / "text").write_bytes(TEXT.encode())
  return folder


def ids(capsys, *argv: object) -> list[int]:
  assert main(["tokenize", *map(str, argv), "--json"]) == 0
  return json.loads(capsys.readouterr().out)


def test_ids_of_the_exact_text(capsys, folder: Path):
  ours = Tokenizer(vocab.tiny_bpe())
  for model in (folder, folder / "tokenizer.json"):
    asked = ("--model", model, "--file", folder / "text")
    assert ids(capsys, *asked) == ours.encode(TEXT)
    assert ids(capsys, *asked, "--special") == ours.encode(TEXT, add_special=True)
    parsed = ours.encode(TEXT, parse_special=True)
    assert ids(capsys, *asked, "--parse-special") == parsed != ours.encode(TEXT)


def test_a_gguf_and_standard_input(capsys, folder: Path, monkeypatch: pytest.MonkeyPatch):
  model = tinymodel.write(folder / "tiny.gguf")
  plain = ids(capsys, "--model", model, "--file", folder / "text")
  assert plain and ids(capsys, "--model", model, "--file", folder / "text", "--special") != plain
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
  assert ids(capsys, "--model", model, "--file", "-") == plain


def test_the_table_and_the_errors(capsys, folder: Path):
  assert main(["tokenize", "--model", str(folder), "--file", str(folder / "text")]) == 0
  lines = capsys.readouterr().out.splitlines()
  count = len(Tokenizer(vocab.tiny_bpe()).encode(TEXT))
  assert lines[-1] == f"{count} tokens" and len(lines) == count + 2
  assert '"the"' in lines[1] and all(line.isprintable() for line in lines)
  (folder / "bad").write_bytes(b"abc\xffd")
  (folder / "empty").mkdir()
  (folder / "empty" / "config.json").write_text("{}")
  for argv, words in (
    (("--model", folder, "--file", folder / "bad"), "not UTF-8 at byte 3"),
    (("--model", folder / "empty", "--file", folder / "text"), "has no tokenizer"),
    (("--model", folder / "none", "--file", folder / "text"), "none"),
    (("--model", folder, "--file", folder / "none"), "none"),
  ):
    assert main(["tokenize", *map(str, argv)]) == 2
    assert words in capsys.readouterr().err


def test_no_jax(folder: Path):
  import subprocess

  code = (
    "import sys; from neurojax.cli import main; "
    f"assert main(['tokenize', '--model', {str(folder)!r}, '--file', {str(folder / 'text')!r}]) == 0; "
    "assert 'jax' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
  assert Tokenize.__doc__
