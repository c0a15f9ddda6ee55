"""Measure decode and prefill of fused ternary models on a GPU, and set the table of docs/running.md from it.

python -m experiments.gpu_decode.run
python -m experiments.gpu_decode.run --table     (the table alone, from the file as it is)
"""

import csv
import subprocess
import sys
import tomllib
from pathlib import Path

from experiments.gpu import on_gpu
from experiments.readme import DOCS, block

HERE = Path(__file__).parent
RESULTS = HERE / "results.csv"


def measure() -> None:
  """Run `neurojax bench decode` for each entry of the configuration; the results are written anew."""
  fresh = RESULTS.with_suffix(".new")
  fresh.unlink(missing_ok=True)
  for run in tomllib.loads((HERE / "config.toml").read_text())["runs"]:
    command = [sys.executable, "-m", "neurojax", "bench", "decode", "--random"]
    command += ["--out", str(fresh)]
    for name, value in run.items():
      values = value if isinstance(value, list) else [value]
      command += [f"--{name}", *map(str, values)]
    subprocess.run(command, check=True)
  fresh.replace(RESULTS)


def table() -> str:
  """Markdown of the results."""
  with RESULTS.open(encoding="utf-8") as lines:
    rows = list(csv.DictReader(lines))
  out = ["| model | what | batch | tokens/s | at best | share of it |", "|---|---|---|---|---|---|"]
  for row in rows:
    if row["what"] == "decode":
      bound, share = f"{float(row['read_bytes_per_s']) / 1e12:.2f} TB/s", row["read_fraction"]
    else:
      bound, share = f"{float(row['bf16_flops_per_s']) / 1e12:.0f} TFLOP/s", row["matmul_fraction"]
    out.append(
      f"| {row['arch']}, {float(row['weight_gib']):.2f} GiB | {row['what']} {row['length']}"
      f" | {row['batch']} | {float(row['tokens_per_s']):,.0f} | {bound} | {float(share):.0%} |"
    )
  first = rows[0]
  return "\n".join(out) + f"\n\n{first['device']}, jax {first['jax']}, {first['date']}.\n"


if __name__ == "__main__":
  if "--table" not in sys.argv[1:]:
    on_gpu(measure)
  block("gpu_decode", table(), DOCS / "running.md")
