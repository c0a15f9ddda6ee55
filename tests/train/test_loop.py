"""The loop with a stand-in model: resuming to the bit, surviving what is not finite, ending on a signal."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from neurojax.data.batches import open_dataset
from neurojax.train.config import TrainConfig
from neurojax.train.guard import Guard, GuardConfig
from neurojax.train.loop import Loop, Program, TrainingError, check_data
from neurojax.train.run_folder import RunFolder
from tests.train.standin import Bigrams, read_metrics, settings, write_data


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
  return settings(write_data(tmp_path_factory.mktemp("data")))


class Interrupted(Exception):
  pass


def train(
  config: TrainConfig, workdir: Path, *, program: Bigrams | None = None, die_at: int = 0, say=None
):
  """Runs to the end; or leaves everything as it is, like SIGKILL, when step `die_at` is started."""
  program = program or Bigrams()
  workdir.mkdir(exist_ok=True)
  loop = Loop(config, program, RunFolder(workdir), say=say or (lambda line: None))
  if die_at:
    count, step = 0, program.train_step

    def dying(state, tokens):
      nonlocal count
      count += 1
      if count == die_at:
        raise Interrupted
      return step(state, tokens)

    program.train_step = dying
  try:
    return loop.run()
  finally:
    loop.close()
    # What was being written when the end came is not waited for by the loop.
    loop._checkpoints.close()


def losses(workdir: Path) -> dict[int, float]:
  records = [r for r in read_metrics(workdir / "metrics.jsonl") if "event" not in r]
  return {record["step"]: record["loss"] for record in records}


def stripped(workdir: Path) -> list[dict]:
  """All records, without what a clock says."""
  timed = ("seconds_per_step", "tokens_per_s", "mfu")
  return [
    {key: value for key, value in record.items() if key not in timed}
    for record in read_metrics(workdir / "metrics.jsonl")
  ]


@pytest.mark.parametrize("die_at", [1, 4, 5, 7, 12])
def test_a_run_that_died_goes_on_to_the_same_losses(
  config: TrainConfig, tmp_path: Path, die_at: int
):
  config = dataclasses.replace(config, eval_every=3, eval_batches=2)
  train(config, tmp_path / "whole")
  with pytest.raises(Interrupted):
    train(config, tmp_path / "cut", die_at=die_at)
  train(config, tmp_path / "cut")
  assert stripped(tmp_path / "cut") == stripped(tmp_path / "whole")
  assert sorted(losses(tmp_path / "cut")) == list(range(1, 13))


def test_the_stand_in_is_a_program():
  assert isinstance(Bigrams(), Program)


def test_no_evaluation_needs_no_held_out_split(tmp_path: Path):
  config = settings(write_data(tmp_path, valid_fraction=0.0))
  check_data(config, Bigrams())
  assert train(config, tmp_path / "run").valid_loss is None
  with pytest.raises(ValueError, match="valid"):
    check_data(dataclasses.replace(config, eval_batches=1), Bigrams())


def test_the_loss_falls(config: TrainConfig, tmp_path: Path):
  train(config, tmp_path)
  found = losses(tmp_path)
  assert found[12] < found[1] - 0.3


def poisoned(config: TrainConfig, *numbers: int) -> Bigrams:
  data = open_dataset(config.data)
  batches = [next(data) for _ in range(max(numbers) + 1)]
  program = Bigrams()
  program.poison(*(batches[number] for number in numbers))
  return program


def test_a_step_that_is_not_finite_is_skipped_and_named(config: TrainConfig, tmp_path: Path):
  said = []
  train(config, tmp_path, program=poisoned(config, 5), say=said.append)
  records = {r["step"]: r for r in read_metrics(tmp_path / "metrics.jsonl")}
  assert records[6]["loss"] is None and records[6]["verdict"] == "skipped"
  assert any("step 6: skipped" in line for line in said)
  assert len(records) == 12 and all(records[step]["loss"] for step in range(7, 13))


@pytest.mark.parametrize("die_at", [0, 7, 9, 10, 14])
def test_several_in_a_row_go_back_to_the_checkpoint_and_on_behind_them(
  config: TrainConfig, tmp_path: Path, die_at: int
):
  config = dataclasses.replace(config, guard=GuardConfig(skips=2))
  program = poisoned(config, 5, 6)
  if die_at:
    with pytest.raises(Interrupted):
      train(config, tmp_path, program=program, die_at=die_at)
    program = poisoned(config, 5, 6)
  train(config, tmp_path, program=program)
  records = read_metrics(tmp_path / "metrics.jsonl")
  events = [r for r in records if r.get("event") == "back"]
  assert [(e["step"], e["to_step"], e["next_batch"]) for e in events] == [(7, 4, 7)]
  steps = [r["step"] for r in records if "event" not in r]
  assert steps == [1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8, 9, 10, 11, 12]
  # The batch after the bad ones follows on the checkpoint: none of them is seen again.
  if not die_at:
    data = open_dataset(config.data)
    batches = [next(data) for _ in range(15)]
    used = [
      next(i for i, b in enumerate(batches) if np.array_equal(b, seen)) for seen in program.seen
    ]
    # Batch 7 was under way when batch 6 was found bad.
    assert used == [0, 1, 2, 3, 4, 5, 6, 7, 7, 8, 9, 10, 11, 12, 13, 14]


def test_going_back_too_often_is_an_error_that_says_so(config: TrainConfig, tmp_path: Path):
  config = dataclasses.replace(config, guard=GuardConfig(skips=1, returns=2))
  with pytest.raises(TrainingError, match=r"already went back 2 times.*guard\.returns"):
    train(config, tmp_path, program=poisoned(config, 5, 6, 7))


def test_a_spike_goes_back_if_asked_to(config: TrainConfig, tmp_path: Path):
  guard = GuardConfig(spike_factor=1.5, spike_window=8)
  config = dataclasses.replace(config, guard=guard)
  program = Bigrams(learning_rate=1e-3)
  step, count = program.train_step, 0

  def spiking(state, tokens):
    nonlocal count
    count += 1
    state, metrics = step(state, tokens)
    return state, {**metrics, "loss": metrics["loss"] * (3 if count == 6 else 1)}

  program.train_step = spiking
  train(config, tmp_path, program=program)
  events = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r.get("event") == "back"]
  assert [(e["step"], e["to_step"]) for e in events] == [(6, 4)]
  assert "times the median" in events[0]["reason"]


def test_the_guard_judges_no_spike_before_it_knows_what_is_usual():
  guard = Guard(GuardConfig(spike_factor=2.0, spike_window=10))
  assert [guard.observe(loss, True) for loss in (1, 100, 1, 1, 1)] == ["fine"] * 5
  assert guard.observe(2.1, True) == "back" and guard.observe(1.9, True) == "fine"
  again = Guard(GuardConfig(spike_factor=2.0, spike_window=10))
  again.set_state(json.loads(json.dumps(guard.get_state())))
  assert again.get_state() == guard.get_state()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends(config: TrainConfig, tmp_path: Path, number: int):
  program = Bigrams()
  step, count = program.train_step, 0

  def signalled(state, tokens):
    nonlocal count
    count += 1
    if count == 6:
      os.kill(os.getpid(), number)
    return step(state, tokens)

  program.train_step = signalled
  before = signal.getsignal(number)
  outcome = train(config, tmp_path / "cut", program=program)
  assert (outcome.step, outcome.stopped_by) == (6, number)
  assert signal.getsignal(number) is before
  assert (tmp_path / "cut" / "checkpoints" / "6").is_dir()
  assert train(config, tmp_path / "cut").stopped_by is None
  train(config, tmp_path / "whole")
  assert stripped(tmp_path / "cut") == stripped(tmp_path / "whole")


def test_a_half_written_checkpoint_is_no_checkpoint(config: TrainConfig, tmp_path: Path):
  train(config, tmp_path / "whole")
  with pytest.raises(Interrupted):
    train(config, tmp_path / "cut", die_at=7)
  partial = tmp_path / "cut" / "checkpoints" / "8.orbax-checkpoint-tmp"
  (partial / "state").mkdir(parents=True)
  (partial / "state" / "d").write_bytes(b"half")
  train(config, tmp_path / "cut")
  assert stripped(tmp_path / "cut") == stripped(tmp_path / "whole")


def test_a_damaged_checkpoint_is_named_with_the_remedy(config: TrainConfig, tmp_path: Path):
  with pytest.raises(Interrupted):
    train(config, tmp_path, die_at=7)
  for file in (tmp_path / "checkpoints" / "4" / "state").rglob("*"):
    if file.is_file():
      file.write_bytes(b"")
  with pytest.raises(
    ValueError,
    match=r"checkpoints/4: this checkpoint cannot be read: remove that folder to go on from step 0",
  ):
    train(config, tmp_path)


def test_only_so_many_checkpoints_are_kept(config: TrainConfig, tmp_path: Path):
  train(config, tmp_path)
  kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
  assert kept == [8, 12]


def test_more_steps_go_on_from_the_end(config: TrainConfig, tmp_path: Path):
  train(config, tmp_path / "two")
  train(dataclasses.replace(config, steps=18), tmp_path / "two")
  train(dataclasses.replace(config, steps=18), tmp_path / "one")
  assert losses(tmp_path / "two") == losses(tmp_path / "one")
