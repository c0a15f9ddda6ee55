"""`neurojax train` on the real step: it learns, it survives being killed, it refuses what is wrong."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from neurojax.cli import main
from neurojax.cli.train import Train
from neurojax.config import ModelConfig, from_toml
from neurojax.engine.api import EngineError
from neurojax.train.config import TrainConfig
from neurojax.train.metrics import WandB
from tests.train.chain import BLIND, LEAST, TINY, write_chain
from tests.train.standin import read_metrics

# Small enough to compile in seconds.
SMALL = ("--model.num-layers", "1", "--model.model-dim", "32", "--model.ffn-dim", "64",
         "--data.batch-size", "8", "--data.seq-len", "32", "--optimizer.warmup-steps", "4",
         "--eval-every", "10", "--eval-batches", "2", "--log-every", "5")  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return write_chain(tmp_path_factory.mktemp("chain"))


def command(data: Path, workdir: Path, *more: str) -> list[str]:
  return [
    "train",
    "--config",
    str(TINY),
    "--workdir",
    str(workdir),
    "--data.folder",
    str(data),
    *more,
  ]


def start(*arguments: str, script: str | None = None, **variables: str) -> subprocess.Popen:
  """The command in a process of its own, which has one device."""
  return subprocess.Popen(
    [sys.executable, *(("-m", "neurojax", *arguments) if script is None else ("-c", script))],
    env={**os.environ, **variables},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def finish(process: subprocess.Popen, code: int = 0) -> str:
  out, _ = process.communicate(timeout=280)
  assert process.returncode == code, out
  return out


def dying(arguments: list[str], step: int, number: int) -> subprocess.Popen:
  """A run that gets this signal the moment it has written down this step."""
  script = f"""
import os, sys
from neurojax.cli import main
from neurojax.train.metrics import MetricsFile
write = MetricsFile.write
def dying(self, record):
  write(self, record)
  if record["step"] == {step} and "event" not in record:
    os.kill(os.getpid(), {int(number)})
