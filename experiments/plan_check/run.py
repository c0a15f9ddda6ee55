"""Compares predictions with measurements: memory of compiled stages, decode time of real stage servers.

python -m experiments.plan_check.run              (probe, measure, write results.csv)
python -m experiments.plan_check.run --table      (the table alone, from the file as it is)
"""

import argparse
import asyncio
import contextlib
import csv
import dataclasses
import gc
import itertools
import os
import statistics
import tempfile
import time
import tomllib
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from neurojax.config import ModelConfig, Sampling, Serving, Span, from_dict, to_toml
from neurojax.count.serving import Load, stage_bytes
from neurojax.engine.api import Request
from neurojax.files.dummy import write_dummy
from neurojax.files.load import load_span, ternary_matrices
from neurojax.files.open import open_model
from neurojax.forms import Weights
from neurojax.kernels import timing
from neurojax.measure.machine import links
from neurojax.measure.machine.devices import probe_devices
from neurojax.measure.machine.handover import with_handover
from neurojax.pipeline.coordinator import PipelineEngine, PipelineOptions
from neurojax.pipeline.spawn import LocalStages
from neurojax.plan import predict
from neurojax.plan.fleet import DecodeRates, Device, Fleet, Host
from neurojax.plan.plan import Placement
from neurojax.plan.proportional import proportional
from neurojax.stage.compile import CompiledStage
from neurojax.stage.runtime import StageRuntime

HERE = Path(__file__).parent
RESULTS = HERE / "results.csv"
FASTER = ("read_bytes_per_s", "flops_per_s", "upload_bytes_per_s")
SHORTER = ("layer_overhead_s", "step_overhead_s", "sample_s_per_entry", "handover_s")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """Bytes or seconds: memory of one stage, or of one decoded token through all stages.

  Attributes:
    measured: held: arrays that live; memory: those and the working memory that the compiler names;
      decode: the shortest time of a token, as the probe takes the shortest of its steps.
    median: decode: of all tokens, whatever else the machine did meanwhile.
    load: Processes that wanted a core, on average over the minute before.
  """

  what: str
  weights: str
  stages: int
  part: str
  predicted: float
  measured: float
  error: float
  median: float | None
  load: float
  cores: int
  device: str
  jax: str
  date: str


def row(
  what: str, weights: str, stages: int, part: str, *, predicted: float, measured: float, **more: Any
) -> Row:
  origin = {key: value for key, value in timing.origin().items() if key != "jaxlib"}
  return Row(
    what=what,
    weights=weights,
    stages=stages,
    part=part,
    predicted=predicted,
    measured=measured,
    error=predicted / measured - 1,
    median=more.get("median"),
    load=more.get("load", os.getloadavg()[0]),
    cores=len(os.sched_getaffinity(0)),
    **origin,
  )


def spans(config: ModelConfig, load: Load, stages: int) -> tuple[Placement, ...]:
  return proportional(config, [(f"stage-{i}", 1 << 40) for i in range(stages)], load)


def memory(path: Path, load: Load, stages: int) -> Iterator[Row]:
  """Every stage of the cut in turn, in this process, with a sequence open."""
  with open_model(path) as file:
    for placement in spans(file.config, load, stages):
      gc.collect()
      before = sum(array.nbytes for array in jax.live_arrays())
      model = load_span(file, placement.span, dtype=jnp.dtype(load.dtype), weights=load.weights)
      stage = CompiledStage(model, context_length=load.capacity, slots=load.sequences)
      del model
      runtime = StageRuntime(stage)
      for slot in range(load.sequences):
        runtime.open(slot, Sampling())
      gc.collect()
      live = sum(array.nbytes for array in jax.live_arrays()) - before
      layers = f"layers {placement.span.first_layer}..{placement.span.last_layer}"
      held = stage_bytes(file.config, placement.span, load)
      whole = stage_bytes(file.config, placement.span, dataclasses.replace(load, working=True))
      yield row("held", load.weights, stages, layers, predicted=held, measured=live)
      yield row(
        "memory",
        load.weights,
        stages,
        layers,
        predicted=whole,
        measured=live + stage.working_bytes,
      )
      del runtime, stage


