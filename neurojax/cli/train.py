"""`neurojax train`: trains a model, or goes on with a training run."""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from neurojax.cli.process import discard_output, say_error

if TYPE_CHECKING:
  from neurojax.train.config import TrainConfig

FAILED, TERMINATED, INTERRUPTED = 1, 143, 130


_LOST_S = 30
"""Seconds without a heartbeat after which a process of a run counts as dead, and the others end."""

_LOST = ("Gloo", "NCCL", "heartbeat", "UNAVAILABLE")
"""Words in the errors of processes that wait for a lost one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
  """Train a model as a TOML file says, or go on with a run.

  Every key of the configuration is an option too and overrides it: --steps 100, --data.folder books,
  --optimizer.peak-lr 1e-3; `none` removes a key. --show prints the result and all keys.

  --steps is the length of the schedule too: learning rates decay towards the last step, and the second
  stage begins at a fraction of all steps. A run that goes on with another number follows the schedule of
  that number from there on.

  With the same --workdir a run goes on from its newest checkpoint, to the same losses to the bit.
  SIGTERM and Ctrl-C save a checkpoint and end the run (exit codes 143 and 130).

  Example: neurojax train --config tiny --workdir runs/tiny --data.folder data/books
  """

  config: Annotated[str, tyro.conf.arg(metavar="NAME|TOML")]
  """The run's configuration: a TOML file, or the name of one in configs/train."""
  arch: Annotated[str | None, tyro.conf.arg(metavar="NAME|TOML")] = None
  """An architecture in place of the configuration's [model]: a TOML file, as `neurojax size --out-config`
  writes it, or the name of one in configs/model. --model.num-layers and the like override it."""
  workdir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
  """Folder of the run: its configuration, metrics and checkpoints."""
  overwrite: bool = False
  """Remove the run in the folder and begin anew."""
  show: bool = False
  """Print the resolved configuration and end."""
  distributed: bool = False
  """Join the other processes of the run, which JAX finds by itself under Slurm, Open MPI and Kubernetes;
  under srun and mpirun this is the default."""
  coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
  """Address of process 0, where JAX cannot find the others; needs --processes and --process."""
  processes: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
  """Number of processes of the run."""
  process: Annotated[int | None, tyro.conf.arg(metavar="I")] = None
  """Number of this process, from 0."""
  overrides: tyro.conf.Suppress[tuple[str, ...]] = ()

  def run(self) -> int:
    given = [self.coordinator, self.processes, self.process]
    if None in given and any(value is not None for value in given):
      raise ValueError("--coordinator, --processes and --process go together: give all or none")
    from neurojax.config import to_toml
    from neurojax.train.settings import read_config

    config = read_config(self.config, arch=self.arch, overrides=self.overrides)
    if self.show:
      print(to_toml(config), end="")
      return 0
    if self.workdir is None:
      raise ValueError("--workdir is missing: name the folder of the run")
    self._join()
    import jax

    from neurojax.engine.api import EngineError

    try:
      return self._train(config, self.workdir)
    except jax.errors.JaxRuntimeError as error:
      if jax.process_count() == 1 or not any(word in str(error) for word in _LOST):
        raise
      raise EngineError(
        "another process of this run was lost: start all of them again, and the run goes on from its"
        f" last checkpoint ({error})"
      ) from error

  def _join(self) -> None:
    """Joins the other processes of the run, if there are any."""
    import jax

    if self.coordinator is not None:
      jax.distributed.initialize(
        self.coordinator, self.processes, self.process, heartbeat_timeout_seconds=_LOST_S
      )
    elif self.distributed or launched_in_parallel():
      try:
        jax.distributed.initialize(heartbeat_timeout_seconds=_LOST_S)
      except ValueError as error:
        raise ValueError(
          f"no launcher says which process this is ({error}): JAX knows Slurm, Open MPI and Kubernetes"
          " (pip install jax[k8s]); elsewhere give --coordinator, --processes and --process"
        ) from error

  def _train(self, config: "TrainConfig", workdir: Path) -> int:
    from neurojax.folders import cache_dir
    from neurojax.stage.compilation_cache import use_compilation_cache
    from neurojax.train.loop import TrainingError
    from neurojax.train.run import train

    use_compilation_cache(cache_dir() / "xla")
    try:
      outcome = train(config, workdir, overwrite=self.overwrite, say=_say)
    except TrainingError as error:
      say_error(error)
      return FAILED
    if outcome.stopped_by is None:
      return 0
    _say(f"stopped at step {outcome.step}; the same command goes on from there")
    return INTERRUPTED if outcome.stopped_by == 2 else TERMINATED


def launched_in_parallel() -> bool:
  """Tells whether srun or mpirun started this process as one of several.

  A shell inside an allocation has SLURM_JOB_ID too, but no step of several tasks, and must not wait for
  others.
  """
  counts = (os.environ.get(name, "") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
  return any(count.isdigit() and int(count) > 1 for count in counts)


def _say(line: str) -> None:
  """Print a line; a run goes on to its end when nobody reads its lines any more."""
  try:
    print(line, flush=True)
  except OSError:
    discard_output()
