"""`neurojax plan` and `neurojax simulate`, as a person or a script uses them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from neurojax.cli import main
from neurojax.config import from_toml, to_toml
from neurojax.plan import predict
from neurojax.plan.fleet import DecodeRates, Device, Fleet, Host
from neurojax.plan.plan import Plan

FLEET = """
[[hosts]]
name = "fast"
[[hosts.devices]]
kind = "cuda"
name = "card"
memory_bytes = 12_000_000_000
read_bytes_per_s = 1e12
flops_per_s = 1e14
[[hosts]]
name = "large"
[[hosts.devices]]
kind = "cpu"
memory_bytes = 64_000_000_000
read_bytes_per_s = 5e10
flops_per_s = 1e12
[[hosts]]
name = "small"
[[hosts.devices]]
kind = "cpu"
memory_bytes = 100_000_000
read_bytes_per_s = 5e10
flops_per_s = 1e12
"""


@pytest.fixture
def fleet(tmp_path: Path) -> str:
  path = tmp_path / "fleet.toml"
  path.write_text(FLEET)
  return str(path)


def run(capsys, *argv: str) -> tuple[int, str, str]:
  code = main(argv)
  out, err = capsys.readouterr()
  return code, out, err


@pytest.mark.parametrize("verb", ["plan", "simulate"])
def test_help_has_an_example(capsys, verb: str):
  with pytest.raises(SystemExit) as caught:
    main([verb, "--help"])
  assert caught.value.code == 0
  assert f"Example: neurojax {verb}" in " ".join(capsys.readouterr().out.split())


def test_a_plan_explains_itself(capsys, fleet: str, monkeypatch):
  monkeypatch.setenv("COLUMNS", "200")
  arguments = ("plan", "--model", "llama-8b", "--fleet", fleet, "--dtype", "bfloat16")
  code, out, err = run(capsys, *arguments, "--compare")
  assert code == 0, err
  for said in (
    "fast", "full:", "small", "too small: a layer takes", "reading", "proven best",
    "With another card like fast", "less time a token", "proportional", "greedy", "equal", "ours",
  ):  # fmt: skip
    assert said in out, said


def test_json_has_the_dataclasses_field_names(capsys, fleet: str):
  arguments = ("plan", "--model", "llama-8b", "--fleet", fleet, "--dtype", "bfloat16")
  code, out, err = run(capsys, *arguments, "--json", "--compare", "--objective", "throughput")
  assert code == 0, err
  table = json.loads(out)
  for stage in table["stages"]:
    assert {"host", "first_layer", "last_layer", "memory_bytes", "step_s"} <= set(stage)
  assert table["stages"][0]["first_layer"] == 0
  assert table["stages"][-1]["last_layer"] == 31
  assert table["one_more"]["throughput"] >= table["throughput"]
  assert set(table["compared"]) == {"proportional", "greedy", "equal", "fill"}
  assert "would take" in table["compared"]["equal"]["error"]


def test_a_plan_in_toml_is_what_simulate_reads(capsys, fleet: str, tmp_path: Path):
  arguments = ("--model", "llama-8b", "--fleet", fleet, "--dtype", "bfloat16")
  code, out, err = run(capsys, "plan", *arguments, "--toml")
  assert code == 0, err
  plan = from_toml(Plan, out)
  assert plan.gap == 0 and plan.stages[0].first_layer == 0
  path = tmp_path / "plan.toml"
  path.write_text(out)
  work = ("--requests", "6", "--concurrency", "2", "--prompt", "20", "--answer", "5", "--json")
  results = [
    run(capsys, "simulate", *source, *work, "--fail", "fast@0.5", "--repair", "1")
    for source in (("--plan", str(path)), arguments)
  ]
  assert results[0][0] == 0 and results[0] == results[1]
  result = json.loads(results[0][1])
  assert (result["tokens"], result["failures"], result["failed"]) == (30, 1, 0)
  code, out, _ = run(capsys, "simulate", "--plan", str(path), *work[:-1], "--fail", "fast@0.5")
  assert code == 0 and "1 failures ended" in out


def test_throughput_plans_memory_for_the_sequences_it_takes(capsys, tmp_path: Path):
  path = tmp_path / "fleet.toml"
  card = (
    '[[hosts]]\nname = "h{}"\n[[hosts.devices]]\nkind = "cuda"\nmemory_bytes = 12_000_000_000\n'
  )
  path.write_text("".join(f"{card.format(i)}read_bytes_per_s = 1e12\n" for i in range(7)))
  arguments = ("--model", "llama-8b", "--fleet", str(path), "--dtype", "bfloat16")
  plans = []
  for more in ((), ("--sequences", "4")):
    code, out, err = run(capsys, "plan", *arguments, "--objective", "throughput", *more, "--toml")
    assert code == 0, err
    plans.append(from_toml(Plan, out))
  assert plans[0].sequences >= plans[0].batches > 4 == plans[1].sequences
  assert not any("planned for the caches" in limit for limit in plans[0].limits)
  assert any("round trip sets the pace, with 4 in flight" in limit for limit in plans[1].limits)
  assert plans[1].throughput == predict.pipeline_throughput(plans[1], micro_batches=4)
  assert plans[1].throughput > predict.pipeline_throughput(plans[0], micro_batches=4)


@pytest.mark.parametrize(
  ("more", "said"),
  [
    (["--pin", "fast=32", "--pin", "large=1"], "1 more than the model's 32"),
    (["--pin", "small=3"], "at most 0 fit"),
    (["--pin", "fast"], "write HOST=LAYERS"),
    (["--context", "100000"], "at most"),
    (["--sequences", "4000"], "would do"),
    (["--weights", "w2a16", "--ternary", "no"], "choose one of"),
    (["--json", "--toml"], "give one of them"),
    (["--batch", "9"], "--batch 9 and --sequences 4"),
    (["--replicas", "9"], "between 1 and"),
    (["--model", "nothing"], "model 'nothing': no such file"),
  ],
)
def test_what_cannot_be_is_said(capsys, fleet: str, more: list[str], said: str):
  code, _, err = run(capsys, "plan", "--model", "llama-8b", "--fleet", fleet, *more)
  assert code == 2 and said in err


def test_a_fleet_without_speeds_names_the_remedy(capsys, tmp_path: Path):
  path = tmp_path / "fleet.toml"
  path.write_text('[[hosts]]\nname = "a"\nmemory_bytes = 100_000_000_000\n')
  code, _, err = run(capsys, "plan", "--model", "llama-8b", "--fleet", str(path))
  assert code == 2 and "neurojax probe" in err and "a:" in err


def test_stored_weights_are_planned_at_the_rate_of_reading(capsys, tmp_path: Path):
  device = Device(
    kind="cpu", memory_bytes=1 << 34, read_bytes_per_s=1e9,
    decode_bytes_per_s=DecodeRates(dense=5e8, int8=5e8, w2a16=5e8, w2a8=5e8),
  )  # fmt: skip
  path = tmp_path / "fleet.toml"
  path.write_text(to_toml(Fleet(hosts=(Host(name="a", devices=(device,)),))))
  steps = {}
  for weights in ("stored", "dense"):
    arguments = ["--model", "neurollm", "--fleet", str(path), "--weights", weights, "--json"]
    assert main(["plan", *arguments]) == 0
    [stage] = json.loads(capsys.readouterr().out)["stages"]
    steps[weights] = stage["step_s"]
  # No form of its own was measured; of two bits it reads far less than of float32.
  assert 0 < steps["stored"] < steps["dense"] / 4


def test_planning_by_configuration_imports_no_jax(fleet: str):
  script = (
    "import sys; from neurojax.cli import main;"
    f"main(['plan', '--model', 'bonsai-8b', '--fleet', {fleet!r}, '--weights', 'w2a16', '--json']);"
    "assert not {'jax', 'flax', 'grpc'} & set(sys.modules)"
  )
  subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)
