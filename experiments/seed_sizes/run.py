"""Compares the seed's five sizes, as printed and by its formula, with ours for the same memory.

Writes results.csv, the table in this folder's README, and the transcripts in docs/sizing.md.

python -m experiments.seed_sizes.run
python -m experiments.seed_sizes.run --table     (the table alone, from the file as it is)
"""

import argparse
import contextlib
import csv
import dataclasses
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console

from experiments.readme import block
from neurojax import count
from neurojax.cli import main
from neurojax.cli.size import Size, render
from neurojax.config import ModelConfig
from neurojax.forms import TERNARY_FORMATS
from neurojax.plan.fleet import Fleet, read_fleet
from neurojax.scaling import fits, seed
from neurojax.scaling.purpose import Purpose, ServePurpose, TrainPurpose
from neurojax.scaling.size import HEADROOM, size

HERE = Path(__file__).parent
RESULTS = HERE / "results.csv"
README = HERE / "README.md"
SIZING = HERE.parents[1] / "docs" / "sizing.md"
FLEETS = HERE.parents[1] / "configs" / "fleet"
TIERS = ("seed-40gb", "seed-200gb", "seed-800gb", "seed-4tb", "seed-8tb")
SERVING = ServePurpose.of(weights="w2a8", scales=TERNARY_FORMATS["ternary-g128"])


def rows() -> Iterator[dict[str, Any]]:
  for name, printed in zip(TIERS, seed.TABLE, strict=True):
    fleet = read_fleet(str(FLEETS / f"{name}.toml"))
    yield _theirs(name, fleet, "table", printed)
    yield _theirs(name, fleet, "formula", seed.formula(printed.memory_gb))
    yield _ours(name, fleet, "ours, training", TrainPurpose())
    yield _ours(name, fleet, "ours, serving", SERVING)


def _theirs(name: str, fleet: Fleet, whose: str, given: seed.SeedArchitecture) -> dict[str, Any]:
  free = [place.free_bytes for place in fleet.places()]
  valid = not seed.invalid(given)
  has_room: bool | None = None
  if valid:
    allowed = [int(space * (1 - HEADROOM)) for space in free]
    has_room = fits.fits(fits.need(given.config(), TrainPurpose()), allowed)
  architecture = dataclasses.asdict(given)
  memory_gb = architecture.pop("memory_gb")
  return {
    "fleet": name,
    "memory_gb": memory_gb,
    "whose": whose,
    **architecture,
    "head_dim": given.head_dim,
    "parameters": given.parameters(),
    "valid": valid,
    "bytes": round(seed.train_gib(given) * seed.GIB),
    "free_bytes": sum(free),
    "fits": has_room,
    "wrong": "; ".join(seed.findings(given)),
  }


def _ours(name: str, fleet: Fleet, whose: str, purpose: Purpose) -> dict[str, Any]:
  found = size(fleet, purpose)
  fields = ("model_dim", "num_layers", "ffn_dim", "num_heads", "num_kv_heads", "head_dim")
  return {
    "fleet": name,
    "whose": whose,
    **{field: getattr(found.config, field) for field in fields},
    "parameters": found.parameters,
    "valid": True,
    "bytes": sum(stage.memory_bytes for stage in found.stages),
    "free_bytes": sum(host.free_bytes for host in found.hosts),
    "fits": True,
    "train_days": found.train_days and f"{found.train_days:.4g}",
    "tokens": f"{found.losses.tokens:.4g}",
    "loss_bf16": f"{found.losses.bf16.value:.4f}",
    "decode_tokens_per_s": found.speed.decode_tokens_per_s
    and f"{found.speed.decode_tokens_per_s:.4g}",
  }


COLUMNS = (
  "fleet", "memory_gb", "whose", "num_layers", "model_dim", "ffn_dim", "num_heads", "num_kv_heads",
  "head_dim", "parameters", "claimed_parameters", "valid", "bytes", "free_bytes", "fits", "tokens",
  "train_days", "loss_bf16", "decode_tokens_per_s", "wrong",
)  # fmt: skip


def measure(results: Path = RESULTS) -> None:
  with results.open("w", encoding="utf-8", newline="") as file:
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows())


