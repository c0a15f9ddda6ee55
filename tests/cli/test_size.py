"""`neurojax size` as a person or a script uses it."""

import dataclasses
import json
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

from neurojax import count
from neurojax.cli import main
from neurojax.config import ModelConfig
from neurojax.plan.fleet import fleets
from neurojax.train.config import TrainConfig

FLEET = """
[[hosts]]
name = "a"
[[hosts.devices]]
kind = "cuda"
memory_bytes = 24_000_000_000
read_bytes_per_s = 9e11
flops_per_s = 1e14
[[hosts]]
name = "b"
[[hosts.devices]]
kind = "cpu"
memory_bytes = 64_000_000_000
used_bytes = 4_000_000_000
read_bytes_per_s = 4e10
flops_per_s = 1e12
"""


def run(capsys, *argv: str) -> tuple[int, str, str]:
  try:
    code = main(["size", *argv])
  except SystemExit as error:
    code = int(error.code or 0)
  out, err = capsys.readouterr()
  return code, out, err


@pytest.fixture
def fleet(tmp_path: Path) -> str:
  path = tmp_path / "fleet.toml"
  path.write_text(FLEET)
  return str(path)


def test_the_table_says_what_fits_and_how_it_was_counted(capsys, fleet: str):
  code, out, err = run(capsys, "--fleet", fleet)
  assert code == 0, err
  for said in ("billion parameters", "decode", "prefill", "loss, bf16", "loss, ternary", "weights",
               "bits a parameter", "next larger", "unverified", "a ", "b "):  # fmt: skip
    assert said in out
  assert "step" in next(line for line in out.splitlines() if line.startswith("stage "))
  _, out, _ = run(capsys, "--memory", "8GB")
  assert "step" not in next(line for line in out.splitlines() if line.startswith("stage "))
  code, out, err = run(capsys, "--fleet", fleet, "--for", "train", "--days", "30")
  assert code == 0 and "training days" in out and "optimizer" in out, err


def test_json_and_toml_are_the_same_table_in_the_fields_of_the_dataclasses(capsys, fleet: str):
  arguments = ("--fleet", fleet, "--format", "TQ2_0", "--batch", "4", "--context", "4096")
  code, out, _ = run(capsys, *arguments, "--json")
  table = json.loads(out)
  assert code == 0
  fields = (
    "num_layers",
    "model_dim",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "ffn_dim",
    "vocab_size",
  )
  config = ModelConfig(
    **{name: table[name] for name in fields}, tied_embedding=table["tied_embedding"]
  )
  assert table["parameters"] == count.parameters(config)
  for stage in table["stages"]:
    assert {"host", "first_layer", "last_layer", "memory_bytes", "step_s"} <= set(stage)
  assert table["stages"][-1]["last_layer"] == table["num_layers"] - 1
  code, out, _ = run(capsys, *arguments, "--toml")
  assert code == 0 and tomllib.loads(out) == table


def test_a_written_architecture_is_read_back_kept_and_names_its_command(capsys, tmp_path: Path):
  path = tmp_path / "model.toml"
  arguments = ("--memory", "10GB", "--for", "train", "--no-remat", "--out-config", str(path))
  assert run(capsys, *arguments)[0] == 0
  config = ModelConfig.load(path)
  first = path.read_text().splitlines()[0]
  assert first == f"# neurojax size --memory 10GB --for train --no-remat --out-config {path}"
  code, out, _ = run(
    capsys, "--memory", "11GB", "--for", "train", "--no-remat", "--current", str(path), "--json"
  )
  table = json.loads(out)
  assert code == 0 and table["kept"] and table["parameters"] == count.parameters(config)


