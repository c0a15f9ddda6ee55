"""Checkpoints that cannot be written."""

import logging
from pathlib import Path

import jax.numpy as jnp
import pytest

from neurojax.train.checkpoint import Checkpoints

STATE = {"a": jnp.arange(3.0)}


def test_a_full_disk_is_named_with_the_way_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  checkpoints = Checkpoints(tmp_path, keep=2)
  message = "Failed to write 9 bytes: No space left on device [os_error_code='28']"

  def full(*_, **__):
    raise ValueError(message)

  with monkeypatch.context() as patch:
    patch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(OSError, match=r"no room is left on the disk.*none is there"):
      checkpoints.save(0, STATE, {})
  checkpoints.save(0, STATE, {"next": 1})
  checkpoints.wait()
  with monkeypatch.context() as patch:
    patch.setattr(checkpoints._manager, "wait_until_finished", full)
    with pytest.raises(OSError, match=r"no room.*goes on from step 0 \(Failed to write 9 bytes"):
      checkpoints.close()
  # What was there is as it was.
  state, rest = checkpoints.restore(0, STATE)
  assert rest == {"next": 1} and (state["a"] == STATE["a"]).all()
  checkpoints.close()


def test_a_trace_of_what_is_raised_again_is_not_written(tmp_path: Path):
  Checkpoints(tmp_path, keep=1).close()
  log = logging.getLogger("absl")

  def record(path: str, *, raised: bool) -> logging.LogRecord:
    trace = (ValueError, ValueError("x"), None) if raised else None
    return log.makeRecord("absl", logging.ERROR, path, 1, "words", (), trace)

  orbax, other = "site-packages/orbax/checkpoint/a.py", "site-packages/other/a.py"
  kept = [(path, raised) for path in (orbax, other) for raised in (True, False)
          if log.filter(record(path, raised=raised))]  # fmt: skip
  assert kept == [(orbax, False), (other, True), (other, False)]