MetricsFile.write = dying
sys.exit(main({arguments!r}))
"""
  return start(script=script)


def steps(workdir: Path) -> list[dict]:
  timed = ("seconds_per_step", "tokens_per_s", "mfu")
  records = read_metrics(workdir / "metrics.jsonl")
  return [{k: v for k, v in record.items() if k not in timed} for record in records]


def test_tiny_learns_what_there_is_to_learn(data: Path, tmp_path: Path):
  # Most of the time it computes.
  optimized = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
  out = finish(start(*command(data, tmp_path / "run"), **optimized))
  evaluations = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "valid_loss" in r]
  # Half of the way from knowing the words to knowing everything would be 2.43.
  assert LEAST < evaluations[-1]["valid_loss"] < 2.0 < BLIND, out
  assert [r["step"] for r in evaluations] == [100, 200, 300]


FORTY = (*SMALL, "--steps", "40", "--checkpoint-every", "8")


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A run that was never stopped."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  finish(start(*command(data, workdir, *FORTY)))
  return workdir


def test_a_run_that_is_killed_goes_on_to_the_same_bits(data: Path, whole: Path, tmp_path: Path):
  arguments = command(data, tmp_path / "cut", *FORTY)
  finish(dying(arguments, 11, signal.SIGKILL), -signal.SIGKILL)
  out = finish(dying(arguments, 29, signal.SIGTERM), 128 + signal.SIGTERM)
  assert "the same command goes on from there" in out
  out = finish(start(*arguments))
  assert "goes on from step" in out
  assert steps(tmp_path / "cut") == steps(whole)
  records = [r["step"] for r in steps(tmp_path / "cut") if "event" not in r]
  assert records == list(range(1, 41))
  starts = json.loads((tmp_path / "cut" / "env.json").read_text())
  assert [s["step"] for s in starts][::2] == [0, starts[-1]["step"]] and starts[-1]["step"] >= 29
  # A checkpoint that was being written when the end came may or may not be whole.
  assert starts[1]["step"] in (0, 8)
  assert {"jax", "grain", "numpy"} <= set(starts[0]["versions"]) and starts[0]["devices"]


# In this process there are eight devices.
EIGHT = (*SMALL, "--steps", "6", "--checkpoint-every", "3", "--layout.data", "8")


def run(capsys, *arguments: str) -> tuple[int, str, str]:
  try:
    code = main(arguments)
  except SystemExit as error:
    code = int(error.code or 0)
  out, err = capsys.readouterr()
  return code, out, err


def test_a_run_says_what_it_was_and_is_taken_up_only_by_its_like(
  capsys, data: Path, tmp_path: Path
):
  work = tmp_path / "run"
  code, out, err = run(capsys, *command(data, work, *EIGHT))
  assert code == 0 and "the run begins" in out and "step 5/6" in out, err
  kept = from_toml(TrainConfig, (work / "config.toml").read_text())
  assert (kept.steps, kept.layout.data, kept.data.folder) == (6, 8, str(data))
  before = steps(work)

  code, out, err = run(capsys, *command(data, work, *EIGHT))
  assert code == 0 and "nothing to do" in out and steps(work) == before

  code, _, err = run(capsys, *command(data, work, *EIGHT, "--optimizer.peak-lr", "0.5"))
  assert code == 2 and "optimizer.peak_lr was 0.01, is 0.5" in err and "--overwrite" in err
  code, _, err = run(capsys, *command(data, work, *EIGHT, "--quantization.weights", "none"))
  assert code == 2 and "quantization.weights was 'ternary', is 'none'" in err

  # Steps and evaluation may change, and the folder of the data may move.
  moved = tmp_path / "moved"
  shutil.copytree(data, moved)
  more = ("--eval-every", "4", "--keep", "3", "--layout.data", "4", "--layout.fsdp", "2")
  code, out, err = run(capsys, *command(moved, work, *EIGHT, *more))
  assert code == 0 and "goes on from step 6" in out, err
  assert from_toml(TrainConfig, (work / "config.toml").read_text()).eval_every == 4

  # What cannot be takes nothing away.
  before_refusals = steps(work)
  for wrong in (
    ("--data.batch-size", "512"),
    ("--layout.data", "3"),
    ("--layout.data", "16"),
    ("--init-from", str(TINY)),
  ):
    code, _, err = run(capsys, *command(data, work, *EIGHT, *wrong, "--overwrite"))
    assert code == 2 and steps(work) == before_refusals, err
  code, _, err = run(capsys, *command(data, tmp_path / "new", *EIGHT, "--data.batch-size", "512"))
  assert code == 2 and not (tmp_path / "new").exists()

  other = write_chain(tmp_path, documents=60, valid_fraction=0.3)
  code, _, err = run(capsys, *command(other, work, *EIGHT))
  assert code == 2 and "not those that the run began with" in err

  code, out, err = run(capsys, *command(data, work, *EIGHT, "--overwrite"))
  assert code == 0 and "the run begins" in out, err
  assert steps(work) == before
  assert len(json.loads((work / "env.json").read_text())) == 1


def test_what_is_wrong_is_refused_by_name(capsys, data: Path, tmp_path: Path):
  mine = tmp_path / "mine"
  mine.mkdir()
  (mine / "thesis.txt").write_text("all of it")
  damaged = tmp_path / "damaged"
  shutil.copytree(data, damaged)
  shard = damaged / "train-00000.bin"
  shard.write_bytes(b"\xff\xff" + shard.read_bytes()[2:])
  bad = tmp_path / "bad.toml"
  bad.write_text("steps = ")
  flat = tmp_path / "flat.toml"
  flat.write_text("model = 3")
  work = tmp_path / "run"
  for arguments, named in {
    (*command(data, work), "--stepps", "3"): "--stepps: neither an option nor a key",
    (*command(data, work), "--steps"): "--steps: a value is missing",
    (*command(data, work), "--steps", "many"): "steps = 'many': expected int",
    (*command(data, work), "--steps", "0"): "steps = 0",
    (*command(data, work), "stray"): "'stray': not an option",
    (*command(data, work), "--model.vocab-size", "300"): "model.vocab_size = 300 is less than the",
    (*command(data, work), "--data.seq-len", "512"): "exceeds model.context_length",
    (
      *command(data, work, *EIGHT),
      "--attention",
      "cudnn",
      "--compute-dtype",
      "bfloat16",
    ): "attention = 'cudnn': the devices are of kind 'cpu'",
    (*command(data, mine), *EIGHT, "--overwrite"): "a folder of other things",
    tuple(command(tmp_path / "none", work)): "no such file",
    tuple(command(damaged, work, *EIGHT)): "train-00000.bin: missing or not the bytes",
    tuple(
      command(data, work, *EIGHT, "--data.batch-size", "512")
    ): "fewer than the 512 of one batch",
    ("train", "--config", str(bad), "--workdir", str(work)): "bad.toml: not valid TOML",
    ("train", "--config", str(flat), "--model.num-layers", "1"): "model = 3 in the configuration",
    ("train", "--config", str(TINY)): "--workdir is missing",
    (
      "train",
      "--config",
      "tyni",
    ): "--config tyni: no such file: give a TOML file, or one of embedded",
    ("train", "--config", "tiny", "--arch", "giant"): "architecture 'giant': give the path",
    ("train", "--config", str(mine)): "a folder: give a TOML file",
    (*command(data, work), "--coordinator", "localhost:1"): "go together",
  }.items():
    code, _, err = run(capsys, *arguments)
    assert code == 2 and named in err, (arguments, err)
  assert (mine / "thesis.txt").read_text() == "all of it"


@pytest.mark.parametrize(
  ("variables", "options", "given"),
  [
    ({}, {}, None),
    ({"SLURM_JOB_ID": "7"}, {}, None),
    ({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "1"}, {}, None),
    ({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "2"}, {}, ()),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, {}, ()),
    ({"KUBERNETES_SERVICE_HOST": "k"}, {}, None),
    ({}, {"distributed": True}, ()),
    ({}, {"coordinator": "a:1", "processes": 3, "process": 2}, ("a:1", 3, 2)),
  ],
)
def test_processes_that_were_started_together_join(monkeypatch, variables, options, given):
  for name in ("SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
    monkeypatch.delenv(name, raising=False)
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  calls: list[tuple] = []
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda *arguments, **_: calls.append(arguments)
  )
  Train(config=str(TINY), **options)._join()
  assert calls == ([] if given is None else [given])


def test_alone_where_a_launcher_is_meant_the_way_without_one_is_named(monkeypatch):
  def alone(**_):
    raise ValueError("coordinator_address should be defined.")

  monkeypatch.setattr(jax.distributed, "initialize", alone)
  with pytest.raises(ValueError, match=r"no launcher says which process.*give --coordinator"):
    Train(config=str(TINY), distributed=True)._join()


@pytest.mark.parametrize(
  ("processes", "words", "named"),
  [
    (2, "Gloo all-reduce failed", "another process.*Gloo"),
    (1, "Gloo", "^Gloo"),
    (2, "a NaN", "^a NaN"),
  ],
)
def test_a_lost_process_is_named(tmp_path: Path, monkeypatch, processes, words: str, named: str):
  def lost(*_):
    raise jax.errors.JaxRuntimeError(words)

  monkeypatch.setattr(Train, "_train", lost)
  monkeypatch.setattr(jax, "process_count", lambda: processes)
  with pytest.raises(Exception, match=named) as raised:
    Train(config=str(TINY), workdir=tmp_path).run()
  assert isinstance(raised.value, EngineError) == named.startswith("another")


def test_the_resolved_configuration_is_shown(capsys):
  code, out, err = run(
    capsys, "train", "--config", str(TINY), "--show", "--optimizer.peak-lr", "1e-3",
    "--optimizer.second_lr=none", "--tracker.tensorboard", "true", "--data.folder", "some where",
  )  # fmt: skip
  assert code == 0, err
  config = from_toml(TrainConfig, out)
  assert (config.optimizer.peak_lr, config.optimizer.second_lr) == (1e-3, None)
  assert config.tracker.tensorboard and config.data.folder == "some where"


def test_a_configuration_and_an_architecture_have_names(capsys, tmp_path: Path):
  code, out, err = run(capsys, "train", "--config", "tiny", "--show")
  assert code == 0, err
  assert from_toml(TrainConfig, out) == TrainConfig.load(TINY)
  sized = tmp_path / "sized.toml"
  code, _, err = run(
    capsys,
    "size",
    "--memory",
    "2GB",
    "--for",
    "train",
    "--vocab",
    "1024",
    "--out-config",
    str(sized),
  )
  assert code == 0, err
  for given in (str(sized), "neurollm-3m"):
    code, out, err = run(
      capsys, "train", "--config", "tiny", "--arch", given, "--model.num-layers", "3", "--show"
    )
    assert code == 0, err
    wanted = dataclasses.replace(ModelConfig.named(given), num_layers=3)
    assert from_toml(TrainConfig, out).model == wanted


def test_tensorboard_is_written_when_asked(capsys, data: Path, tmp_path: Path):
  pytest.importorskip("tensorboardX")
  work = tmp_path / "run"
  code, _, err = run(capsys, *command(data, work, *EIGHT, "--tracker.tensorboard", "true"))
  assert code == 0, err
  [path] = (work / "tb").glob("events.out.*")
  found = {(tag, step): value for tag, step, value in scalars(path.read_bytes())}
  records = read_metrics(work / "metrics.jsonl")
  losses = {r["step"]: r["loss"] for r in records if "loss" in r}
  for step in (5, 6):
    assert found["loss", step] == pytest.approx(losses[step])
  [evaluation] = [r for r in records if "valid_loss" in r]
  assert found["valid_loss", evaluation["step"]] == pytest.approx(evaluation["valid_loss"])


def scalars(data: bytes) -> Iterator[tuple[str, int, float]]:
  """Of a file of TensorBoard: records of a length, its checksum, an event, its checksum."""
  from tensorboardX.proto.event_pb2 import Event

  while data:
    end = 12 + int.from_bytes(data[:8], "little")
    event = Event.FromString(data[12:end])
    for value in event.summary.value:
      yield value.tag, event.step, value.simple_value
    data = data[end + 4 :]


def test_wandb_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("WANDB_SILENT", "true")
  for steps_of_start in ((1, 2), (2, 3)):
    tracker = WandB(tmp_path, "tests", {"steps": 3})
    for step in steps_of_start:
      tracker.log(step, {"loss": 1 / step})
    tracker.close()
  folders = list((tmp_path / "wandb").glob("offline-run-*"))
  name = (tmp_path / "wandb_id").read_text()
  assert folders and all((folder / f"run-{name}.wandb").is_file() for folder in folders)


def test_two_processes_train_one_model_as_one_does(data: Path, whole: Path, tmp_path: Path):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    where = f"127.0.0.1:{free.getsockname()[1]}"
  arguments = command(data, tmp_path / "two", *FORTY, "--data.workers", "1", "--layout.data", "2",
                      "--coordinator", where, "--processes", "2")  # fmt: skip
  both = [start(*arguments, "--process", str(i)) for i in range(2)]
  out = [finish(process) for process in both]
  # Only process 0 speaks and writes.
  assert "held-out loss" in out[0] and "held-out loss" not in out[1]
  assert len(json.loads((tmp_path / "two" / "env.json").read_text())) == 1
  one, two = (
    [(r["step"], r.get("loss", r.get("valid_loss"))) for r in steps(workdir)]
    for workdir in (whole, tmp_path / "two")
  )
  assert [step for step, _ in one] == [step for step, _ in two]
  assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=1e-3)
  # One process alone can go on with what two have saved.
  assert "goes on from step 40" in finish(start(*command(data, tmp_path / "two", *FORTY)))
