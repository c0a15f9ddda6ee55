"""Writes the metrics of a run: to metrics.jsonl always, to other trackers on request."""

import importlib.util
import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from neurojax.files.put import saying_no_room

Value = float | int | str | bool | None


@runtime_checkable
class Log(Protocol):
  """A tracker of metrics."""

  def log(self, step: int, values: Mapping[str, float]) -> None: ...

  def close(self) -> None: ...


class MetricsFile:
  """metrics.jsonl: a line per training step (`step`, `loss`, ...) and per event (`event`, `step`).

  A number that is not finite is null: JSON has no other word for it. A checkpoint keeps `offset`; `cut`
  at it removes what a run wrote after that checkpoint.
  """

  def __init__(self, path: Path):
    self._path = path
    self._file = path.open("ab")

  @property
  def offset(self) -> int:
    return self._file.tell()

  def cut(self, offset: int) -> None:
    """Removes what lies behind an offset. Raises: ValueError: the file is shorter than that."""
    if self._file.tell() < offset:
      raise ValueError(
        f"{self._path}: {self._file.tell()} bytes, but the checkpoint was made at {offset}: the file"
        " was changed; put it back, or begin anew with --overwrite"
      )
    self._file.truncate(offset)
    self._file.seek(offset)

  def write(self, record: Mapping[str, Value]) -> None:
    plain = {
      key: None if isinstance(value, float) and not math.isfinite(value) else value
      for key, value in record.items()
    }
    with saying_no_room(self._path):
      self._file.write(json.dumps(plain).encode() + b"\n")
      self._file.flush()

  def sync(self) -> None:
    os.fsync(self._file.fileno())

  def close(self) -> None:
    self._file.close()


class TensorBoard:
  def __init__(self, folder: Path):
    check_installed("tensorboard", "tensorboardX")
    from tensorboardX import SummaryWriter

    self._writer = SummaryWriter(str(folder))

  def log(self, step: int, values: Mapping[str, float]) -> None:
    for name, value in values.items():
      self._writer.add_scalar(name, value, step)

  def close(self) -> None:
    self._writer.close()


class WandB:
  """Weights & Biases, as its own environment variables say (WANDB_MODE, WANDB_PROJECT, ...)."""

  def __init__(self, workdir: Path, project: str, config: Mapping[str, object]):
    check_installed("wandb", "wandb")
    import wandb

    # The same folder goes on with the same run.
    kept = workdir / "wandb_id"
    if not kept.exists():
      kept.write_text(secrets.token_hex(4))
    self._run = wandb.init(
      project=project,
      dir=workdir,
      id=kept.read_text(),
      resume="allow",
      name=workdir.name,
      config=dict(config),
    )
    # An axis of ours: its own takes no step twice, and a run that goes back or was killed has some.
    self._run.define_metric("*", step_metric="step")

  def log(self, step: int, values: Mapping[str, float]) -> None:
    self._run.log({"step": step, **values})

  def close(self) -> None:
    self._run.finish()


def check_installed(tracker: str, package: str) -> None:
  """Raises: ValueError: the package of a tracker is not installed."""
  if importlib.util.find_spec(package) is None:
    raise ValueError(
      f"tracker.{tracker} needs {package}, which is not installed:"
      ' `make setup EXTRA=trackers`, or `pip install "CHECKOUT[trackers]"`'
    )
