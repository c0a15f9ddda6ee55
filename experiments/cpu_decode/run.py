"""Measure CPU decode and prefill, write results.csv, and set the README's table from it.

python -m experiments.cpu_decode.run [--llama-bench PROGRAM]
python -m experiments.cpu_decode.run --table     (the table alone, from the file as it is)
"""

import argparse
import csv
import subprocess
import sys
import tomllib
from pathlib import Path

from experiments.readme import block

HERE = Path(__file__).parent
RESULTS = HERE / "results.csv"


def measure(llama_bench: str | None) -> None:
  config = tomllib.loads((HERE / "config.toml").read_text())
  RESULTS.unlink(missing_ok=True)
  for form in config["weights"]:
    command = [sys.executable, "-m", "neurojax", "bench", "decode", "--model", config["model"]]
    command += [
      "--weights",
      form,
      "--prefill",
      str(config["prefill"]),
      "--decode",
      str(config["decode"]),
    ]
    command += ["--repetitions", str(config["repetitions"]), "--out", str(RESULTS)]
    subprocess.run(command + (["--llama-bench", llama_bench] if llama_bench else []), check=True)


def table() -> str:
  """Markdown of results.csv."""
  with RESULTS.open(encoding="utf-8") as lines:
    rows = list(csv.DictReader(lines))
  out = [
    "| weights | what | tokens/s (min..max) | llama.cpp, same run | ratio | of the memory bound |",
    "|---|---|---|---|---|---|",
  ]
  for row in rows:
    bound = f"{float(row['bound_fraction']):.0%}" if row["bound_fraction"] else ""
    other = f"{float(row['llama_tokens_per_s']):.0f}" if row["llama_tokens_per_s"] else ""
    ratio = f"{float(row['ratio']):.2f}x" if row["ratio"] else ""
    spread = f"{float(row['slowest']):.0f}..{float(row['fastest']):.0f}"
    out.append(
      f"| {row['weights']} | {row['what']} {row['length']} "
      f"| {float(row['tokens_per_s']):.0f} ({spread}) | {other} | {ratio} | {bound} |"
    )
  first = rows[0]
  where = f"{first['cores']} cores of {first['device']}, jax {first['jax']}, {first['date']}"
  return "\n".join(out) + f"\n\n{first['model']}, {where}.\n"


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--llama-bench")
  parser.add_argument("--table", action="store_true")
  arguments = parser.parse_args()
  if not arguments.table:
    measure(arguments.llama_bench)
  block("cpu_decode", table())