def table(results: Path = RESULTS) -> str:
  """Markdown of the results file."""
  with results.open(encoding="utf-8") as lines:
    found = list(csv.DictReader(lines))
  out = [
    "| fleet | whose | layers x width, heads/kv | parameters, 10^9 | takes | of what is free | what is wrong |",
    "|---|---|---|---|---|---|---|",
  ]
  for row in found:
    size_bytes, free = int(row["bytes"]), int(row["free_bytes"])
    shape = f"{row['num_layers']} x {row['model_dim']}, {row['num_heads']}/{row['num_kv_heads']}"
    number = int(row["parameters"]) / 1e9
    billions = f"{number:,.0f}" if number >= 1e4 else f"{number:,.4g}"
    if row["claimed_parameters"]:
      billions += f" (says {float(row['claimed_parameters']) / 1e9:g})"
    out.append(
      f"| {row['fleet']} | {row['whose']} | {shape} | {billions} | {size_bytes / 1e9:,.4g} GB "
      f"| {size_bytes / free:.0%} | {_wrong(row)} |"
    )
  return "\n".join(out) + "\n"


def _wrong(row: dict[str, str]) -> str:
  """In few words; the results file has the whole of it."""
  if row["whose"].startswith("ours"):
    return ""
  said = []
  given = _architecture(row)
  if faults := seed.invalid(given):
    said.append("no architecture: " + "; ".join(fault.split(": ")[0] for fault in faults))
  if given.claimed_parameters:
    untied = given.parameters(tied=False)
    if given.claimed_parameters > 1.02 * untied:
      said.append(f"claims {given.claimed_parameters / untied:.1f} times its parameters")
    said.append("not what the formula gives")
  said.append(f"its own estimate is {given.estimated_gib() * seed.GIB / 1e9:.3g} GB")
  return "; ".join(said)


def _architecture(row: dict[str, str]) -> seed.SeedArchitecture:
  fields = ("num_layers", "model_dim", "ffn_dim", "num_heads", "num_kv_heads")
  claimed = row["claimed_parameters"]
  return seed.SeedArchitecture(
    memory_gb=float(row["memory_gb"]),
    claimed_parameters=float(claimed) if claimed else None,
    **{field: int(row[field]) for field in fields},
  )


PLAN = "--model bonsai-8b --fleet gaming-pc --dtype bfloat16 --context 16384"
SIMULATE = f"{PLAN} --requests 16 --concurrency 4"


def transcript() -> str:
  """What `neurojax size` prints, as docs/sizing.md shows it."""
  arguments = ["--fleet", "configs/fleet/gaming-pc.toml", "--context", "4096"]
  console = Console(width=100, file=io.StringIO(), color_system=None)
  options = Size(fleet=str(FLEETS / "gaming-pc.toml"), context=4096)
  render(size(read_fleet(str(options.fleet)), options.purpose_of()), console)
  lines = (line.rstrip() for line in console.file.getvalue().splitlines())
  return "\n".join(["```", f"$ neurojax size {' '.join(arguments)}", *lines, "```\n"])


def printed(verb: str, arguments: str) -> str:
  """What another verb prints, as docs/sizing.md shows it."""
  out = io.StringIO()
  environment = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
  with mock.patch.dict(os.environ, environment), contextlib.redirect_stdout(out):
    code = main([verb, *arguments.split(" ")])
  assert code == 0, out.getvalue()
  lines = (line.rstrip() for line in out.getvalue().splitlines())
  return "\n".join(["```", f"$ neurojax {verb} {arguments}", *lines, "```\n"])


def check(results: Path = RESULTS) -> None:
  """Raises: AssertionError: what the file says of our sizes is not what is counted."""
  with results.open(encoding="utf-8") as lines:
    for row in csv.DictReader(lines):
      if not row["whose"].startswith("ours"):
        assert int(row["parameters"]) == _architecture(row).parameters()
        continue
      tier = row["fleet"].removeprefix("seed-")
      if row["whose"] == "ours, training":
        config = ModelConfig.named(f"train-{tier}")
        assert int(row["parameters"]) == count.parameters(config)


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--table", action="store_true")
  if not parser.parse_args().table:
    measure()
  check()
  block("seed_sizes", table(), README)
  block("size", transcript(), SIZING)
  block("plan", printed("plan", PLAN), SIZING)
  block("simulate", printed("simulate", SIMULATE), SIZING)
