"""`neurojax train`: trains a model, or goes on with a training run."""

import dataclasses
import difflib
import os
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
  from neurojax.train.config import TrainConfig
  from neurojax.train.metrics import Log

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
    from neurojax.config import from_dict, to_toml
    from neurojax.train.config import TrainConfig

    table = _read(self.config)
    if self.arch is not None:
      table["model"] = _architecture(self.arch)
    table = merged(table, self.overrides, TrainConfig)
    config = from_dict(TrainConfig, table, where=f"{self.config} and options")
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
    import contextlib

    import jax

    from neurojax.data.token_shards import check_digests, read_meta
    from neurojax.folders import cache_dir
    from neurojax.stage.compile import use_compilation_cache
    from neurojax.train.loop import Loop, TrainingError, check_data
    from neurojax.train.mesh_program import MeshProgram
    from neurojax.train.run_folder import RunFolder

    use_compilation_cache(cache_dir() / "xla")
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
    if self.overwrite and folder.begun and config.init_from is not None:
      from neurojax.train.pretrained import from_file

      from_file(config.init_from, config.model)
    with contextlib.ExitStack() as stack:
      if first:
        check_digests(config.data.folder)
        stack.enter_context(folder.locked())
        if self.overwrite:
          folder.clear()
        if folder.begun:
          folder.check(config, meta.identity())
          folder.resume(config)
        else:
          folder.begin(config, meta.identity())
      _meet("folder")
      trackers = _trackers(config, workdir) if first else ()
      say = _say if first else _nothing
      loop = Loop(config, program, folder, trackers=trackers, say=say)
      stack.callback(loop.close)
      if first:
        folder.note_start([str(device) for device in jax.devices()], loop.latest() or 0)
        _introduce(config, loop.latest())
      try:
        outcome = loop.run()
      except TrainingError as error:
        print(f"neurojax: {error}", file=sys.stderr)
        return FAILED
    if outcome.stopped_by is None:
      return 0
    say(f"stopped at step {outcome.step}; the same command goes on from there")
    return INTERRUPTED if outcome.stopped_by == 2 else TERMINATED


def launched_in_parallel() -> bool:
  """Tells whether srun or mpirun started this process as one of several.

  A shell inside an allocation has SLURM_JOB_ID too, but no step of several tasks, and must not wait for
  others.
  """
  counts = (os.environ.get(name, "") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
  return any(count.isdigit() and int(count) > 1 for count in counts)


def merged(table: dict[str, Any], overrides: Sequence[str], cls: type) -> dict[str, Any]:
  """Puts options into the table of a configuration: `--a.b-c VALUE`, `--a.b_c=VALUE`.

  Values are TOML, or else strings; `none` removes the key.

  Raises: ValueError: an option without value, a value without option, or no such key.
  """
  table = {key: dict(value) if isinstance(value, dict) else value for key, value in table.items()}
  known = list(keys_of(cls))
  rest = list(overrides)
  while rest:
    option = rest.pop(0)
    name, equals, value = option.partition("=")
    if not name.startswith("--") and not equals:
      raise ValueError(f"{option!r}: not an option: keys are given as --steps 100")
    if not equals:
      if not rest or rest[0].startswith("--"):
        raise ValueError(f"{option}: a value is missing")
      value = rest.pop(0)
    key = name.removeprefix("--").replace("-", "_")
    if key not in known:
      near = difflib.get_close_matches(key, known, 3)
      hint = f"do you mean {' or '.join(near)}?" if near else "--show prints all keys"
      raise ValueError(f"{name}: neither an option nor a key of the configuration: {hint}")
    place = table
    *parents, leaf = key.split(".")
    for parent in parents:
      place = place.setdefault(parent, {})
      if not isinstance(place, dict):
        raise ValueError(f"{name}: {parent} = {place!r} in the configuration is no table")
    if value.lower() == "none":
      place.pop(leaf, None)
    else:
      place[leaf] = _value(value)
  return table


def keys_of(cls: type, prefix: str = "") -> "list[str]":
  """Lists the dotted names of all values of a configuration."""
  import typing

  hints = typing.get_type_hints(cls)
  found: list[str] = []
  for field in dataclasses.fields(cls):
    hint = hints[field.name]
    nested = dataclasses.is_dataclass(hint)
    found += keys_of(hint, f"{prefix}{field.name}.") if nested else [prefix + field.name]
  return found


def _value(text: str) -> Any:
  try:
    table = tomllib.loads(f"value = {text}")
  except tomllib.TOMLDecodeError:
    return text
  return table["value"] if len(table) == 1 else text


def recipes() -> dict[str, Path]:
  """The named configurations: configs/train/NAME.toml of the repository or the installed package."""
  from neurojax.config import named_configs

  return named_configs("train")


def _read(given: str) -> dict[str, Any]:
  """Reads a configuration by its path or name. Raises: ValueError or OSError: there is none."""
  path = Path(given)
  known = recipes()
  if not path.suffix and not path.exists() and given in known:
    path = known[given]
  try:
    return tomllib.loads(path.read_bytes().decode("utf-8"))
  except (FileNotFoundError, IsADirectoryError) as error:
    what = "a folder" if path.is_dir() else "no such file"
    raise type(error)(
      f"--config {given}: {what}: give a TOML file, or one of {', '.join(known)}"
    ) from error
  except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f"{path}: not valid TOML: {error}") from error


def _architecture(given: str) -> dict[str, Any]:
  """Reads an architecture as a [model] table. Raises: ValueError: there is none, or it is wrong."""
  from neurojax.config import ModelConfig, to_toml

  return tomllib.loads(to_toml(ModelConfig.named(given)))


def _check_trackers(config: "TrainConfig") -> None:
  from neurojax.train.metrics import check_installed

  for tracker, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
    if getattr(config.tracker, tracker):
      check_installed(tracker, package)


def _trackers(config: "TrainConfig", workdir: Path) -> "tuple[Log, ...]":
  from neurojax.train.metrics import TensorBoard, WandB

  trackers: list[Log] = []
  if config.tracker.tensorboard:
    trackers.append(TensorBoard(workdir / "tb"))
  if config.tracker.wandb:
    trackers.append(WandB(workdir, config.tracker.wandb_project, dataclasses.asdict(config)))
  return tuple(trackers)


def _introduce(config: "TrainConfig", latest: int | None) -> None:
  from neurojax import count

  step = "begins" if latest is None else f"goes on from step {latest}"
  _say(
    f"{count.parameters(config.model):,} parameters, {config.tokens_per_step:,} tokens a step,"
    f" {config.steps:,} steps; the run {step}"
  )
  if latest is not None and latest >= config.steps:
    _say(f"nothing to do: the run has its {config.steps} steps; --steps gives it more")


def _meet(what: str) -> None:
  """Waits for the other processes."""
  import jax

  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(what)


def _say(line: str) -> None:
  print(line, flush=True)


def _nothing(line: str) -> None:
  pass