@pytest.mark.parametrize(("more", "weights", "group"), [
  ((), "ternary", 128),
  (("--format", "ternary-tensor", "--optimizer", "muon", "--no-remat"), "ternary", None),
  (("--format", "float32", "--batch", "4", "--context", "512", "--tokens", "1e9"), "none", None),
], ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")  # fmt: skip
def test_a_model_sized_for_training_is_a_configuration_that_train_takes(
  capsys, tmp_path: Path, more: tuple[str, ...], weights: str, group: int | None
):
  path, arch = tmp_path / "run.toml", tmp_path / "model.toml"
  outs = ("--out-config", str(path), "--out-arch", str(arch))
  code, out, err = run(capsys, "--memory", "10GB", "--for", "train", *more, *outs, "--json")
  assert code == 0, err
  made, table = TrainConfig.load(path), json.loads(out)
  assert made.model == ModelConfig.named(str(arch)) == ModelConfig.named(str(path))
  assert count.parameters(made.model) == table["parameters"]
  assert (made.quantization.weights, made.quantization.group_size) == (weights, group)
  assert (made.data.batch_size, made.data.seq_len) == (
    table["sequences"],
    made.model.context_length,
  )
  assert (made.steps - 1) * made.tokens_per_step < table["losses"]["tokens"]
  assert table["losses"]["tokens"] <= made.steps * made.tokens_per_step
  assert made.remat == ("none" if "--no-remat" in more else "full")
  arguments = ("--config", str(path), "--workdir", str(tmp_path / "run"), "--data.folder", "books")
  assert main(["train", *arguments, "--show"]) == 0
  shown = tmp_path / "shown.toml"
  shown.write_text(capsys.readouterr().out)
  books = dataclasses.replace(made.data, folder="books")
  assert TrainConfig.load(shown) == dataclasses.replace(made, data=books)
  # The first line writes the file again.
  words = shlex.split(path.read_text().splitlines()[0].removeprefix("# neurojax size"))
  before = path.read_text()
  assert run(capsys, *words)[0] == 0 and path.read_text() == before


def test_what_train_lacks_is_refused_and_a_model_for_serving_is_an_architecture(
  capsys, tmp_path: Path
):
  path = tmp_path / "model.toml"
  arguments = ("--memory", "10GB", "--out-config", str(path))
  code, _, err = run(capsys, *arguments, "--for", "train", "--optimizer", "sgd")
  assert code == 2 and "adamw and muon" in err and not path.exists()
  code, out, _ = run(capsys, *arguments, "--json")
  assert code == 0
  assert count.parameters(ModelConfig.named(str(path))) == json.loads(out)["parameters"]


@pytest.mark.parametrize(("argv", "said"), [
  ((), "either --fleet or --memory"),
  (("--memory", "10GB", "--fleet", "x.toml"), "either --fleet or --memory"),
  (("--memory", "10GB", "--json", "--toml"), "give one of them"),
  (("--memory", "10GB", "--format", "Q4_0"), "--format Q4_0: choose one of bf16"),
  (("--memory", "10GB", "--law", "kaplan"), "choose one of besiroglu"),
  (("--memory", "1MB"), "bytes more on host would do"),
  (("--memory", "many"), "write a number with"),
  (("--memory", "10GB", "--context", "0"), "--context 0: between 1 and"),
  (("--memory", "10GB", "--tokens", "1e9", "--days", "2"), "contradict each other"),
  (("--fleet", "none.toml"), "none.toml"),
  (("--memory", "200GB", "--mode", "seed-table", "--plot", "x.png"), "draws nothing"),
  *((("--memory", "200GB", "--mode", "seed-table", *more.split()), f"leave {more.split()[0]} out") for more in (
    "--format bf16", "--for train", "--days 3", "--no-remat", "--context 4096", "--current llama-8b")),
  (("--fleet", "labor"), "or one of cpu, gaming-pc, lab, seed-200gb"),
  (("--fleet", "10.0.0.1"), "addresses as host:port"),
  (("--memory", "200GB", "--mode", "seed-formula", "--out-config", "x.toml"), "no multiple of"),
  (("--memory", "10GB", "--mode", "seed-table"), "begins at 40 GB"),
], ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")  # fmt: skip
def test_wrong_use_is_refused_with_the_remedy(capsys, argv: tuple[str, ...], said: str):
  code, _, err = run(capsys, *argv)
  assert code == 2 and said in " ".join(err.split()), err


def test_the_seeds_modes_say_what_is_wrong(capsys):
  code, out, _ = run(capsys, "--memory", "4096GB", "--mode", "seed-formula")
  assert code == 0 and "invalid: no architecture" in out
  assert "head_dim = 5184/40 = 129.6 is no integer" in " ".join(out.split())
  code, out, _ = run(capsys, "--memory", "200GB", "--mode", "seed-table", "--json")
  table = json.loads(out)
  assert code == 0 and table["valid"] and table["model_dim"] == 2048
  assert any("2.1 times too many" in finding for finding in table["findings"])


def test_a_fleet_may_be_named(capsys):
  named, by_path = (
    run(capsys, "--fleet", fleet, "--json")[1] for fleet in ("lab", str(fleets()["lab"]))
  )
  assert named == by_path != ""


def test_without_matplotlib_a_plot_names_the_extra_and_nothing_is_written(
  capsys, fleet: str, tmp_path: Path, monkeypatch
):
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
  outs = ("--plot", str(tmp_path / "sizes.png"), "--out-config", str(tmp_path / "model.toml"))
  code, _, err = run(capsys, "--fleet", fleet, *outs)
  assert code == 2 and "make setup EXTRA=plot" in err and "neurojax[plot]" not in err
  assert list(tmp_path.glob("*.png")) == [] and not (tmp_path / "model.toml").exists()


def test_the_plot_is_a_picture_of_parameters_loss_and_speed(capsys, fleet: str, tmp_path: Path):
  pytest.importorskip("matplotlib", reason="matplotlib is not installed: make setup EXTRA=plot")
  path, config = tmp_path / "sizes.svg", tmp_path / "model.toml"
  code, out, _ = run(capsys, "--fleet", fleet, "--plot", str(path), "--out-config", str(config))
  assert code == 0 and "parameters" in out and config.exists()
  text = path.read_text()
  # Text is drawn as glyphs, and named in comments.
  for label in (
    "parameters",
    "predicted loss, bf16 (nats)",
    "tokens/s",
    "memory of the fleet (GB)",
  ):
    assert f"<!-- {label} -->" in text
  config.unlink()
  code, _, err = run(capsys, "--fleet", fleet, "--plot", "x.doc", "--out-config", str(config))
  assert code == 2 and "ends in one of" in err and not config.exists()
