"""The folder of a training run, which keeps what the run was started with so that it can go on.

config.toml      the resolved configuration
data.json        digest of the data it trains on
env.json         one entry per start: versions, devices, commit, command line
metrics.jsonl    see `train.metrics`
checkpoints/     STEP/, see `train.checkpoint`
tb/, wandb/      other trackers, if asked for
"""

import contextlib
import dataclasses
import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurojax.config import from_toml, to_toml
from neurojax.files.put import stored

if TYPE_CHECKING:
  from neurojax.train.config import TrainConfig

CONFIG, DATA, ENVIRONMENT, METRICS = "config.toml", "data.json", "env.json", "metrics.jsonl"
CHECKPOINTS = "checkpoints"
_ALL = (CONFIG, DATA, ENVIRONMENT, METRICS, CHECKPOINTS, "tb", "wandb", "wandb_id", ".lock")

MAY_CHANGE = (
  "steps", "eval_every", "eval_batches", "checkpoint_every", "keep", "log_every", "tracker", "layout",
  "remat", "guard", "data.folder", "data.workers", "init_from",
)  # fmt: skip
"""Keys that may differ when a run goes on. `steps` changes the rest of the learning-rate schedule;
another `layout` or `remat` gives the same losses to rounding, not to the bit; data.folder may have
moved but not changed."""


class RunFolder:
  """A folder that holds a run or will hold one. Raises: ValueError: it holds something else."""

  def __init__(self, path: Path):
    self.path = path
    if path.exists() and not path.is_dir():
      raise ValueError(f"--workdir {path}: this is a file: name a folder")
    if path.exists() and any(path.iterdir()) and not self.begun and not self._only_ours():
      raise ValueError(f"--workdir {path}: a folder of other things: name a new or empty one")

  def _only_ours(self) -> bool:
    return all(entry.name in _ALL for entry in self.path.iterdir())

  @property
  def begun(self) -> bool:
    return (self.path / CONFIG).is_file()

  @contextlib.contextmanager
  def locked(self) -> Iterator[None]:
    """Holds the folder for this process. Raises: ValueError: another process trains in it."""
    self.path.mkdir(parents=True, exist_ok=True)
    with (self.path / ".lock").open("w") as lock:
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except OSError as error:
        raise ValueError(f"--workdir {self.path}: another process trains in it") from error
      yield

  def clear(self) -> None:
    """Removes a run, and nothing else."""
    # The configuration goes first: a folder that was cleared in part is no run.
    for name in _ALL:
      entry = self.path / name
      if name == ".lock":
        continue
      if entry.is_dir():
        shutil.rmtree(entry)
      else:
        entry.unlink(missing_ok=True)

  def check(self, config: "TrainConfig", identity: str) -> None:
    """Raises: ValueError: the run here was begun with another configuration or other data."""
    path = self.path / CONFIG
    before = from_toml(type(config), path.read_text(encoding="utf-8"), where=str(path))
    changed = [
      (name, old, new) for name, old, new in differences(before, config) if not may_change(name)
    ]
    if changed:
      said = "; ".join(f"{name} was {old!r}, is {new!r}" for name, old, new in changed)
      raise ValueError(
        f"--workdir {self.path} holds a run of another configuration: {said}. Take another --workdir,"
        f" put it back, or begin anew with --overwrite; what may change: {', '.join(MAY_CHANGE)}"
      )
    known = json.loads((self.path / DATA).read_text(encoding="utf-8"))["identity"]
    if known != identity:
      raise ValueError(
        f"--workdir {self.path}: the data in {config.data.folder} are not those that the run began"
        " with: prepare the same, take another --workdir, or begin anew with --overwrite"
      )

  def begin(self, config: "TrainConfig", identity: str) -> None:
    """Writes down data and configuration of a new run; `config.toml` comes last."""
    self.path.mkdir(parents=True, exist_ok=True)
    _replace(self.path / DATA, json.dumps({"identity": identity}) + "\n")
    self.resume(config)

  def resume(self, config: "TrainConfig") -> None:
    """Writes down the configuration that the run goes on with."""
    _replace(self.path / CONFIG, to_toml(config))

  def note_start(self, devices: Sequence[str], step: int) -> None:
    """Adds this start to env.json."""
    path = self.path / ENVIRONMENT
    starts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    starts.append({**environment(), "devices": list(devices), "step": step})
    _replace(path, json.dumps(starts, indent=1) + "\n")


def may_change(name: str) -> bool:
  return any(name == allowed or name.startswith(f"{allowed}.") for allowed in MAY_CHANGE)


def differences(before: Any, after: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
  """Lists (dotted name, before, after) of fields in which two configurations of one class differ."""
  found = []
  for field in dataclasses.fields(before):
    old, new = getattr(before, field.name), getattr(after, field.name)
    name = prefix + field.name
    if dataclasses.is_dataclass(old) and type(old) is type(new):
      found += differences(old, new, f"{name}.")
    elif old != new:
      found.append((name, old, new))
  return found


def environment() -> dict[str, Any]:
  """Describes what a result may depend on besides the configuration."""
  versions = {}
  for package in (
    "neurojax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
  ):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[package] = importlib.metadata.version(package)
  return {
    "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "command": shlex.join(sys.argv),
    "commit": _commit(),
    "python": platform.python_version(),
    "host": platform.node(),
    "versions": versions,
    "flags": {
      name: os.environ[name] for name in ("XLA_FLAGS", "JAX_PLATFORMS") if name in os.environ
    },
  }


def _commit() -> str | None:
  """The commit of the repository that holds this package, with "+" if files were changed."""

  def git(*arguments: str) -> str:
    return subprocess.run(
      ["git", "-C", str(Path(__file__).parent), *arguments],
      capture_output=True, text=True, timeout=20, check=True,
    ).stdout.strip()  # fmt: skip

  try:
    return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
  except (OSError, subprocess.SubprocessError):
    return None


def _replace(path: Path, text: str) -> None:
  partial = path.with_name(f".{path.name}.partial")
  with stored(partial) as file:
    file.write(text.encode("utf-8"))
  os.replace(partial, path)
