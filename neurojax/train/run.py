"""Trains a model, or goes on with a training run: one call for the command line and for Python."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax

from neurojax import count
from neurojax.data.token_shards import check_digests, read_meta
from neurojax.train.config import TrainConfig
from neurojax.train.loop import Loop, Outcome, check_data
from neurojax.train.mesh_program import MeshProgram
from neurojax.train.metrics import Log, TensorBoard, WandB, check_installed
from neurojax.train.pretrained import from_file
from neurojax.train.run_folder import RunFolder


def train(
  config: TrainConfig,
  workdir: Path,
  *,
  overwrite: bool = False,
  say: Callable[[str], None] = lambda _: None,
) -> Outcome:
  """Trains a model, or goes on with the run in a folder from its newest checkpoint.

  Under `jax.distributed` every process calls it; the first one writes the folder.

  Args:
    workdir: Folder of the run: configuration, metrics and checkpoints.
    overwrite: Remove the run in the folder and begin anew.
    say: Called with a line for each report; only by the first process.
  Returns: The last step, its losses, and the signal that ended the run early, if one did.
  Raises:
    ValueError: settings that cannot be, or a run in the folder that was begun with others.
    TrainingError: the loss stayed not finite, or went up, as often as the guard allows.
  """
  first = jax.process_index() == 0
  meta = read_meta(config.data.folder)
  if meta.vocab_size > config.model.vocab_size:
    raise ValueError(
      f"model.vocab_size = {config.model.vocab_size} is less than the {meta.vocab_size} tokens of"
      f" {config.data.folder}: raise it"
    )
  folder = RunFolder(workdir)
  program = MeshProgram(config)
  # Wrong settings are refused before a run begins, and before an old one is removed.
  check_data(config, program)
  _check_trackers(config)
  if overwrite and folder.begun and config.init_from is not None:
    from_file(config.init_from, config.model)
  with contextlib.ExitStack() as stack:
    if first:
      check_digests(config.data.folder)
      stack.enter_context(folder.locked())
      if overwrite:
        folder.clear()
      if folder.begun:
        folder.check(config, meta.identity())
        folder.resume(config)
      else:
        folder.begin(config, meta.identity())
    _meet("folder")
    trackers = _trackers(config, workdir) if first else ()
    report = say if first else (lambda _: None)
    loop = Loop(config, program, folder, trackers=trackers, say=report)
    stack.callback(loop.close)
    if first:
      folder.note_start([str(device) for device in jax.devices()], loop.latest() or 0)
      _introduce(config, loop.latest(), report)
    return loop.run()


def _check_trackers(config: TrainConfig) -> None:
  for tracker, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
    if getattr(config.tracker, tracker):
      check_installed(tracker, package)


def _trackers(config: TrainConfig, workdir: Path) -> tuple[Log, ...]:
  trackers: list[Log] = []
  if config.tracker.tensorboard:
    trackers.append(TensorBoard(workdir / "tb"))
  if config.tracker.wandb:
    trackers.append(WandB(workdir, config.tracker.wandb_project, dataclasses.asdict(config)))
  return tuple(trackers)


def _introduce(config: TrainConfig, latest: int | None, say: Callable[[str], None]) -> None:
  step = "begins" if latest is None else f"goes on from step {latest}"
  say(
    f"{count.parameters(config.model):,} parameters, {config.tokens_per_step:,} tokens a step,"
    f" {config.steps:,} steps; the run {step}"
  )
  if latest is not None and latest >= config.steps:
    say(f"nothing to do: the run has its {config.steps} steps; --steps gives it more")


def _meet(what: str) -> None:
  """Waits for the other processes."""
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(what)
