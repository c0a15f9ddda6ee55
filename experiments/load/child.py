"""Load a model file once and say what it took: the process that `run` starts. Linux only."""

import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from neurojax.files.load import load_span
from neurojax.files.open import open_model


def megabytes(field: str) -> float:
  """A size that the system has of this process: VmRSS, or VmHWM for the most so far."""
  lines = Path("/proc/self/status").read_text().splitlines()
  return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field + ":"))


def measured(path: str, weights: str) -> dict[str, float]:
  jax.block_until_ready(jnp.zeros(1))
  # The most so far begins anew: what imports took at times is not the file's.
  Path("/proc/self/clear_refs").write_text("5")
  before_mb = megabytes("VmRSS")
  start, cpu = time.perf_counter(), time.process_time()
  with open_model(path) as file:
    model = load_span(file, weights=weights)
  load_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu
  found = {"load_s": load_s, "cpu_s": cpu_s, "before_mb": before_mb, "peak_mb": megabytes("VmHWM")}
  del model
  return found


if __name__ == "__main__":
  print(json.dumps(measured(*sys.argv[1:])))
