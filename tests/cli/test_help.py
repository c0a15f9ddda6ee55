"""The list of verbs and the help of each, as a terminal of 80 columns shows them."""

import dataclasses
import itertools
import os
import subprocess
import sys

import pytest
from tyro._docstrings import get_field_docstring

from neurojax.cli import main
from neurojax.cli.parse import description, verb_class
from neurojax.cli.verbs import VERBS

WIDTH = 80


@pytest.fixture(autouse=True)
def of_80_columns(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setenv("COLUMNS", str(WIDTH))


def shown(capsys, *argv: str) -> str:
  try:
    assert main(argv) == 0
  except SystemExit as error:
    assert error.code == 0
  return capsys.readouterr().out


def refused(capsys, *argv: str) -> str:
  try:
    assert main(argv) == 2
  except SystemExit as error:
    assert error.code == 2
  out, err = capsys.readouterr()
  assert out == "" and "Traceback" not in err
  return err


@pytest.mark.parametrize("argv", [[], ["--help"], ["--version"], ["eval", "--help"]])
def test_the_list_of_verbs_imports_neither_jax_nor_what_parses_options(argv: list[str]):
  script = (
    "import sys\nfrom neurojax.cli import main\n"
    f"assert main({argv}) == 0\n"
    "assert not {'jax', 'numpy', 'tyro', 'rich'} & set(sys.modules)\n"
  )
  subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_no_help_imports_jax():
  script = (
    "import contextlib, sys\nfrom neurojax.cli import main\nfrom neurojax.cli.verbs import VERBS\n"
    "for name in VERBS:\n"
    "  with contextlib.suppress(SystemExit):\n"
    "    main([*name.split(), '--help'])\n"
    "assert 'jax' not in sys.modules\n"
  )
  subprocess.run([sys.executable, "-c", script], check=True, timeout=120, stdout=subprocess.DEVNULL)


def test_the_list_of_verbs_has_all_of_them(capsys):
  text = shown(capsys)
  assert all(f"  {name} " in text for name in VERBS)
  assert max(map(len, text.splitlines())) <= WIDTH


@pytest.mark.parametrize("verb", VERBS)
def test_help_begins_with_what_must_be_given_and_is_wrapped_once(capsys, verb: str):
  text = shown(capsys, *verb.split(), "--help")
  lines = text.splitlines()
  assert lines[0].startswith(f"usage: neurojax {verb} [-h]")
  assert max(map(len, lines)) <= WIDTH
  # What is captured has no boxes, else "│" would stand at both ends.
  rows = [line.strip("│")[1:] for line in lines]
  options = [row.split()[0].strip(",") for row in rows if row.startswith("--") and row[2] != "-"]
  required = {
    f"--{field.name.replace('_', '-')}"
    for field in dataclasses.fields(verb_class(verb))
    if field.default is dataclasses.MISSING
  } & set(options)
  assert set(options[: len(required)]) == required
  assert "{None}" not in text and "[..." not in text and "(default: None)" not in text
  for row, after in itertools.pairwise(rows):
    if row.startswith(" " * 10) and after.startswith(" " * 10) and after.strip():
      room = WIDTH - 4 - len(row.rstrip())
      assert len(after.split()[0]) >= room, f"torn before its end: {row}"


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_has_a_text(verb: str):
  for field in dataclasses.fields(verb_class(verb)):
    if field.name != "overrides":
      text = get_field_docstring(verb_class(verb), field.name, ())
      assert text, f"neurojax {verb}: --{field.name} has no text"
      assert not text.startswith(("Of ", "As in", "What ", "Those ")), text


def test_examples_stay_commands():
  text = 'Does it.\n\n  Long.\n\n  Example: neurojax a --b "c d" --e f\n  Example: neurojax g'
  assert description(text, 30) == (
    'Does it.\n\nLong.\n\nExample: neurojax a \\\n    --b "c d" --e f\nExample: neurojax g'
  )


@pytest.mark.parametrize(
  ("argv", "named"),
  [
    ("genrate", "generate"),
    ("evl", "eval ppl"),
    ("eval gold", "eval golden"),
    ("bench gem", "bench gemm"),
    ("download", "pull"),
    ("perplexity", "eval ppl"),
    ("eval", "eval ppl, eval golden or eval logits"),
    ("xyzzy", "lists the verbs"),
  ],
)
def test_a_wrong_verb_is_answered_with_the_nearest(capsys, argv: str, named: str):
  err = refused(capsys, *argv.split())
  assert named in err and err.count("\n") == 1


def test_a_wrong_option_is_answered_with_options_of_its_verb(capsys):
  err = refused(capsys, "generate", "--model", "a", "--temprature", "1")
  err = " ".join(err.replace("│", " ").split())
  assert "Perhaps you meant: --temperature" in err and "chat" not in err
  err = refused(capsys, "eval", "ppl", "--model", "a", "--text", "b", "--goldn", "c")
  assert "golden" not in err


@pytest.mark.parametrize(
  ("argv", "choices"),
  [
    (
      "generate --model a --prompt b --weights no",
      "('dense', 'int8', 'w2a16', 'w2a8', 'stored', 'auto')",
    ),
    (
      "export --workdir a --out b --type no",
      "('TQ2_0', 'TQ1_0', 'Q2_0', 'Q2_0_g128', 'F32', 'F16', 'BF16')",
    ),
  ],
)
def test_choices_are_listed_in_order_and_without_none(capsys, argv: str, choices: str):
  err = " ".join(refused(capsys, *argv.split()).replace("│", " ").split())
  assert f"Expected one of {choices}" in err


def test_help_in_an_encoding_without_boxes():
  ran = subprocess.run(
    [sys.executable, "-m", "neurojax", "tokenize", "--help"],
    env=os.environ | {"PYTHONIOENCODING": "ascii"},
    capture_output=True,
    check=True,
    timeout=60,
  )
  assert ran.stdout.isascii() and b"\\u" not in ran.stdout and b"--model" in ran.stdout
