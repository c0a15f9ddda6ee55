"""Every file of configs/model and configs/fleet is what the command in its first line writes."""

import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from neurojax.cli import main
from neurojax.config import ModelConfig
from neurojax.scaling import presets

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted([*(CONFIGS / "model").glob("*.toml"), *(CONFIGS / "fleet").glob("*.toml")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_command_of_the_first_line_writes_the_file(path: Path, tmp_path: Path, monkeypatch):
  first, _, _ = path.read_text(encoding="utf-8").partition("\n")
  words = shlex.split(first.removeprefix("# "))
  # In a copy, where the file itself is not there yet.
  shutil.copytree(CONFIGS / "fleet", tmp_path / "configs" / "fleet")
  (tmp_path / "configs" / "model").mkdir()
  made = tmp_path / "configs" / path.parent.name / path.name
  made.unlink(missing_ok=True)
  monkeypatch.chdir(tmp_path)
  if words[0] == "neurojax":
    assert main(words[1:]) == 0
  else:
    assert words[:2] == ["python", "-m"]
    monkeypatch.setattr(sys, "argv", words[2:])
    monkeypatch.delitem(sys.modules, words[2], raising=False)
    runpy.run_module(words[2], run_name="__main__")
  assert made.read_bytes() == path.read_bytes()


def test_presets_are_read_by_their_names_and_others_are_refused():
  for name, (_, config) in presets.PRESETS.items():
    assert ModelConfig.named(name) == config
  with pytest.raises(ValueError, match=r"preset 'gpt-9': choose one of bonsai-1\.7b"):
    presets.text("gpt-9", "x.toml")
