"""XLA's compilation cache between runs: entries that a crash cut short are removed once."""

import logging
import os
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import pytest

from neurojax.stage import compilation_cache as stage_compile

WHOLE = zlib.compress(bytes(range(256)) * 100)
ENTRIES = {"whole": WHOLE, "cut": WHOLE[:-9], "empty": b"", "zstd": b"\x28\xb5\x2f\xfd..."}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  """A cache folder; settings of JAX are not touched."""
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  settings = {}
  monkeypatch.setattr(jax.config, "update", settings.__setitem__)
  monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", str(tmp_path), raising=False)
  for name, content in ENTRIES.items():
    (tmp_path / f"{name}-cache").write_bytes(content)
  return tmp_path


def entries(folder: Path) -> set[str]:
  return {path.name.removesuffix("-cache") for path in folder.glob("*-cache")}


def test_cut_entries_are_removed_and_the_log_says_so_quietly(folder: Path, caplog):
  with caplog.at_level(logging.INFO):
    stage_compile.use_compilation_cache(folder)
  assert entries(folder) == {"whole", "zstd"}
  [record] = [r for r in caplog.records if r.name == stage_compile.__name__]
  assert record.levelname == "INFO" and "2 entries were cut short" in record.getMessage()


def test_an_entry_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
  stage_compile.use_compilation_cache(folder)
  later = (folder / "whole-cache").stat().st_mtime_ns + 10**9
  for name in entries(folder):
    os.utime(folder / f"{name}-cache", ns=(1, 1))
  (folder / "new-cache").write_bytes(b"")
  os.utime(folder / "new-cache", ns=(later, later))
  read = []
  monkeypatch.setattr(stage_compile, "_is_whole", lambda entry: read.append(entry))
  stage_compile.use_compilation_cache(folder)
  assert read == [b""] and entries(folder) == {"whole", "zstd"}


RUN = """
import sys, jax
from neurojax.stage.compilation_cache import use_compilation_cache
use_compilation_cache(sys.argv[1])
jax.jit(lambda x: x * 2 + 1)(3.0)
"""


@pytest.mark.parametrize("length", [0, 100])
def test_a_damaged_entry_warns_in_no_run(tmp_path: Path, length: int):
  env = {**os.environ, "JAX_PLATFORMS": "cpu"}
  env.pop("JAX_COMPILATION_CACHE_DIR")

  def run() -> str:
    command = [sys.executable, "-c", RUN, str(tmp_path)]
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return done.stderr

  run()
  for path in tmp_path.glob("*-cache"):
    os.truncate(path, length)
  assert "Error reading" not in run()
  assert min(path.stat().st_size for path in tmp_path.glob("*-cache")) > length
