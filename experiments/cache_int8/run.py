"""Measure perplexity with keys and values in 8 bits, and set the table of docs/running.md from it.

python -m experiments.cache_int8.run --text FILE
python -m experiments.cache_int8.run --table     (the table alone, from the file as it is)
"""

import csv
import json
import subprocess
import sys
from pathlib import Path

from experiments.readme import DOCS, block
from neurojax.kernels import timing

RESULTS = Path(__file__).with_name("results.csv")
CASES = (("neurollm", "w2a8", 1024, 16), ("smollm2", "int8", 512, 8))
"""Model, weights, tokens of a window, windows."""


def measure(text: Path) -> None:
  """Write the results file anew."""
  rows = []
  for model, weights, ctx, chunks in CASES:
    for cache in ("auto", "int8"):
      command = [sys.executable, "-m", "neurojax", "eval", "ppl", "--model", model, "--json"]
      command += ["--text", str(text), "--ctx", str(ctx), "--chunks", str(chunks)]
      command += ["--weights", weights, "--cache", cache]
      done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
      answer = json.loads(done.stdout)
      origin = timing.origin()
      rows.append(
        {
          "model": model, "weights": weights, "cache": cache, "ctx": ctx, "windows": chunks,
          "perplexity": f"{answer['perplexity']:.4f}", "text": text.name, "device": origin["device"],
          "jax": origin["jax"], "date": origin["date"],
        }
      )  # fmt: skip
  with RESULTS.open("w", newline="", encoding="utf-8") as out:
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def table() -> str:
  """Markdown of the results."""
  with RESULTS.open(encoding="utf-8") as lines:
    rows = list(csv.DictReader(lines))
  out = ["| model | weights | perplexity | with `--cache int8` |", "|---|---|---|---|"]
  for plain, rounded in zip(rows[::2], rows[1::2], strict=True):
    out.append(
      f"| {plain['model']} | {plain['weights']} | {plain['perplexity']} | {rounded['perplexity']} |"
    )
  first = rows[0]
  return (
    "\n".join(out)
    + f"\n\n{first['text']}, {first['device']}, jax {first['jax']}, {first['date']}.\n"
  )


if __name__ == "__main__":
  if "--table" not in sys.argv[1:]:
    if len(sys.argv) != 3 or sys.argv[1] != "--text":
      sys.exit(__doc__)
    measure(Path(sys.argv[2]))
  block("cache_int8", table(), DOCS / "running.md")
