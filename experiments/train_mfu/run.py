"""Measure training steps on a GPU, and write the README's table from it.

python -m experiments.train_mfu.run
python -m experiments.train_mfu.run --only 0 2   (entries of config.toml; the others' rows stay)
python -m experiments.train_mfu.run --table      (the table alone, from the file as it is)
"""

import csv
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from experiments.gpu import on_gpu

HERE = Path(__file__).parent
RESULTS = HERE / "results.csv"
README = HERE / "README.md"
_PARTS = HERE.parents[1] / "build" / "train_mfu"
_MARK = "<!-- results -->\n"

_Rows = list[dict[str, str]]


def measure(only: list[int]) -> None:
  """Run `neurojax bench train` for the chosen entries; the rows of all entries are this device's results.

  Rows of other devices stay.
  """
  runs = tomllib.loads((HERE / "config.toml").read_text(encoding="utf-8"))["runs"]
  _PARTS.mkdir(parents=True, exist_ok=True)
  parts = [_PARTS / f"{i}.csv" for i in range(len(runs))]
  for i in only or range(len(runs)):
    parts[i].unlink(missing_ok=True)
    command, environment = _command(runs[i], parts[i])
    print("==", " ".join(command[1:]), environment.get("XLA_FLAGS", ""), flush=True)
    subprocess.run(command, check=True, env=environment)
  measured = [row for part in parts for row in _read(part)]
  devices = {row["device"] for row in measured}
  rows = measured + [row for row in _read(RESULTS) if row["device"] not in devices]
  with RESULTS.open("w", newline="", encoding="utf-8") as out:
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def _command(run: dict[str, Any], out: Path) -> tuple[list[str], dict[str, str]]:
  environment = dict(os.environ)
  command = [sys.executable, "-m", "neurojax", "bench", "train", "--out", str(out)]
  for name, value in run.items():
    if name == "flags":
      environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {value}".strip()
      continue
    values = value if isinstance(value, list) else [value]
    command += [f"--{name}", *map(str, values)]
  return command, environment


def _read(path: Path) -> _Rows:
  if not path.exists():
    return []
  with path.open(encoding="utf-8") as lines:
    return list(csv.DictReader(lines))


def table(rows: _Rows) -> str:
  """Markdown of the results, a table for each device."""
  devices = dict.fromkeys(row["device"] for row in rows)
  return "\n".join(_table([row for row in rows if row["device"] == device]) for device in devices)


def _table(rows: _Rows) -> str:
  out = [
    "| model | weights | batch | remat | unroll | optimizer | step | tokens/s | MFU | of a square product | over bf16 |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    mfu = f"{float(row['mfu']):.1%}" if row["mfu"] else "-"
    over = f"{float(row['overhead']):+.1%}" if row["overhead"] else ""
    flags = f", `{row['flags']}`" if row["flags"] else ""
    out.append(
      f"| {row['arch']} | {_recipe(row)}{flags} | {row['batch']} x {row['seq_len']} | {row['remat']}"
      f" | {row['unroll']} | {row['optimizer']} | {float(row['step_ms']):.1f} ms"
      f" | {float(row['tokens_per_s']):,.0f} | {mfu} | {float(row['matmul_fraction']):.1%} | {over} |"
    )
  rates = [float(row["matmul_flops_per_s"]) / 1e12 for row in rows]
  first = rows[0]
  return "\n".join(out) + (
    f"\n\n{first['device']}, jax {first['jax']}, {first['date']}; a square product reaches"
    f" {min(rates):.0f} to {max(rates):.0f} TFLOP/s.\n"
  )


def _recipe(row: dict[str, str]) -> str:
  if row["weights"] == "none":
    return "bf16"
  group = f"groups of {row['group_size']}" if row["group_size"] else "one scale"
  return f"ternary, {group}" + (", int8 activations" if row["activations"] == "int8" else "")


def main(arguments: list[str]) -> None:
  if "--table" not in arguments:
    only = [int(argument) for argument in arguments if argument != "--only"]
    on_gpu(lambda: measure(only))
  head = README.read_text(encoding="utf-8").partition(_MARK)[0]
  text = table(_read(RESULTS))
  README.write_text(f"{head}{_MARK}\n{text}", encoding="utf-8")
  print(text)


if __name__ == "__main__":
  main(sys.argv[1:])
