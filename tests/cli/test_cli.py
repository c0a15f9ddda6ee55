"""The command line as a person or a script uses it: output, exit codes, errors."""

import csv
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from neurojax.cli import bench, main
from neurojax.measure.speed import stage as stage_speed
from tests import tinymodel


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
  return str(tinymodel.write(tmp_path_factory.mktemp("cli") / "tiny.gguf"))


def run(capsys, *argv: str) -> tuple[int, str, str]:
  try:
    code = main(argv)
  except SystemExit as error:
    code = int(error.code or 0)
  out, err = capsys.readouterr()
  return code, out, err


def generated(capsys, model: str, *argv: str) -> dict:
  arguments = ("generate", "--model", model, "--prompt", "abc abc", "--max-tokens", "12", "--json")
  code, out, err = run(capsys, *arguments, *argv)
  assert code == 0, err
  return json.loads(out)


def test_a_reader_of_help_who_has_seen_enough_sees_no_trace():
  command = [sys.executable, "-m", "neurojax", "--help"]
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 0)


@pytest.mark.parametrize("verb", [
  ["demo"], ["inspect"], ["pull"], ["convert"], ["tokenize"], ["generate"], ["chat"], ["stage"], ["eval", "golden"], ["eval", "ppl"], ["eval", "logits"],
  ["bench", "decode"], ["bench", "gemm"], ["bench", "attention"], ["bench", "int8"], ["size"], ["plan"], ["simulate"], ["probe"], ["export"],
], ids=" ".join)  # fmt: skip
def test_every_verb_has_help_with_an_example(capsys, verb: list[str]):
  with pytest.raises(SystemExit) as caught:
    main([*verb, "--help"])
  assert caught.value.code == 0
  out = " ".join(capsys.readouterr().out.split())
  assert f"Example: neurojax {' '.join(verb)}" in out or f"| neurojax {' '.join(verb)}" in out


def test_generate_locally_and_over_stages_gives_the_same(capsys, model: str):
  alone = generated(capsys, model)
  assert len(alone["tokens"]) == len(alone["logprobs"]) == 12 and alone["finish_reason"] == "length"
  cut = generated(capsys, model, "--stages", "2")
  for key in ("tokens", "logprobs", "text", "prompt_tokens"):
    assert cut[key] == alone[key]
  seeded = [
    generated(capsys, model, "--temperature", "2", "--seed", seed) for seed in ("1", "1", "2")
  ]
  assert seeded[0]["tokens"] == seeded[1]["tokens"] != seeded[2]["tokens"]


