"""Examples of every verb's help: all of them parse, and those that need no other machine run."""

import json
import lzma
import re
import shlex
import shutil
from pathlib import Path

import pytest

from neurojax.cli import main
from neurojax.cli.parse import parse, verb_class
from neurojax.cli.verbs import VERBS, split
from neurojax.config import architectures
from neurojax.files.find import model_path

pytestmark = pytest.mark.optimized

ROOT = Path(__file__).parents[2]
TEXT = "The sea was calm, and the ship lay in the harbour while the men slept. "
ELSEWHERE = {
  "stage": "it serves until it is ended: tests/pipeline",
  "serve": "it serves until it is ended: tests/serve",
  "probe": "its peers are other machines: tests/measure",
  "pull": "it downloads: tests/files/test_hub.py does so from loopback",
  "chat": "smollm2 does not come along: tests/test_real_models.py",
  "bench gemm": "an 8B model's products take minutes on a CPU: tests/kernels/gemm/test_bench.py",
  "bench attention": "an 8B model's heads are for a GPU: tests/kernels/attention/test_bench.py",
  "bench train": "a model of 350 million parameters takes a GPU: tests/train",
}
"""Verbs whose examples only parse here, with the reason and where they run."""
FEWER = {
  "train": [
    "--steps",
    "3",
    "--optimizer.warmup-steps",
    "1",
    "--eval-batches",
    "1",
    "--layout.data",
    "8",
  ],
  "bench int8": ["--turns", "1"],
  "bench engine": ["--answer", "8", "--requests", "4"],
}
"""Options that are added to the examples of a verb, to end in seconds on the 8 fake devices."""
TRAINING = ("data prepare", "data check", "train", "export")
"""Verbs whose examples run in this order, each with what those before it made."""


def examples(verb: str) -> list[str]:
  text = verb_class(verb).__doc__ or ""
  return [" ".join(found.split()) for found in re.findall(r"^ *Example: (.*)$", text, re.MULTILINE)]


EVERY = [(verb, example) for verb in VERBS for example in examples(verb)]


def arguments(example: str) -> list[str]:
  """Words after `neurojax`; what a pipe brings and what another command prints are left out."""
  words = shlex.split(example.rpartition(" | ")[2])
  assert words[0] == "neurojax", example
  return words[1:]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  """A folder that has the files that examples name."""
  for name in ("README.md", "configs"):
    (tmp_path / name).symlink_to(ROOT / name)
  shutil.copy(model_path("neurollm"), tmp_path / "model.gguf")
  fleet = (ROOT / "configs" / "fleet" / "lab.toml").read_text(encoding="utf-8")
  assert '"rack"' in fleet
  (tmp_path / "fleet.toml").write_text(fleet.replace('"rack"', '"b"'), encoding="utf-8")
  (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
  (tmp_path / "ids.json").write_text(json.dumps(list(range(10, 74))))
  documents = [TEXT * 20 + f"Day {day}. " * 10 for day in range(400)]
  with lzma.open(tmp_path / "books.txt.xz", "wt") as books:
    books.write("<|endofbook|>\n".join(documents))
  rows = (json.dumps({"text": document}) for document in documents)
  (tmp_path / "stories.jsonl").write_text("\n".join(rows), encoding="utf-8")
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_an_example_of_itself(verb: str):
  assert any(arguments(example)[: len(verb.split())] == verb.split() for example in examples(verb))
  assert not set(ELSEWHERE) - set(VERBS)


@pytest.mark.parametrize(("verb", "example"), EVERY, ids=lambda value: value)
def test_every_example_parses(folder: Path, verb: str, example: str):
  name, options = split(arguments(example))
  given = parse(name, options)
  architecture = getattr(given, "arch", None)
  assert architecture is None or architecture in architectures()


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in (*ELSEWHERE, *TRAINING)])
def test_the_examples_of_a_verb_run_in_their_order(capsys, folder: Path, verb: str):
  ran = 0
  for example in examples(verb):
    # Random weights of 8B are for a GPU.
    if not ("--random" in example or ("bonsai-8b" in example and "bench" in verb)):
      _run(capsys, verb, example)
      ran += 1
  assert ran


def test_the_examples_of_training_run_in_their_order(capsys, folder: Path):
  ran = set()
  for verb in TRAINING:
    for example in examples(verb):
      _run(capsys, verb, example)
      ran.add(verb)
  assert ran == set(TRAINING) and (folder / "tiny.gguf").exists()


def _run(capsys, verb: str, example: str) -> None:
  code = main([*arguments(example), *FEWER.get(verb, [])])
  out, err = capsys.readouterr()
  assert code == 0, f"{example}\n{err}"
  assert out
