"""Measure the time from a command to its first token, with an 8B ternary GGUF file, on a GPU.

python -m experiments.gpu_first_token.run [FILE]     (FILE is made there if it is not there yet)
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

from experiments.gpu import on_gpu
from neurojax.config import ModelConfig
from neurojax.files.dummy import write_dummy
from neurojax.kernels import timing

HERE = Path(__file__).parent
RESULTS = HERE / "results.csv"


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of results.csv.

  Attributes:
    programs: "cold": compiled in this run; "warm": from the cache that the run before filled.
    command_s: From the start of the process to its end, after one token.
    request_s: The part of it from the request to the token.
  """

  architecture: str
  type: str
  weights: str
  file_gib: float
  programs: str
  command_s: float
  request_s: float
  device: str
  jax: str
  jaxlib: str
  date: str


def run(path: Path, weights: str, cache: str) -> tuple[float, float]:
  """Seconds of a command that generates one token, and from its request to the token."""
  command = [sys.executable, "-m", "neurojax", "generate", "--model", str(path)]
  command += ["--weights", weights, "--dtype", "bfloat16", "--programs", "fused"]
  command += ["--prompt", "the sea", "--max-tokens", "1", "--json"]
  began = time.perf_counter()
  done = subprocess.run(
    command, check=True, stdout=subprocess.PIPE, env=os.environ | {"NEUROJAX_CACHE_DIR": cache}
  )
  return time.perf_counter() - began, json.loads(done.stdout)["first_token_s"]


def main(path: Path) -> None:
  config = tomllib.loads((HERE / "config.toml").read_text())
  if not path.exists():
    write_dummy(path, ModelConfig.named(config["architecture"]), config["type"])
  with tempfile.TemporaryDirectory() as cache:
    times = {name: run(path, config["weights"], cache) for name in ("cold", "warm")}
  RESULTS.unlink(missing_ok=True)
  # Only now: a process that has the GPU leaves no memory for another.
  origin = timing.origin()
  size = path.stat().st_size / 2**30
  timing.append_csv(
    RESULTS,
    [
      Row(**config, file_gib=size, programs=name, command_s=whole, request_s=part, **origin)
      for name, (whole, part) in times.items()
    ],
  )
  print(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
  if sys.argv[1:]:
    on_gpu(lambda: main(Path(sys.argv[1])))
  else:
    with tempfile.TemporaryDirectory() as folder:
      on_gpu(lambda: main(Path(folder) / "model.gguf"))
