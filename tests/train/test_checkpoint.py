"""Checkpoints that cannot be written."""

import logging
import sys
import types
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


def test_what_is_raised_is_not_written_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  said = []
  monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: said.append(unraisable.exc_value))
  Checkpoints(tmp_path, keep=1).close()
  log = logging.getLogger("absl")

  def record(path: str, *, raised: bool) -> logging.LogRecord:
    trace = (ValueError, ValueError("x"), None) if raised else None
    return log.makeRecord("absl", logging.ERROR, path, 1, "words", (), trace)

  orbax, other = "site-packages/orbax/checkpoint/a.py", "site-packages/other/a.py"
  kept = [(path, raised) for path in (orbax, other) for raised in (True, False)
          if log.filter(record(path, raised=raised))]  # fmt: skip
  assert kept == [(other, True), (other, False)]
  asyncio = logging.getLogger("asyncio")
  for words, is_written in (("RESOURCE_EXHAUSTED: OCDBT database", False), ("a task failed", True)):
    record_ = asyncio.makeRecord("asyncio", logging.ERROR, "a.py", 1, "%s", (words,), None)
    assert bool(asyncio.filter(record_)) == is_written
  Checkpoints(tmp_path, keep=1).close()
  others = [RuntimeError("Event loop is closed"), RuntimeError("else")]
  for error in others:
    sys.unraisablehook(types.SimpleNamespace(exc_value=error))
  assert said == others[1:]


def test_a_damaged_manifest_is_one_line(tmp_path: Path, capfd):
  checkpoints = Checkpoints(tmp_path, keep=2)
  for step in (0, 1):
    checkpoints.save(step, STATE, {})
  checkpoints.wait()
  for path in (tmp_path / "1").rglob("manifest.ocdbt"):
    path.write_bytes(b"junk")
  with pytest.raises(
    ValueError, match=r"1: this checkpoint cannot be read: .*step 0 \(DATA_LOSS"
  ) as error:
    checkpoints.restore(1, STATE)
  assert "\n" not in str(error.value) and len(str(error.value)) < 500
  checkpoints.close()
  assert capfd.readouterr().err == ""
