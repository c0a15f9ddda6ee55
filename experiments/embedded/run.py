"""Keep what two training runs measured, and write the tables of the packaged model's card from it.

python -m experiments.embedded.run RUN TWIN      (folders of configs/train/embedded.toml and embedded-bf16.toml)
python -m experiments.embedded.run --text FILE   (perplexity of a held-out text, by stages and weights)
python -m experiments.embedded.run               (the card alone, from the files as they are)
"""

import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from neurojax.kernels import timing

HERE = Path(__file__).parent
RESULTS = HERE / "results.csv"
PERPLEXITY = HERE / "perplexity.csv"
MODELS = HERE.parents[1] / "neurojax" / "packaged"
SETTINGS = (("w2a8", 1), ("w2a8", 2), ("w2a16", 1), ("dense", 1))
_FIRST, _SECOND = "<!-- losses -->\n", "<!-- perplexity -->\n"
_END = "<!-- / -->"


def evaluations(folder: Path) -> Iterator[dict[str, object]]:
  """Rows of results.csv: every evaluation of a run, with the training loss before it."""
  config = (folder / "config.toml").read_text(encoding="utf-8")
  env = json.loads((folder / "env.json").read_text(encoding="utf-8"))[0]
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
  rates = [line["tokens_per_s"] for line in lines if "tokens_per_s" in line]
  tokens = next(line["tokens"] for line in lines if "tokens" in line)
  for line in lines:
    if line.get("event") == "evaluation":
      step = line["step"]
      last = [losses[i] for i in range(max(1, step - 49), step + 1) if i in losses]
      yield {
        "weights": "ternary" if 'weights = "ternary"' in config else "bf16",
        "step": step,
        "tokens": int(step * tokens),
        "train_loss": f"{sum(last) / len(last):.4f}",
        "valid_loss": f"{line['valid_loss']:.4f}",
        "valid_perplexity": f"{line['valid_perplexity']:.2f}",
        "valid_tokens": line["valid_tokens"],
        "tokens_per_s": f"{sorted(rates)[len(rates) // 2]:.0f}",
        "jax": env["versions"]["jax"],
        "date": env["time"][:10],
      }


def perplexities(text: Path) -> Iterator[dict[str, object]]:
  """Rows of perplexity.csv: the packaged model on a text, however it is cut and multiplied."""
  for weights, stages in SETTINGS:
    command = [sys.executable, "-m", "neurojax", "eval", "ppl", "--model", "neurollm", "--json"]
    command += ["--text", str(text), "--ctx", "1024", "--chunks", "32"]
    command += ["--weights", weights, "--stages", str(stages)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    answer = json.loads(done.stdout)
    row = {"weights": weights, "stages": stages, "perplexity": f"{answer['perplexity']:.5f}"}
    yield row | {"text": text.name} | timing.origin()


def write(path: Path, rows: list[dict[str, object]]) -> None:
  with path.open("w", newline="", encoding="utf-8") as out:
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)


def read(path: Path) -> list[dict[str, str]]:
  with path.open(encoding="utf-8") as lines:
    return list(csv.DictReader(lines))


def losses_table() -> str:
  rows = read(RESULTS)
  last = {row["weights"]: row for row in rows}
  out = ["| weights | tokens | training loss | held-out loss | held-out perplexity | tokens/s |"]
  out.append("|---|---|---|---|---|---|")
  for name, row in last.items():
    out.append(
      f"| {name} | {int(row['tokens']) / 1e6:.0f} million | {row['train_loss']} | {row['valid_loss']}"
      f" | {row['valid_perplexity']} | {int(row['tokens_per_s']):,} |"
    )
  return "\n".join(out) + "\n"


def perplexity_table() -> str:
  out = ["| weights | stages | perplexity |", "|---|---|---|"]
  rows = read(PERPLEXITY)
  out += [f"| {row['weights']} | {row['stages']} | {row['perplexity']} |" for row in rows]
  return "\n".join(out) + "\n"


def main(arguments: list[str]) -> None:
  if arguments[:1] == ["--text"]:
    write(PERPLEXITY, list(perplexities(Path(arguments[1]))))
  elif arguments:
    write(RESULTS, [row for folder in arguments for row in evaluations(Path(folder))])
  card = MODELS / "README.md"
  text = card.read_text(encoding="utf-8")
  for mark, table in ((_FIRST, losses_table()), (_SECOND, perplexity_table())):
    before, _, rest = text.partition(mark)
    text = before + mark + table + _END + rest.partition(_END)[2]
  card.write_text(text, encoding="utf-8")


if __name__ == "__main__":
  main(sys.argv[1:])
