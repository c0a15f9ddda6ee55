"""The demo with models that chat and models that only continue a text."""

import dataclasses
from pathlib import Path

import pytest

from neurojax.cli import main
from neurojax.cli.demo import DEFAULT_MODEL, PROMPT
from neurojax.config import ModelConfig
from neurojax.files import find
from neurojax.files.load import ternary_matrices
from neurojax.files.open import open_model
from tests.files import trained
from tests.tokenizer import vocab

pytestmark = pytest.mark.optimized

CONFIG = ModelConfig(
  vocab_size=263, model_dim=64, num_layers=2, num_heads=1, num_kv_heads=1, head_dim=64, ffn_dim=64,
  context_length=128, sub_norm=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A ternary model without a chat template, such as training gives."""
  path = tmp_path_factory.mktemp("demo") / "neurollm.gguf"
  spec = vocab.tiny_bpe(add_eos=False, stop_ids=frozenset({260}))
  trained.write_gguf(path, trained.make(CONFIG), spec, dict(name="tiny"))
  return path


def demo(capsys, *argv: str) -> str:
  code = main(["demo", "--max-tokens", "4", *argv])
  out, err = capsys.readouterr()
  assert code == 0, out + err
  return out


def test_a_model_without_a_template_continues_a_text_with_its_matrices_packed(
  capsys, base: Path, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr(find, "PACKAGED", base)
  out = demo(capsys, "--model", "neurollm")
  assert PROMPT in out and "same tokens" in out and "assistant" not in out
  # Two bits a weight, and float32 embedding and norms.
  weights = [line.split()[3] for line in out.splitlines() if line.strip().startswith("stage-")]
  matrices = (4 * 64 * 64 + 3 * 64 * 64) / 4 + 7 * 2
  assert float(weights[0]) == pytest.approx((matrices + 4 * (263 * 64 + 4 * 64)) / 1e6, abs=0.06)


def test_what_does_not_fit_the_model_is_refused(capsys, base: Path, tmp_path: Path, monkeypatch):
  for argv, reason in (
    (["--model", str(base), "--question", "a"], "no chat template"),
    (["--model", str(base), "--question", "a", "--prompt", "b"], "give one of them"),
    (["--model", "neurollm"], "this copy of the package carries no model: name a file"),
  ):
    monkeypatch.setattr(find, "PACKAGED", tmp_path / "none.gguf")
    assert main(["demo", *argv]) == 2
    assert reason in capsys.readouterr().err


def test_a_text_may_be_continued_by_any_model(base: Path):
  from neurojax.cli.demo import Demo
  from neurojax.tokenizer import Tokenizer

  chats = Tokenizer(vocab.tiny_bpe(chat_template="{{ messages[0].content }}", add_eos=False))
  plain = Tokenizer(dataclasses.replace(chats.spec, chat_template=None))
  assert "assistant" in Demo(model="m", question="abc?")._prompt(chats)[1]
  ask, go_on = Demo(model=str(base)), Demo(model=str(base), prompt="the")
  assert ask._prompt(chats)[2] == 0.0 and "assistant" in ask._prompt(chats)[1]
  assert ask._prompt(plain)[0] == plain.encode(PROMPT, add_special=True)
  assert go_on._prompt(chats)[0] == go_on._prompt(plain)[0] == [259, 257]
  assert go_on._prompt(chats)[2] > 0


def test_make_demo_runs_the_packaged_model():
  makefile = Path(__file__).parents[2] / "Makefile"
  [line] = [line for line in makefile.read_text().splitlines() if line.startswith("MODEL ")]
  assert line.split() == ["MODEL", "?=", DEFAULT_MODEL]


def test_the_packaged_model_is_small_ternary_documented_and_runs(capsys):
  assert find.PACKAGED.stat().st_size <= 20e6
  assert find.PACKAGED.with_name("README.md").is_file()
  with open_model(find.PACKAGED) as file:
    assert file.problems() == [] and file.metadata["general.license"]
    assert {"q_DNH", "k_DKH", "v_DKH", "o_NHD", "gate_DF", "up_DF", "down_FD"} <= set(
      ternary_matrices(file)
    )
    assert file.tokenizer is not None
  assert "same tokens" in demo(capsys)