@contextlib.asynccontextmanager
async def pipeline(path: Path, load: Load, stages: int) -> AsyncIterator[PipelineEngine]:
  options = PipelineOptions(serving=load.serving, forms=load.forms)
  async with LocalStages(path, stages) as local:
    assert local.fleet is not None
    with open_model(path) as file:
      engine = await PipelineEngine.connect(file.config, file.sha256(), local.fleet, options)
    try:
      yield engine
    finally:
      await engine.close()


async def decode_s(engine: PipelineEngine, tokens: int) -> list[float]:
  """Seconds between the tokens of one answer."""
  times = []
  async for _ in engine.generate(Request(prompt=[1], max_tokens=tokens)):
    times.append(time.perf_counter())
  return [b - a for a, b in itertools.pairwise(times[1:])]


def predicted_s(
  config: ModelConfig, fleet: Fleet, load: Load, parts: list[Span], context: int
) -> float:
  """One token through stage servers on the one host of the fleet, and back."""
  [host] = fleet.hosts
  device = host.devices[0]
  total = 2 * predict.hop_s(fleet, host.label, host.label, predict.TOKEN_BYTES)
  hop = predict.hop_s(fleet, host.label, host.label, predict.wire_bytes(config, load))
  total += (len(parts) - 1) * hop
  for span in parts:
    total += predict.stage_step_s(config, span, load, device, context=context).total
  return total


@dataclasses.dataclass
class Tokens:
  """Seconds of every token of one pipeline, and what its stages hold."""

  spans: list[Span]
  seconds: list[float] = dataclasses.field(default_factory=list)
  load: float = 0.0


def decode(path: Path, load: Load, settings: dict[str, Any]) -> dict[int, Tokens]:
  """A pipeline of each length, `repetitions` times in turn."""
  found: dict[int, Tokens] = {}

  async def all_of_them() -> None:
    async with contextlib.AsyncExitStack() as stack:
      engines = {
        n: await stack.enter_async_context(pipeline(path, load, n)) for n in settings["stages"]
      }
      for number, engine in engines.items():
        await decode_s(engine, 4)
        found[number] = Tokens([placement.span for placement in engine.placements])
      for _ in range(settings["repetitions"]):
        for number, engine in engines.items():
          found[number].seconds += await decode_s(engine, settings["tokens"])
          found[number].load = os.getloadavg()[0]

  asyncio.run(all_of_them())
  return found


