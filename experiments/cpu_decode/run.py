"""Measure CPU decode and prefill, write results.csv, and set the table of docs/running.md from it.

python -m experiments.cpu_decode.run [--llama-bench PROGRAM]
python -m experiments.cpu_decode.run --table     (the table alone, from the file as it is)
"""

import argparse
import tomllib
from pathlib import Path

from experiments import decode
from experiments.readme import DOCS, block

HERE = Path(__file__).parent
RESULTS = HERE / "results.csv"


def table() -> str:
  return decode.table(RESULTS)


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--llama-bench")
  parser.add_argument("--table", action="store_true")
  arguments = parser.parse_args()
  if not arguments.table:
    config = tomllib.loads((HERE / "config.toml").read_text())
    decode.measure(RESULTS, config["model"], config, arguments.llama_bench)
  block("cpu_decode", table(), DOCS / "running.md")
