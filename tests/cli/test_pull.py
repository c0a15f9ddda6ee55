"""`neurojax pull`, and what other commands make of a model's name."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from neurojax.cli import main
from neurojax.files.hub.address import ALIASES
from tests import tinymodel
from tests.files.hub_server import Repository, Server, serving


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
  config = tinymodel.with_layers(2)
  return tinymodel.write(tmp_path_factory.mktemp("hub") / "m.gguf", config=config).read_bytes()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gguf: bytes) -> Iterator[Server]:
  """A hub that this process, and those it starts, ask in place of the real one."""
  with serving() as server:
    server.repositories["org/tiny"] = Repository({"tiny-F32.gguf": gguf, "README.md": b"a card"})
    for name, value in {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path)}.items():
      monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("NEUROJAX_CACHE_DIR", str(tmp_path / "neurojax"))
    # huggingface_hub read its environment when it was imported.
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    yield server


def run(capsys, *argv: str) -> tuple[int, str, str]:
  code = main(argv)
  out, err = capsys.readouterr()
  return code, out, " ".join(err.split())


def test_a_pulled_model_generates_by_its_name(hub: Server, capsys):
  prompt = ("--prompt", "abc", "--max-tokens", "4", "--json")
  code, _, err = run(capsys, "generate", "--model", "org/tiny", *prompt)
  assert code == 2 and "`neurojax pull org/tiny`" in err
  assert hub.asked == [], "a command other than pull asked the hub"
  code, out, err = run(capsys, "pull", "org/tiny")
  assert code == 0 and "tiny-F32.gguf" in err
  path = Path(out.removesuffix("\n"))
  hub.asked.clear()
  answers = []
  for model in ("org/tiny", "org/tiny:F32", "hf.co/org/tiny:tiny-F32.gguf", str(path)):
    code, out, err = run(capsys, "generate", "--model", model, *prompt)
    assert code == 0, err
    answers.append(json.loads(out)["tokens"])
  assert answers == [answers[0]] * 4 and len(answers[0]) == 4
  for argv in (["org/tiny"], ["--model", "org/tiny"]):
    code, out, _ = run(capsys, "inspect", *argv, "--json")
    assert code == 0 and json.loads(out)["unsupported"] == []
  code, _, err = run(capsys, "inspect", "org-tiny")
  assert code == 2 and "the nearest: org/tiny" in err and "org/tiny; `neurojax pull --list`" in err
  assert hub.asked == []


def test_json_says_what_came(hub: Server, capsys, gguf: bytes):
  code, out, _ = run(capsys, "pull", "org/tiny", "--dry-run", "--json")
  told = json.loads(out)
  assert code == 0 and told["missing_bytes"] == told["files"][0]["size_bytes"] == len(gguf)
  assert hub.bodies() == []
  code, out, err = run(capsys, "pull", "org/tiny", "--json")
  assert code == 0, err
  told = json.loads(out)
  assert told["came_bytes"] == len(gguf) and told["asked_hub"]
  assert Path(told["path"]).read_bytes() == gguf and told["files"][0]["path"] == told["path"]
  code, out, _ = run(capsys, "pull", "org/tiny", "--json", "--verify")
  assert code == 0 and json.loads(out)["came_bytes"] == 0


def test_without_a_hub_what_is_here_is_used(hub: Server, capsys, monkeypatch: pytest.MonkeyPatch):
  _, path, _ = run(capsys, "pull", "org/tiny")
  monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
  code, out, err = run(capsys, "pull", "org/tiny")
  assert (code, out) == (0, path) and "no answer from" in err and "pulled before" in err
  code, out, err = run(capsys, "pull", "org/other")
  assert code == 2 and out == "" and "HF_ENDPOINT" in err
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  code, out, err = run(capsys, "pull", "org/tiny", "--json")
  assert code == 0 and json.loads(out)["asked_hub"] is False
  code, out, err = run(capsys, "pull", "org/other")
  assert code == 2 and "org/other is not on this machine: HF_HUB_OFFLINE is set" in err
  assert "neurojax pull" not in err and "unset it, or copy the model to" in err


def test_names(hub: Server, capsys, gguf: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  hub.repositories["prism-ml/Ternary-Bonsai-8B-gguf"] = Repository(
    {"B-Q2_0.gguf": gguf, "B-Q2_0_g64.gguf": gguf, "B-F16.gguf": gguf}
  )
  code, out, _ = run(capsys, "pull", "bonsai-8b")
  assert code == 0 and Path(out.strip()).name == "B-Q2_0.gguf"
  code, out, _ = run(capsys, "pull", "--list", "--json")
  table = json.loads(out)
  assert list(table) == list(ALIASES)
  assert {name for name in table if table[name]["path"]} == {"bonsai-8b"}
  # An architecture of that name is planned without the file; other commands take the file.
  assert run(capsys, "inspect", "Bonsai8B", "--json")[0] == 0
  # What exists here is what is meant.
  monkeypatch.chdir(tmp_path)
  Path("bonsai-8b").write_bytes(b"GGUF, but not really")
  code, _, err = run(capsys, "inspect", "bonsai-8b")
  assert code == 2 and "bonsai-8b" in err
  code, out, err = run(capsys, "pull", "neurollm")
  assert code == 0 and out.endswith("neurollm.gguf\n") and "nothing to download" in err


@pytest.mark.parametrize(
  ("argv", "said"),
  [
    (["pull"], "--list"), (["pull", "model.gguf"], "no model on the hub"), (["pull", "org/x@../y"], "no revision"),
    (["pull", "org/tiny", "--list"], "leave the model away"), (["pull", "org/none"], "no such model"),
    (["inspect", "no-such-name"], "no model of this name; on this machine: neurollm"),
    (["inspect", "--model", "neurolm"], "no model of this name (the nearest: neurollm)"),
    (["inspect", "seed-1024"], "seed-1024 in configs/model is an architecture without weights"),
    (["generate", "--model", "bonsai-8b", "--prompt", "x"], "bonsai-8b in configs/model is an architecture"),
    (["inspect"], "name one model: neurojax inspect --model MODEL"),
    (["inspect", "neurollm", "--model", "neurollm"], "name one model"),
    (["inspect", "models/none.gguf"], "no such model file"),
    (["plan", "--model", "no-such-name", "--fleet", "configs/fleet/lab.toml"], "no architecture of this name"),
  ],
)  # fmt: skip
def test_what_cannot_be_is_said(hub: Server, capsys, argv: list[str], said: str):
  code, out, err = run(capsys, *argv)
  assert code == 2 and out == "" and said in err


def test_several_models_in_the_cache_are_asked_about(hub: Server, capsys, gguf: bytes):
  hub.repositories["org/tiny"].files["tiny-F16.gguf"] = gguf[:-1]
  code, _, err = run(capsys, "pull", "org/tiny")
  assert code == 2 and "several models" in err and "tiny-F16.gguf" in err
  for name in ("F16", "F32"):
    assert run(capsys, "pull", f"org/tiny:{name}")[0] == 0
  code, _, err = run(capsys, "inspect", "org/tiny")
  assert code == 2 and "several models" in err and "org/tiny:FILE" in err
  assert run(capsys, "inspect", "org/tiny:f32", "--json")[0] == 0


@pytest.mark.parametrize(("end", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_pull_that_was_ended_goes_on(
  hub: Server, tmp_path: Path, gguf: bytes, end: signal.Signals, code: int
):
  weights = os.urandom(25_000_000)
  hub.repositories["org/large"] = Repository({"large.gguf": weights})
  # 10 MB are written at once.
  hub.cuts, hub.stall = [21_000_000], threading.Event()
  command = [sys.executable, "-m", "neurojax", "pull", "org/large", "--json"]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  try:
    assert hub.stalled.wait(60)
    blobs = tmp_path / "hub" / "models--org--large" / "blobs"
    while sum(path.stat().st_size for path in blobs.iterdir()) < 20_000_000:
      assert process.poll() is None
    process.send_signal(end)
    out, err = process.communicate(timeout=60)
  finally:
    process.kill()
  assert process.returncode == code and out == "" and "Traceback" not in err, err
  hub.stall.set()
  hub.stall, hub.cuts, hub.asked = None, [], []
  done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
  told = json.loads(done.stdout)
  assert told["came_bytes"] <= 5_000_000 < 25_000_000
  assert hub.bodies()[-1].range is not None
  assert Path(told["path"]).read_bytes() == weights
