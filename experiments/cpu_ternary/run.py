"""Measure CPU decode and prefill of a 1.1B ternary model, and set the table of docs/running.md from it.

python -m experiments.cpu_ternary.run [--llama-bench PROGRAM]
python -m experiments.cpu_ternary.run --table     (the table alone, from the file as it is)
"""

import argparse
import tempfile
import tomllib
from pathlib import Path

from experiments import decode
from experiments.readme import DOCS, block
from neurojax.config import ModelConfig
from neurojax.files.dummy import write_dummy

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
    with tempfile.TemporaryDirectory() as folder:
      model = Path(folder) / f"{config['architecture']}-{config['type']}.gguf"
      write_dummy(model, ModelConfig.named(config["architecture"]), config["type"])
      decode.measure(RESULTS, model, config, arguments.llama_bench)
  block("cpu_ternary", table(), DOCS / "running.md")