def compared(
  config: ModelConfig,
  load: Load,
  fleet: Fleet,
  measured: dict[int, Tokens],
  settings: dict[str, Any],
) -> Iterator[Row]:
  for number, tokens in measured.items():
    yield row(
      "decode",
      load.weights,
      number,
      "one token",
      predicted=predicted_s(config, fleet, load, tokens.spans, settings["tokens"] // 2),
      measured=min(tokens.seconds),
      median=statistics.median(tokens.seconds),
      load=tokens.load,
    )


def probed(config: ModelConfig, forms: Sequence[Weights]) -> Fleet:
  """As `neurojax probe --arch` says of this host."""
  devices = probe_devices(layers_of=config, forms=forms)
  [cpu] = [device for device in devices if device.kind == "cpu"]
  local = asyncio.run(links.loopback())
  [cpu] = asyncio.run(with_handover([cpu], local))
  return Fleet(
    hosts=(Host(name="here", devices=(cpu,)),),
    local_latency_s=local.latency_s,
    local_bytes_per_s=local.bytes_per_s,
    coordinator="here",
  )


def undisturbed(a: Fleet, b: Fleet) -> Fleet:
  """Of two probes of this host the higher rates and the lower overheads."""

  def device(a: Device, b: Device) -> Device:
    rates = {
      field.name: max(filter(None, pair), default=None)
      for field in dataclasses.fields(DecodeRates)
      if (pair := [getattr(d.decode_bytes_per_s, field.name) for d in (a, b)])
    }
    best = {name: max(getattr(a, name), getattr(b, name)) for name in FASTER}
    least = {name: min(getattr(a, name), getattr(b, name)) for name in SHORTER}
    return dataclasses.replace(a, decode_bytes_per_s=DecodeRates(**rates), **best, **least)

  cpu = device(a.hosts[0].devices[0], b.hosts[0].devices[0])
  return dataclasses.replace(
    a,
    hosts=(dataclasses.replace(a.hosts[0], devices=(cpu,)),),
    local_latency_s=min(a.local_latency_s, b.local_latency_s),
    local_bytes_per_s=max(a.local_bytes_per_s, b.local_bytes_per_s),
  )


def table() -> str:
  """Markdown of results.csv."""
  with RESULTS.open(encoding="utf-8") as lines:
    rows = list(csv.DictReader(lines))
  out = ["| what | weights | stages | predicted | measured | error | median, as busy as it was |"]
  out.append("|---|---|---|---|---|---|---|")
  for found in rows:
    if found["what"] != "decode":
      show = lambda text: f"{float(text) / 1e6:.1f} MB"  # noqa: E731
    else:
      show = lambda text: f"{float(text) * 1e3:.2f} ms"  # noqa: E731
    out.append(
      f"| {found['what']}, {found['part']} | {found['weights']} | {found['stages']} "
      f"| {show(found['predicted'])} | {show(found['measured'])} | {float(found['error']):+.1%} "
      f"| {show(found['median']) if found['median'] else ''} |"
    )
  first = rows[0]
  loads = [float(found["load"]) for found in rows if found["what"] == "decode"]
  busy = f", load {min(loads):.1f} to {max(loads):.1f} while decoding" if loads else ""
  where = f"{first['cores']} cores of {first['device']}, jax {first['jax']}, {first['date']}{busy}"
  return "\n".join(out) + f"\n\n{where}.\n"


def main(results: Path) -> None:
  settings = tomllib.loads((HERE / "config.toml").read_text())
  config = from_dict(ModelConfig, settings["model"], where="config.toml: model")
  # A run that fails leaves the results of the one before.
  part = results.with_name("results.part.csv")
  part.unlink(missing_ok=True)
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "dummy.gguf"
    write_dummy(path, config, settings["kind"])
    with open_model(path) as file:
      config, ternary = file.config, ternary_matrices(file)
    loads, rows = {}, []
    before = probed(config, settings["weights"])
    for weights in settings["weights"]:
      loads[weights] = load = Load(
        serving=Serving(weights=weights, context=settings["context"], sequences=1),
        forms=ternary,
        working=False,
      )
      rows.append(decode(path, load, settings))
    fleet = undisturbed(before, probed(config, settings["weights"]))
    (HERE / "fleet.toml").write_text(to_toml(fleet), encoding="utf-8")
    for load, measured in zip(loads.values(), rows, strict=True):
      for found in compared(config, load, fleet, measured, settings):
        timing.append_csv(part, [found])
    for load in loads.values():
      for stages in settings["stages"]:
        for found in memory(path, load, stages):
          timing.append_csv(part, [found])
  part.replace(results)


def write_table() -> None:
  readme = HERE / "README.md"
  opening, closing = "<!-- results -->\n", "<!-- /results -->"
  before, _, rest = readme.read_text(encoding="utf-8").partition(opening)
  after = rest.partition(closing)[2]
  readme.write_text(f"{before}{opening}{table()}{closing}{after}", encoding="utf-8")


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--table", action="store_true")
  if not parser.parse_args().table:
    main(RESULTS)
  write_table()
