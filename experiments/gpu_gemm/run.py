"""Measure products with ternary weights on a GPU beside XLA's in bfloat16, and tune their choice.

python -m experiments.gpu_gemm.run
"""

import subprocess
import sys
import tomllib
from pathlib import Path

from experiments.gpu import on_gpu

HERE = Path(__file__).parent
RESULTS = HERE / "results.csv"


def measure() -> None:
  """Run `neurojax bench gemm`; the results, and the device's table of choices, are written anew."""
  fresh = RESULTS.with_suffix(".new")
  fresh.unlink(missing_ok=True)
  command = [sys.executable, "-m", "neurojax", "bench", "gemm", "--tune", "--out", str(fresh)]
  for name, value in tomllib.loads((HERE / "config.toml").read_text()).items():
    values = value if isinstance(value, list) else [value]
    command += [f"--{name}", *map(str, values)]
  subprocess.run(command, check=True)
  fresh.replace(RESULTS)


if __name__ == "__main__":
  on_gpu(measure)
