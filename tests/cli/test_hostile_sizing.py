"""size, plan, simulate and probe in the hands of a stranger: one line that names the value and the remedy."""

import json
from pathlib import Path

import pytest

from neurojax.cli import main
from neurojax.config import ModelConfig, to_toml
from tests.cli.test_plan import FLEET

HOST = '[[hosts]]\nname = "a"\n'
DEVICE = HOST + '[[hosts.devices]]\nkind = "cpu"\nmemory_bytes = 10_000_000_000\n'
FILES = {
  "good": FLEET,
  "empty": "",
  "nohosts": "hosts = []\n",
  "zero": HOST + "memory_bytes = 0\n",
  "negative": HOST + "memory_bytes = -5\n",
  "nan": HOST + "memory_bytes = nan\n",
  "huge": HOST + "memory_bytes = 99999999999999999999999999\n",
  "nanrate": DEVICE + "read_bytes_per_s = nan\n",
  "slowest": DEVICE + "read_bytes_per_s = 1e-300\n",
  "twice": HOST + "memory_bytes = 5\n" + HOST + "memory_bytes = 5\n",
  "nowhere": DEVICE + '[[links]]\nhosts = ["a", "z"]\nlatency_s = 1.0\nbytes_per_s = 1.0\n',
  "later": DEVICE + '[[links]]\nhosts = ["a", "a"]\nlatency_s = 1.0\nbytes_per_s = 1.0\n',
  "strings": 'hosts = ["a"]\n',
  "speedless": HOST + "memory_bytes = 100_000_000_000\n",
  "model": to_toml(ModelConfig.named("llama-8b")),
  "deep": to_toml(ModelConfig.named("llama-8b")).replace("num_layers = 32", "num_layers = 100_000"),
  "wide": to_toml(ModelConfig.named("llama-8b")).replace("128256", "9223372036854775807"),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Path:
  for name, text in FILES.items():
    (tmp_path / f"{name}.toml").write_text(text)
  (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
  (tmp_path / "folder.toml").mkdir()
  (tmp_path / "fleet.txt").write_text(FLEET)
  monkeypatch.chdir(tmp_path)
  return tmp_path


PLAN = "plan --model llama-8b --fleet good.toml --weights int8"
SIZE = "size --memory 40GB"
REFUSED = [
  *((f"{verb} --fleet {name}.toml", said) for verb in ("plan --model llama-8b", "size") for name, said in (
    ("empty", "missing key 'hosts'"),
    ("nohosts", "at least one host"),
    ("zero", "memory_bytes = 0"),
    ("negative", "memory_bytes = -5"),
    ("nan", "expected int"),
    ("huge", "a pebibyte"),
    ("nanrate", "read_bytes_per_s = nan"),
    ("slowest", "read_bytes_per_s = 1e-300"),
    ("twice", "two hosts are called a"),
    ("nowhere", "'z' of a link"),
    ("later", "to itself"),
    ("strings", "expected a table"),
    ("bytes", "not UTF-8 at byte 0"),
    ("folder", "is a directory"),
    ("missing", "no such file"),
    ("model", "unknown key"),
  )),
  ("plan --model llama-8b --fleet fleet.txt", "ends in .toml"),
  ("plan --model llama-8b --fleet speedless.toml", "neurojax probe"),
  ("plan --model deep.toml --fleet good.toml", "of 100000 layers fit"),
  ("plan --model wide.toml --fleet good.toml", "more than any fleet"),
  ("plan --model folder.toml --fleet good.toml", "give the path of a TOML file"),
  ("plan --model good.toml --fleet good.toml", "unknown key 'hosts'"),
  ("plan", "give --model and --fleet"),
  (f"{PLAN} --sequences 0", "--sequences 0: between"),
  (f"{PLAN} --context 0", "--context 0: between"),
  (f"{PLAN} --batch -1", "--batch -1: between"),
  (f"{PLAN} --seconds nan", "--seconds nan"),
  (f"{PLAN} --pin fast=1 --pin fast=2", "pinned to 1 already"),
  (f"{PLAN} --pin fast=\u0663", "write HOST=LAYERS"),
  (f"{PLAN} --pin fast=0 --pin large=0 --pin small=0", "32 too few"),
  (f"{SIZE} --tokens 1e300", "tokens = 1e+300"),
  (f"{SIZE} --batch 1048576 --context 2147483648", "memory is too small"),
  (f"{SIZE} --vocab 0", "--vocab 0: between"),
  (f"{SIZE} --batch 99999999999999999999", "--batch 99999999999999999999: between"),
  (f"{SIZE} --headroom nan", "headroom = nan"),
  (f"{SIZE} --most-parameters 1000", "the smallest candidate has"),
  (f"{SIZE} --law folder.toml", "is a directory"),
  (f"{SIZE} --law good.toml", "unknown key 'hosts'"),
  (f"{SIZE} --out-config .", "this is a folder"),
  (f"{SIZE} --out-config none/x.toml", "there is no folder none"),
  (f"{SIZE} --plot none/x.png", "there is no folder none"),
  ("size --memory 0GB", "it must be positive"),
  ("size --memory 99999999999TB", "at most 1,126 TB"),
  ("probe --quick --out none/x.toml", "there is no folder none"),
  ("probe --quick --add folder.toml", "is a directory"),
  ("simulate --plan folder.toml", "is a directory"),
  ("simulate --plan good.toml", "unknown key 'hosts'"),
  ("simulate --plan missing.toml", "no such file"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "said"), REFUSED, ids=lambda value: value)
def test_one_line_says_what_is_wrong(here: Path, capsys, line: str, said: str):
  assert main(line.split(" ")) == 2
  err = capsys.readouterr().err
  assert err.count("\n") == 1 and err.startswith("neurojax: ") and said in err


PLAN_FAULTS = [
  ("step_s = ", "step_s = nan # ", "step_s = nan"),
  ("step_s = ", "step_s = -1.0 # ", "step_s = -1.0"),
  ("pipeline = 0", "pipeline = 7", "numbered from 0"),
  ("share = 1.0", "share = 0.0", "share = 0.0"),
  ("batch = 1", "batch = 0", "batch = 0: at least 1"),
  ("sequences = 4", "sequences = 0", "sequences = 0: at least batch = 1"),
  ("prefill_tokens = 256", "prefill_tokens = 0", "prefill_tokens = 0"),
  ('a = "fast"', 'a = "else"', "no stage called 'else'"),
  ("first_layer = 0", "first_layer = 1", "layer 0 is the next to be placed"),
]


def test_a_plan_mended_by_hand_is_read_with_suspicion(here: Path, capsys):
  assert main([*PLAN.split(" "), "--pin", "fast=8", "--pin", "large=24", "--toml"]) == 0
  text = capsys.readouterr().out
  path = here / "plan.toml"
  path.write_text(text)
  assert main(["simulate", "--plan", "plan.toml", "--answer", "2"]) == 0
  for old, new, said in PLAN_FAULTS:
    assert old in text
    path.write_text(text.replace(old, new))
    capsys.readouterr()
    assert main(["simulate", "--plan", "plan.toml"]) == 2, new
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err, err
  path.write_text(text)
  for more, said in (
    ("--requests 99999999999", "ask for fewer"),
    ("--failures-per-hour 1e12", "from 0 to 1e+06"),
    ("--fail fast@nan", "write HOST@SECONDS"),
    ("--fail nobody@1", "uses only"),
    ("--repair inf", "repair_s = inf"),
    ("--model llama-8b", "leave --model and --fleet out"),
    ("--sequences 9", "leave --sequences out"),
    ("--concurrency 9", "caches of 4 sequences"),
    ("--prompt 4000", "for 2048 positions"),
  ):
    capsys.readouterr()
    assert main(["simulate", "--plan", "plan.toml", *more.split(" ")]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["[/x]", "[bold]x", "h\u00f6st \U0001f600", "a b", "x" * 300])
def test_any_name_of_a_host_is_printed_as_it_is(here: Path, capsys, monkeypatch, name: str):
  monkeypatch.setenv("COLUMNS", "800")
  path = here / "named.toml"
  path.write_text(FLEET.replace('"fast"', f'"{name}"'))
  for verb in ("plan --model llama-8b --weights int8", "size"):
    assert main([*verb.split(" "), "--fleet", "named.toml"]) == 0
    assert name in capsys.readouterr().out


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_a_model_of_one_layer_has_a_plan(here: Path, capsys, objective: str):
  (here / "one.toml").write_text(FILES["model"].replace("num_layers = 32", "num_layers = 1"))
  words = ["plan", "--model", "one.toml", "--fleet", "good.toml", "--objective", objective]
  for replicas in ("1", "auto"):
    assert main([*words, "--replicas", replicas]) == 0
    assert "0..0" in capsys.readouterr().out


def test_a_plan_stands_where_one_more_host_has_none(here: Path, capsys, monkeypatch):
  monkeypatch.setattr("neurojax.plan.problem.MOST_PLACES", 3)
  assert main(PLAN.split(" ")) == 0
  out = " ".join(capsys.readouterr().out.split())
  assert "No plan with another host: 4 places: at most 3 are planned together" in out
  assert main([*PLAN.split(" "), "--json"]) == 0
  assert "at most 3" in json.loads(capsys.readouterr().out)["one_more"]["error"]
