"""`neurojax eval logits`: what it writes, over one stage and more, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest

from neurojax.cli import main
from tests.golden.families import recipe


def run(capsys, *argv: str) -> tuple[int, str]:
  code = main(("eval", "logits", *argv))
  return code, capsys.readouterr().err


def test_stages_and_steps_give_the_logits_of_transformers(capsys, tmp_path: Path):
  model = str(recipe.write_folder(tmp_path / "gemma3", "gemma3"))
  ids, wanted = tmp_path / "ids.json", np.load(recipe.HERE / "gemma3.npy")
  ids.write_text(json.dumps(recipe.tokens(96).tolist()))
  found = {}
  for stages in ("1", "2"):
    out = tmp_path / f"{stages}.npy"
    code, err = run(
      capsys, "--model", model, "--tokens", str(ids), "--out", str(out), "--decode-from", "100",
      "--stages", stages,
    )  # fmt: skip
    assert code == 0, err
    found[stages] = np.load(out)
    assert found[stages].dtype == np.float32 and found[stages].shape == wanted.shape
  np.testing.assert_array_equal(found["1"], found["2"])
  np.testing.assert_allclose(found["1"], wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize(("text", "options", "part"), [
  ("[1, 96]", (), "entry 1 is 96, outside the vocabulary of 96"),
  ("[-1]", (), "entry 0 is -1, outside"),
  ("[1, 2.5]", (), "entry 1 is 2.5: ids are integers"),
  ("[true]", (), "entry 0 is True"),
  ("[]", (), "a list of token ids is expected"),
  ('{"tokens": [1]}', (), "a list of token ids is expected"),
  ("[1, 2", (), "not JSON"),
  ("[1, 2]", ("--decode-from", "3"), "--decode-from 3: there are 2 tokens"),
  ("[1, 2]", ("--stages", "4"), "--stages 4: the model has 3 layers"),
  ("[1, 2]", ("--out", "/nowhere/x.npy"), "there is no folder /nowhere"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(capsys, tmp_path: Path, text: str, options, part: str):
  model = str(recipe.write_folder(tmp_path / "m", "tinyllama"))
  ids, out = tmp_path / "ids.json", tmp_path / "x.npy"
  ids.write_text(text)
  code, err = run(capsys, "--model", model, "--tokens", str(ids), "--out", str(out), *options)
  assert code == 2 and part in " ".join(err.split()), err
  assert not out.exists()


def test_the_file_has_exactly_the_name_that_was_given_and_replaces_none_unasked(
  capsys, tmp_path: Path
):
  model = str(recipe.write_folder(tmp_path / "m", "tinyllama"))
  ids, out = tmp_path / "ids.json", tmp_path / "logits"
  ids.write_text("[1, 2, 3]")
  arguments = ("--model", model, "--tokens", str(ids), "--out", str(out))
  out.write_text("mine")
  code, err = run(capsys, *arguments)
  assert code == 2 and "exists: name another file, or give --overwrite" in " ".join(err.split())
  assert out.read_text() == "mine"
  assert run(capsys, *arguments, "--overwrite")[0] == 0
  assert np.load(out).shape == (3, 96) and not (tmp_path / "logits.npy").exists()


def test_options_are_looked_at_before_the_model(capsys, tmp_path: Path):
  nowhere = ("--model", str(tmp_path / "no-such-model"))
  ids = tmp_path / "ids.json"
  ids.write_text("[1, 2]")
  out = str(tmp_path / "x.npy")
  for arguments, part in (
    (("logits", "--tokens", str(tmp_path / "none.json"), "--out", out), "none.json"),
    (("logits", "--tokens", str(ids), "--out", "/nowhere/x"), "there is no folder /nowhere"),
    (("logits", "--tokens", str(ids), "--out", out, "--decode-from", "3"), "--decode-from 3"),
    (("ppl", "--text", str(ids), "--ctx", "3"), "ctx = 3"),
    (("ppl", "--text", str(ids), "--ctx", "8", "--context", "4"), "--ctx 8"),
    (("ppl", "--text", str(tmp_path / "none.txt")), "none.txt"),
    (("golden", "--golden", str(tmp_path / "none.json")), "none.json"),
    (("golden", "--golden", str(ids), "--make"), "ids.json exists"),
    (("golden", "--golden", str(ids), "--overwrite"), "give --make too"),
    (("golden", "--golden", out, "--make", "--max-tokens", "0"), "--max-tokens 0"),
    (("golden", "--golden", out, "--make", "--prompts", str(tmp_path / "no.txt")), "no.txt"),
  ):
    assert main(("eval", *arguments, *nowhere)) in (1, 2), arguments
    assert part in "".join(capsys.readouterr().err.split("\n")), arguments


def test_a_golden_file_is_made_and_agreed_with(capsys, tmp_path: Path, tiny_path: Path):
  golden, prompts = tmp_path / "golden.json", tmp_path / "prompts.txt"
  prompts.write_text("the cat\na\n")
  arguments = ("eval", "golden", "--model", str(tiny_path), "--golden", str(golden), "--json")
  assert main((*arguments, "--make", "--prompts", str(prompts), "--max-tokens", "5")) == 0
  assert json.loads(capsys.readouterr().out)["cases"] == 2
  assert main(arguments) == 0
  assert json.loads(capsys.readouterr().out)["passed"] == 2
  table = json.loads(golden.read_text())
  table["sha256"] = "0" * 64
  golden.write_text(json.dumps(table))
  assert main(arguments) == 2
