"""Measure an engine under load on a GPU, and set the table of docs/running.md from it.

python -m experiments.engine_load.run
python -m experiments.engine_load.run --table     (the table alone, from the files as they are)
"""

import csv
import subprocess
import sys
import tomllib
from pathlib import Path

from experiments.gpu import on_gpu
from experiments.readme import DOCS, block

HERE = Path(__file__).parent
RESULTS, KERNELS = HERE / "results.csv", HERE / "kernels.csv"


def measure() -> None:
  """Run `bench engine` for each entry of the configuration, and `bench decode` beside it."""
  fresh, kernels = RESULTS.with_suffix(".new"), KERNELS.with_suffix(".new")
  for path in (fresh, kernels):
    path.unlink(missing_ok=True)
  base = [sys.executable, "-m", "neurojax", "bench"]
  for run in tomllib.loads((HERE / "config.toml").read_text())["runs"]:
    command = [*base, "engine", "--out", str(fresh)]
    for name, value in run.items():
      values = value if isinstance(value, list) else [value]
      command += [f"--{name}", *map(str, values)]
    subprocess.run(command, check=True)
  command = [*base, "decode", "--arch", "bonsai-8b", "--random", "--out", str(kernels)]
  command += ["--batch", "1", "8", "64", "--context", "128", "--prefill", "2048"]
  subprocess.run(command, check=True)
  fresh.replace(RESULTS)
  kernels.replace(KERNELS)


def table() -> str:
  """Markdown of the results."""
  rows = list(csv.DictReader(RESULTS.open(encoding="utf-8")))
  kernels = {
    row["batch"]: float(row["tokens_per_s"])
    for row in csv.DictReader(KERNELS.open(encoding="utf-8"))
    if row["what"] == "decode"
  }
  out = [
    "| at once | prompt | sampling | tokens/s | of its programs | kernels alone | first token | between tokens, p99 |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    speed = float(row["decode_tokens_per_s"] or row["tokens_per_s"])
    out.append(
      f"| {row['concurrent']} | {row['prompt']} | {row['sampling']} | {speed:,.0f} | {float(row['share']):.0%}"
      f" | {kernels[row['concurrent']]:,.0f} | {float(row['first_p50_ms']):.0f} ms"
      f" | {float(row['gap_p99_ms']):.0f} ms |"
    )
  first = rows[0]
  return (
    "\n".join(out)
    + f"\n\n{first['model']}, {first['weights']}, {first['device']}, jax {first['jax']}, {first['date']}.\n"
  )


if __name__ == "__main__":
  if "--table" not in sys.argv[1:]:
    on_gpu(measure)
  block("engine_load", table(), DOCS / "running.md")
