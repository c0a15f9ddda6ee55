"""Reads a checkpoint of a training run as the weights of a model."""

import dataclasses
from pathlib import Path

import jax

from neurojax.files.write.parameter_source import ParameterSource
from neurojax.layout import Layout
from neurojax.train.checkpoint import Checkpoints
from neurojax.train.config import TrainConfig
from neurojax.train.deploy import deploy
from neurojax.train.run_folder import CHECKPOINTS, CONFIG
from neurojax.train.step import abstract_state


@dataclasses.dataclass(frozen=True)
class Trained:
  """The model of a checkpoint and its origin.

  Attributes:
    config: Configuration of the run, with the layout of one device.
    step: Number of steps that were taken.
    weights: The numbers that training multiplied by, on the host.
  """

  config: TrainConfig
  step: int
  weights: ParameterSource


def read_run(workdir: Path, step: int | None = None) -> Trained:
  """Reads the newest checkpoint of a run, or that of a step, whatever mesh the run had.

  Raises:
    FileNotFoundError: there is no such folder.
    ValueError: the folder holds no run, or the checkpoint is missing or damaged.
  """
  if not workdir.is_dir():
    raise FileNotFoundError(f"--workdir {workdir}: no such folder")
  if not (workdir / CONFIG).is_file():
    raise ValueError(f"--workdir {workdir}: no run of `neurojax train`: it has no {CONFIG}")
  config = TrainConfig.load(workdir / CONFIG)
  config = dataclasses.replace(config, layout=Layout())
  folder = workdir / CHECKPOINTS
  known = sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())
  if not known:
    raise ValueError(f"{folder}: there is no checkpoint yet: train until checkpoint_every")
  if step is not None and step not in known:
    raise ValueError(f"--step {step}: {folder} has checkpoints of {', '.join(map(str, known))}")
  step = known[-1] if step is None else step
  checkpoints = Checkpoints(folder, keep=config.keep)
  try:
    mesh = config.layout.mesh(jax.local_devices()[:1])
    # The optimizer's moments are twice as large, and of no use here.
    abstract = abstract_state(config, mesh)
    master = checkpoints.restore_fields(step, {"params": abstract.params})["params"]
  finally:
    checkpoints.close()
  return Trained(config, step, ParameterSource(config.model, deploy(master, config), path=workdir))