def test_streamed_text_equals_the_collected(capsys, model: str):
  wanted = generated(capsys, model)["text"]
  arguments = ("generate", "--model", model, "--prompt", "abc abc", "--max-tokens", "12")
  code, out, _ = run(capsys, *arguments)
  assert code == 0 and out == wanted
  # A stop string that the answer holds cuts it there.
  stop = wanted[len(wanted) // 2 :][:2]
  code, out, _ = run(capsys, *arguments, "--stop", stop)
  assert code == 0 and out == wanted[: wanted.index(stop)]


def test_control_tokens_in_a_prompt_need_leave(capsys, model: str):
  plain = generated(capsys, model, "--prompt", "a</s>b")["prompt_tokens"]
  special = generated(capsys, model, "--prompt", "a</s>b", "--special")["prompt_tokens"]
  assert 2 not in plain and special.count(2) == 1 and plain[0] == special[0] == 1


def test_inspect(capsys, model: str):
  code, out, _ = run(capsys, "inspect", model, "--json")
  description = json.loads(out)
  assert code == 0 and description["unsupported"] == []
  code, out, _ = run(capsys, "inspect", model)
  assert code == 0 and "tiny" in out


def test_chat_talks_through_a_pipe_and_keeps_the_turns(model: str):
  command = [sys.executable, "-m", "neurojax", "chat", "--model", model, "--max-tokens", "5"]
  done = subprocess.run(
    command, input="abc\nabc\n", capture_output=True, text=True, timeout=120, check=False
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.count("\n") >= 2


def test_golden_passes_and_fails_by_its_exit_code(capsys, model: str, tmp_path: Path):
  answer = generated(capsys, model)
  case = {
    "prompt": "abc abc",
    "prompt_tokens": answer["prompt_tokens"],
    "tokens": answer["tokens"],
    "logprobs": answer["logprobs"],
    "margins": [1.0] * 12,
  }
  path = tmp_path / "golden.json"
  path.write_text(json.dumps({"cases": [case]}))
  arguments = ("eval", "golden", "--model", model, "--golden", str(path))
  assert run(capsys, *arguments)[0] == 0
  case["tokens"][4] = (case["tokens"][4] + 1) % 200
  path.write_text(json.dumps({"cases": [case]}))
  code, out, _ = run(capsys, *arguments, "--json")
  assert code == 1 and json.loads(out)["cases"][0]["first_difference"] == 4
  path.write_text(json.dumps({"cases": [case], "sha256": "0" * 64, "file": "other.gguf"}))
  code, _, err = run(capsys, *arguments)
  assert code == 2 and "other.gguf" in err


def test_perplexity(capsys, model: str, tmp_path: Path):
  text = tmp_path / "text.txt"
  text.write_text("abc def ghi " * 40)
  arguments = ("eval", "ppl", "--model", model, "--text", str(text), "--ctx", "32", "--json")
  code, out, _ = run(capsys, *arguments)
  alone = json.loads(out)
  assert code == 0 and alone["perplexity"] > 1 and alone["tokens"] == alone["windows"] * 15
  code, out, _ = run(capsys, *arguments, "--stages", "2")
  assert json.loads(out) == alone
  code, out, _ = run(capsys, *arguments, "--stride", "8")
  assert code == 0 and json.loads(out)["tokens"] > alone["tokens"]


def test_bench_writes_its_results(capsys, model: str, tmp_path: Path):
  out_file = tmp_path / "results" / "decode.csv"
  sizes = ("--prefill", "8", "--decode", "4", "--repetitions", "1")
  arguments = ("bench", "decode", "--model", model, *sizes, "--out", str(out_file))
  for _ in range(2):
    assert run(capsys, *arguments)[0] == 0
  rows = list(csv.DictReader(out_file.open()))
  assert [row["what"] for row in rows] == ["decode", "prefill"] * 2
  assert all(float(row["tokens_per_s"]) > 0 and row["jax"] and row["date"] for row in rows)


def test_bench_of_an_architecture(capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
  # How long a busy machine takes for its estimate decides nothing here.
  monkeypatch.setattr(bench, "PATIENCE_S", float("inf"))
  # Nor do its times: of two loops the longer one goes first, and this clock slows down.
  ticks = itertools.count(1)
  clock = types.SimpleNamespace(perf_counter=lambda: next(ticks) ** 0.5)
  monkeypatch.setattr(stage_speed, "time", clock)
  arch = tmp_path / "small.toml"
  arch.write_text(
    "vocab_size = 64\nmodel_dim = 128\nnum_layers = 1\nnum_heads = 2\nnum_kv_heads = 1\n"
    "head_dim = 64\nffn_dim = 128\n"
  )
  out_file = tmp_path / "results" / "decode.csv"
  arguments = ("bench", "decode", "--arch", str(arch), "--context", "8", "--prefill", "8", "16")
  assert run(capsys, *arguments)[0] == 2
  few = ("--repetitions", "1", "--batch", "2", "--out", str(out_file))
  code, out, err = run(capsys, *arguments, "--random", *few)
  assert code == 0 and "small w2a8" in out, err
  rows = list(csv.DictReader(out_file.open()))
  assert [(row["what"], row["length"]) for row in rows] == [
    ("decode", "8"),
    ("prefill", "8"),
    ("prefill", "16"),
  ]


@pytest.mark.parametrize(
  ("argv", "named"),
  [
    (["--arch", "bonsai-8b"], "--random"),
    (["--arch", "gpt-9", "--random"], "bonsai-8b"),
    (["--arch", "bonsai-8b", "--random", "--weights", "int8"], "--weights int8"),
    ([], "either --model FILE or --arch"),
    (["--model", "a.gguf", "--batch", "2"], "no --batch"),
  ],
)
def test_wrong_benchmarks_are_named(capsys, argv: list[str], named: str):
  code, _, err = run(capsys, "bench", "decode", *argv)
  assert code == 2 and named in err.replace("\n", " ")


@pytest.mark.parametrize(
  ("argv", "named"),
  [
    (["--model", "/nowhere/model.gguf", "--prompt", "a"], "/nowhere/model.gguf"),
    (["--prompt", "a", "--max-tokens", "0"], "--max-tokens 0"),
    (["--prompt", "a", "--max-tokens", "9999"], "the context is"),
    (["--prompt", "a", "--temperature", "-1"], "temperature = -1"),
    (["--prompt", "a", "--top-p", "0"], "top_p = 0"),
    (["--prompt", "a", "--seed", "-1"], "seed = -1"),
    (["--prompt", "a", "--stages", "0"], "--stages 0"),
    (["--prompt", "a", "--stages", "2", "--hosts", "127.0.0.1:1"], "give one of them"),
    (["--prompt", "a", "--hosts", "nonsense"], "host:port"),
    (["--prompt", "a", "--context", "100000"], "at most 512 positions"),
    (["--prompt", "a", "--stop", ""], "stop string"),
    ([], "give --prompt"),
    (["--prompt-file", "/nowhere/text"], "/nowhere/text"),
  ],
  ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_wrong_use_is_exit_code_2_and_names_the_value(
  capsys, model: str, argv: list[str], named: str
):
  code, out, err = run(capsys, "generate", "--model", model, *argv)
  assert code == 2 and named in " ".join(err.split()) and out == "" and "Traceback" not in err


def test_an_unreachable_host_is_exit_code_3(capsys, model: str):
  code, _, err = run(
    capsys, "generate", "--model", model, "--prompt", "a", "--hosts", "127.0.0.1:9"
  )
  assert code == 3 and "127.0.0.1:9" in err


def test_interrupting_leaves_no_process_behind(model: str, tmp_path: Path):
  """Ctrl-C reaches the coordinator; the servers it started end with it, also when it is killed."""
  for number, codes in ((signal.SIGINT, (130,)), (signal.SIGKILL, (-9,))):
    command = _hearing_ctrl_c("generate", "--model", model, "--stages", "2", "--prompt", "abc")
    command += ["--max-tokens", "400", "--temperature", "1"]
    heard = tmp_path / "stderr"
    with heard.open("wb") as stderr:
      process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr)
    assert process.stdout is not None
    assert process.stdout.read(1), heard.read_text(encoding="utf-8", errors="replace")
    children = _children(process.pid)
    assert len(children) == 2
    process.send_signal(number)
    assert process.wait(20) in codes
    deadline_s = time.monotonic() + 15
    while any(_alive(pid) for pid in children):
      assert time.monotonic() < deadline_s, "a stage server outlives its coordinator"
      time.sleep(0.1)


@pytest.mark.parametrize("stages", ["1", "2"])
def test_ctrl_c_ends_a_chat_that_waits_for_a_line(model: str, stages: str):
  command = _hearing_ctrl_c("chat", "--model", model, "--max-tokens", "3", "--stages", stages)
  process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
  assert process.stdin is not None and process.stdout is not None
  process.stdin.write(b"abc\n")
  process.stdin.flush()
  assert process.stdout.readline()
  children = _children(process.pid)
  process.send_signal(signal.SIGINT)
  assert process.wait(15) == 130
  deadline_s = time.monotonic() + 15
  while any(_alive(pid) for pid in children):
    assert time.monotonic() < deadline_s, "a stage server outlives its coordinator"
    time.sleep(0.1)


def test_numbers_that_overflow_are_an_engine_failure_here_too(capsys, tmp_path: Path):
  bad = str(tinymodel.write(tmp_path / "bad.gguf", blow_up=4))
  code, out, err = run(capsys, "generate", "--model", bad, "--prompt", "abc")
  assert code == 3 and "NaN or infinite" in err and out == ""


def test_text_is_taken_as_it_is(capsys, model: str, tmp_path: Path):
  text = tmp_path / "text"
  text.write_bytes(b"a\r\nb")
  arguments = ("generate", "--model", model, "--max-tokens", "1", "--json")
  code, out, _ = run(capsys, *arguments, "--prompt-file", str(text))
  _, plain, _ = run(capsys, *arguments, "--prompt", "a\r\nb")
  assert code == 0 and json.loads(out)["prompt_tokens"] == json.loads(plain)["prompt_tokens"]
  text.write_bytes(b"ab\xff")
  code, _, err = run(capsys, *arguments, "--prompt-file", str(text))
  assert code == 2 and str(text) in err and "byte 2" in err


def test_a_context_that_memory_cannot_hold_is_refused_beforehand(capsys, tmp_path: Path):
  config = dataclasses.replace(tinymodel.CONFIG, context_length=2**31 - 1)
  path = str(tinymodel.write(tmp_path / "long.gguf", config=config))
  arguments = ("generate", "--model", path, "--prompt", "a", "--context", "16000000")
  arguments += ("--sequences", "4096")
  code, _, err = run(capsys, *arguments)
  assert code == 2 and "too small" in err


def _hearing_ctrl_c(*arguments: str) -> list[str]:
  """The command, deaf to no Ctrl-C: a shell's background jobs ignore it and pass that on, a terminal's
  do not. Said by the process itself: Python code between fork and exec can fail in a process of many
  threads."""
  script = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execv(sys.executable, [sys.executable, '-m', 'neurojax', *sys.argv[1:]])"
  )
  return [sys.executable, "-c", script, *arguments]


def _children(pid: int) -> list[int]:
  """Processes that any thread of this one started."""
  tasks = Path(f"/proc/{pid}/task").glob("*/children")
  return [int(child) for task in tasks for child in task.read_text().split()]


def _alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
  except (ProcessLookupError, FileNotFoundError):
    return False
