"""Measures how long plans and simulations take, and how near to the best the plans are.

python -m experiments.plan_speed.run
python -m experiments.plan_speed.run --table     (the table alone, from the file as it is)
"""

import argparse
import contextlib
import csv
import dataclasses
import datetime
import io
import itertools
import json
import os
import platform
import random
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neurojax.cli.plan import Planning
from neurojax.config import ModelConfig, Serving, to_toml
from neurojax.count.serving import Load
from neurojax.plan import best
from neurojax.plan.fleet import Device, Fleet, Host, Link
from neurojax.plan.plan import Plan
from neurojax.plan.simulate import simulate

HERE = Path(__file__).parent
RESULTS = HERE / "results.csv"
README = HERE / "README.md"
CARDS = {
  "old": (8e9, 2.5e11, 1e13),
  "middle": (12e9, 4.5e11, 5e13),
  "new": (24e9, 1e12, 1.6e14),
  "rack": (40e9, 1.5e12, 3e14),
}
"""Bytes, bytes per second and FLOP/s of invented generations of cards."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """seconds: Of one core. better: Beside the best of the simple placements, in the objective."""

  what: str
  hosts: int
  links: int
  method: str
  seconds: float
  stages: int
  latency_s: float
  tokens_per_s: float
  gap: float | None = None
  better: float | None = None
  events: int | None = None
  device: str
  date: str


def fleet(hosts: int, links: int, seed: int) -> Fleet:
  """Unlike hosts, and links between random pairs of them, some faster and most slower than the network."""
  draw = random.Random(seed)
  made = []
  for number in range(hosts):
    kind = draw.choice(list(CARDS))
    size, read, flops = CARDS[kind]
    card = Device(
      kind="cuda",
      name=kind,
      memory_bytes=int(size),
      used_bytes=int(size * draw.uniform(0, 0.4)),
      read_bytes_per_s=read * draw.uniform(0.5, 0.9),
      flops_per_s=flops * draw.uniform(0.3, 0.8),
      layer_overhead_s=draw.uniform(1e-5, 5e-5),
      step_overhead_s=draw.uniform(5e-5, 5e-4),
    )
    made.append(Host(name=f"host-{number}", devices=(card,)))
  pairs = list(itertools.combinations(range(hosts), 2))
  between = [
    Link(
      hosts=(f"host-{a}", f"host-{b}"),
      latency_s=10 ** draw.uniform(-4.5, -1.5),
      bytes_per_s=10 ** draw.uniform(6, 9.5),
    )
    for a, b in draw.sample(pairs, links)
  ]
  return Fleet(hosts=tuple(made), links=tuple(between))


def measure() -> list[Row]:
  setup = tomllib.loads((HERE / "config.toml").read_text(encoding="utf-8"))
  config = dataclasses.replace(
    ModelConfig.named(setup["architecture"]), num_layers=setup["num_layers"]
  )
  load = Load(
    serving=Serving(
      dtype=setup["dtype"], weights="dense", context=setup["context"], sequences=setup["sequences"]
    ),
    working=False,
  )
  where = {"device": platform.processor() or platform.machine(), "date": str(datetime.date.today())}
  rows = []
  kinds = (("latency", 1), ("throughput", 1), ("throughput", None))
  # What is imported when it is needed is no part of a plan's time.
  best.best(
    dataclasses.replace(config, num_layers=2),
    fleet(3, 0, 0),
    load,
    objective="throughput",
    replicas=None,
  )
  for (hosts, links), (objective, replicas) in itertools.product(setup["fleets"], kinds):
    machines = fleet(hosts, links, setup["seed"])
    started = time.process_time()
    made = best.best(
      config,
      machines,
      load,
      objective=objective,
      replicas=replicas,
      time_limit_s=setup["seconds"],
    )
    seconds = time.process_time() - started
    simple = best.compared(config, machines, load, objective=objective).values()
    others = [other for other in simple if isinstance(other, Plan)]
    nearest = min(others, key=Plan.value, default=None)
    better = None
    if nearest is not None:
      better = (
        nearest.latency_s / made.latency_s
        if objective == "latency"
        else made.throughput / nearest.throughput
      )
    rows.append(
      Row(
        what=objective if replicas else f"{objective}, layers shared",
        hosts=hosts,
        links=links,
        method=made.method,
        seconds=seconds,
        stages=len(made.stages),
        latency_s=made.latency_s,
        tokens_per_s=made.throughput,
        gap=made.gap,
        better=better,
        **where,
      )
    )
    print(rows[-1])
  rows += commands(setup, config, where)
  for hosts, pipelines, requests, answer in setup["simulations"]:
    machines = fleet(hosts, 0, setup["seed"])
    made = best.best(config, machines, load, objective="throughput", replicas=pipelines)
    started = time.process_time()
    result = simulate(
      made,
      requests=requests,
      concurrency=made.batches * pipelines,
      prompt=256,
      answer=answer,
      failures_per_hour=10.0,
      repair_s=5.0,
      seed=setup["seed"],
    )
    rows.append(
      Row(
        what="simulation",
        hosts=hosts,
        links=0,
        method=f"{pipelines} pipelines, {result.tokens} tokens, {result.failures} failures",
        seconds=time.process_time() - started,
        stages=len(made.stages),
        latency_s=result.token_s.p50_s or 0.0,
        tokens_per_s=result.steady_tokens_per_s,
        events=result.events,
        **where,
      )
    )
    print(rows[-1])
  return rows


def commands(setup: dict[str, Any], config: ModelConfig, where: dict[str, str]) -> Iterator[Row]:
  """`neurojax plan` as a whole, imports apart: the file read, the plan made and explained, one more host."""
  for (hosts, links), (objective, replicas) in itertools.product(
    setup["commands"], (("latency", 1), ("throughput", 1), ("throughput", "auto"))
  ):
    with tempfile.TemporaryDirectory() as folder:
      model, machines = Path(folder) / "model.toml", Path(folder) / "fleet.toml"
      model.write_text(to_toml(config), encoding="utf-8")
      machines.write_text(to_toml(fleet(hosts, links, setup["seed"])), encoding="utf-8")
      planning = Planning(
        model=str(model),
        fleet=str(machines),
        objective=objective,
        replicas=replicas,
        dtype=setup["dtype"],
        context=setup["context"],
        seconds=setup["seconds"],
        json=True,
      )
      out = io.StringIO()
      started = time.process_time()
      with contextlib.redirect_stdout(out):
        planning.run()
      seconds = time.process_time() - started
    made = json.loads(out.getvalue())
    shared = ", layers shared" if replicas == "auto" else ""
    yield Row(
      what=f"command, {objective}{shared}",
      hosts=hosts,
      links=links,
      method=made["method"],
      seconds=seconds,
      stages=len(made["stages"]),
      latency_s=made["latency_s"],
      tokens_per_s=made["throughput"],
      gap=made["gap"],
      **where,
    )


def table() -> str:
  with RESULTS.open(encoding="utf-8") as lines:
    rows = list(csv.DictReader(lines))
  out = [
    "| what | hosts | links | seconds | stages | ms a token | tokens/s | gap | of the best | how |",
    "|---|---|---|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    gap = "" if row["gap"] == "" else f"{float(row['gap']):.2%}"
    better = "" if row["better"] == "" else f"{float(row['better']):.2f}"
    events = "" if row["events"] == "" else f", {int(row['events']):,} events"
    out.append(
      f"| {row['what']} | {row['hosts']} | {row['links']} | {float(row['seconds']):.2f} | {row['stages']} "
      f"| {float(row['latency_s']) * 1e3:.1f} | {float(row['tokens_per_s']):.1f} | {gap} | {better} "
      f"| {row['method']}{events} |"
    )
  return "\n".join(out) + f"\n\n{rows[0]['device']}, {rows[0]['date']}.\n"


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--table", action="store_true")
  if not parser.parse_args().table:
    # One core: what linear algebra there is may take no other.
    if hasattr(os, "sched_setaffinity"):
      os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    found = measure()
    with RESULTS.open("w", encoding="utf-8", newline="") as out:
      writer = csv.DictWriter(
        out, [field.name for field in dataclasses.fields(Row)], lineterminator="\n"
      )
      writer.writeheader()
      writer.writerows(
        {
          key: f"{value:.6g}" if isinstance(value, float) else value
          for key, value in dataclasses.asdict(row).items()
        }
        for row in found
      )
  before, mark, rest = README.read_text(encoding="utf-8").partition("<!-- results -->\n")
  _, end, after = rest.partition("<!-- /results -->")
  README.write_text(f"{before}{mark}{table()}{end}{after}", encoding="utf-8")
