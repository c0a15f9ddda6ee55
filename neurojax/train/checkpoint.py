"""Checkpoints of a training run: the sharded state, and all else that decides how the run goes on."""

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

T = TypeVar("T")

_STATE, _REST = "state", "rest"


class Checkpoints:
  """The checkpoints in `folder`/STEP/. They are written while training goes on; unfinished ones do not count.

  Every process of a run calls every method, in the same order.
  """

  def __init__(self, folder: Path, *, keep: int):
    self._folder = folder.absolute()
    _quiet()
    self._manager = ocp.CheckpointManager(
      self._folder,
      item_names=(_STATE, _REST),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=True, create=True
      ),
    )

  def latest(self) -> int | None:
    """The step of the newest checkpoint; None: there is none."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any, rest: dict[str, Any]) -> None:
    """Starts to save, and returns when the state has been copied.

    Errors of what is written after that are raised by the next call.

    Args:
      state: A pytree of arrays.
      rest: Plain values that JSON can hold: data position, guard, metrics.
    Raises: OSError: this checkpoint or the previous one cannot be written.
    """
    with self._writing():
      self._manager.save(
        step,
        args=ocp.args.Composite(
          **{_STATE: ocp.args.StandardSave(state), _REST: ocp.args.JsonSave(rest)}
        ),
      )

  def restore(self, step: int, abstract: T) -> tuple[T, dict[str, Any]]:
    """Reads the state and the rest of a step.

    Args:
      abstract: Shapes, dtypes and shardings that the state is to have.
    Raises: ValueError: the checkpoint is damaged, or of another state.
    """
    found = self._restore(
      step,
      **{_STATE: ocp.args.StandardRestore(abstract), _REST: ocp.args.JsonRestore()},
    )
    return found[_STATE], found[_REST]

  def restore_fields(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
    """Reads some fields of the state as `restore` does, without the memory for the others."""
    found = self._restore(
      step,
      **{
        _STATE: ocp.args.PyTreeRestore(
          item=abstract,
          restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
          partial_restore=True,
        )
      },
    )
    return found[_STATE]

  def _restore(self, step: int, **items: Any) -> Any:
    self.wait()
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:
      others = [other for other in self._manager.all_steps() if other != step]
      remedy = f"go on from step {max(others)}" if others else "start anew"
      raise ValueError(
        f"{self._folder / str(step)}: this checkpoint cannot be read: remove that folder to {remedy}"
        f" ({_one_line(error)})"
      ) from error

  def wait(self) -> None:
    """Waits until everything is on disk. Raises: OSError: something cannot be written."""
    with self._writing():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits and closes. Raises: OSError: something cannot be written."""
    self.wait()
    self._manager.close()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    try:
      yield
    except jax.errors.JaxRuntimeError:
      # Such errors are about other processes, for example a lost one, not about this one's disk.
      raise
    except Exception as error:
      kept = self._manager.latest_step()
      last = "none is there" if kept is None else f"the run goes on from step {kept}"
      full = "no room is left on the disk: make some" if _NO_ROOM in str(error) else "see to that"
      raise OSError(
        f"{self._folder}: a checkpoint cannot be written: {full}, and give the same command; {last}"
        f" ({_one_line(error)})"
      ) from error


def _one_line(error: Exception) -> str:
  """The beginning of an error's text: TensorStore adds pages of its settings."""
  return " ".join(str(error).split())[:300]


_NO_ROOM = "os_error_code='28'"
"""TensorStore's words for ENOSPC."""


def _quiet() -> None:
  """Keeps Orbax and TensorStore from writing about failures that Orbax raises as well."""
  logging.getLogger("absl").addFilter(_is_not_of_orbax)
  logging.getLogger("asyncio").addFilter(_is_not_of_tensorstore)
  if getattr(sys.unraisablehook, "func", None) is not _report:
    sys.unraisablehook = functools.partial(_report, sys.unraisablehook)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
  return "orbax" not in record.pathname


def _is_not_of_tensorstore(record: logging.LogRecord) -> bool:
  return "OCDBT" not in record.getMessage()


def _report(report: Callable[[Any], object], unraisable: Any) -> None:
  """Hides what TensorStore says when it ends something that Orbax waited for until a first failure."""
  if str(unraisable.exc_value) != "Event loop is closed":
    report(unraisable)
