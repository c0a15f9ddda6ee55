"""Measuring decode and prefill of one file in several forms of weights, and the table of it."""

import csv
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def measure(
  results: Path, model: str | Path, config: Mapping[str, Any], llama_bench: str | None
) -> None:
  """Run `neurojax bench decode` for each of config's weights; `results` is written anew."""
  results.unlink(missing_ok=True)
  for form in config["weights"]:
    command = [sys.executable, "-m", "neurojax", "bench", "decode", "--model", str(model)]
    command += ["--weights", form, "--out", str(results)]
    for name in ("prefill", "decode", "repetitions"):
      command += [f"--{name}", str(config[name])]
    subprocess.run(command + (["--llama-bench", llama_bench] if llama_bench else []), check=True)


def table(results: Path) -> str:
  """Markdown of a results file."""
  with results.open(encoding="utf-8") as lines:
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
