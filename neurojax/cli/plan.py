"""`neurojax plan`: which host is to hold which layers."""

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from neurojax import count, forms
from neurojax.config import MOST_SEQUENCES, ModelConfig, Serving, architectures, to_toml
from neurojax.count.wording import short
from neurojax.forms import Weights

if TYPE_CHECKING:
  from neurojax.count.serving import Load
  from neurojax.plan.fleet import Fleet
  from neurojax.plan.plan import Plan

MOST_ROWS = 24
NEAR, NEAR_SHARED = 0.99, 0.96
"""Of the throughput that unlimited caches would give: with it no fewer sequences are tried. Where layers are
shared every try is a longer search."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanningOptions:
  """What is placed where."""

  model: Annotated[str | None, tyro.conf.arg(metavar="MODEL|NAME|TOML")] = None
  """An architecture of configs/model, the TOML file of one, or a model, as for `neurojax generate`."""
  fleet: Annotated[str | None, tyro.conf.arg(metavar="TOML")] = None
  """The machines: what `neurojax probe` writes, or the same by hand."""
  objective: Literal["latency", "throughput"] = "latency"
  """Of one decoded token, or tokens per second of many sequences."""
  context: Annotated[int | None, tyro.conf.arg(metavar="TOKENS")] = None
  """Positions of each sequence; the model's own, at most 2048, if absent."""
  batch: Annotated[int, tyro.conf.arg(metavar="N")] = 1
  """Sequences that go through together. The pipeline steps each by itself: 1."""
  sequences: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
  """Sequences that are in flight at once, in each of several pipelines: memory for their caches is
  planned, and throughput is that of so many. If absent 4, or for throughput as many as the plan gains
  by and memory has room for."""
  dtype: Literal["float32", "bfloat16"] = "float32"
  """Of activations and caches, and of dense weights."""
  weights: Weights = "dense"
  """"dense", "int8", or, two bits for each ternary weight, "w2a16" and "w2a8"."""
  ternary: Annotated[str, tyro.conf.arg(metavar="FORMAT")] = "ternary-g128"
  """Of an architecture without a file: how scales lie beside two-bit weights, all matrices alike."""
  pin: Annotated[
    tuple[str, ...], tyro.conf.arg(metavar="HOST=LAYERS"), tyro.conf.UseAppendAction
  ] = ()
  """Layers that a host is to hold whatever is best; 0 keeps it out. May be given several times."""
  replicas: Annotated[Literal["auto"] | int, tyro.conf.arg(metavar="N|auto")] = 1
  """1 has every layer lie once, as `--plan` of other verbs can run it. "auto", for throughput, gives the same
  layers to several machines wherever that brings more; a number is so many whole pipelines side by side."""
  seconds: Annotated[float, tyro.conf.arg(metavar="S")] = 5.0
  """For the search, where the best plan cannot be computed."""

  def _check(self) -> None:
    for name, most in (("sequences", MOST_SEQUENCES), ("batch", 4096), ("context", 2**31)):
      value = getattr(self, name)
      if value is not None and not 1 <= value <= most:
        raise ValueError(f"--{name} {value}: between 1 and {most}")
    if not 0 < self.seconds < math.inf:
      raise ValueError(f"--seconds {self.seconds}: a positive number of seconds")

  def read(self) -> "tuple[ModelConfig, Fleet, Load]":
    """Raises: ValueError: what is missing or does not go together."""
    from neurojax.count.serving import Load
    from neurojax.plan.fleet import read_fleet

    self._check()
    if not self.model or not self.fleet:
      raise ValueError("give --model and --fleet: what is to be placed, and where")
    config, ternary = _model(self.model, self.weights, self.ternary)
    serving = Serving(
      dtype=self.dtype,
      weights=self.weights,
      context=self.context,
      sequences=self.sequences or Serving().sequences,
    )
    load = Load(serving=serving.resolve(config, ternary), forms=ternary)
    return config, read_fleet(self.fleet), load

  def pins(self) -> dict[str, int]:
    found = {}
    for text in self.pin:
      host, equals, layers = text.rpartition("=")
      if not (equals and host and layers.isascii() and layers.isdecimal()):
        raise ValueError(f"--pin {text}: write HOST=LAYERS, for example gpu-1=12")
      if found.get(host, int(layers)) != int(layers):
        raise ValueError(
          f"--pin {text}: {host} is pinned to {found[host]} already; give one of them"
        )
      found[host] = int(layers)
    return found

  def _replicas(self) -> int | None:
    return None if self.replicas == "auto" else self.replicas

  def in_flight(self, load: "Load") -> int:
    """Batches of so many sequences. Raises: ValueError: not even one."""
    if load.sequences < self.batch:
      raise ValueError(
        f"--batch {self.batch} and --sequences {load.sequences}: a batch has more sequences than "
        "are in flight: plan more of them or make the batch smaller"
      )
    return load.sequences // self.batch

  def plan(self, config: ModelConfig, fleet: "Fleet", load: "Load") -> "Plan":
    """Of `Plan.sequences`, which may be more than the load's."""
    from neurojax.count.serving import layer_bytes

    if self.sequences is not None or self.objective == "latency":
      return self._plan(config, fleet, load, self.in_flight(load))
    load = load.serve(sequences=max(self.batch, load.sequences))
    deadline_s = time.monotonic() + self.seconds
    unlimited = self._plan(config, fleet, load, None)
    needed = min(unlimited.batches * self.batch, MOST_SEQUENCES)
    if needed <= load.sequences:
      return unlimited
    if self.replicas == "auto":
      # Every place has caches for all that its pipeline may have in flight: where these take far more
      # memory than a layer, shorter pipelines side by side give more.
      cache = count.cache_bytes(config, 1, capacity=load.capacity, dtype=load.dtype)
      while needed // 8 > load.sequences and needed * cache > 2 * layer_bytes(config, load):
        needed //= 8
    # Caches for all of them take memory that layers then lack: fewer may give more.
    enough = unlimited.throughput * (NEAR_SHARED if self.replicas == "auto" else NEAR)
    best: Plan | None = None
    while best is None or best.throughput < enough:
      if best and time.monotonic() > deadline_s:
        break
      few = max(needed, load.sequences)
      made = self._if_it_fits(config, fleet, load.serve(sequences=few))
      if best and made and made.value() >= best.value():
        break
      best = made or best
      if few == load.sequences:
        break
      needed //= 8
    return best or unlimited

  def _if_it_fits(self, config: ModelConfig, fleet: "Fleet", load: "Load") -> "Plan | None":
    try:
      return self._plan(config, fleet, load, self.in_flight(load))
    except ValueError:
      return None

  def _plan(
    self, config: ModelConfig, fleet: "Fleet", load: "Load", in_flight: int | None
  ) -> "Plan":
    from neurojax.plan import best

    return best.best(
      config,
      fleet,
      load,
      objective=self.objective,
      context=self.context,
      batch=self.batch,
      pins=self.pins(),
      replicas=self._replicas(),
      in_flight=in_flight,
      time_limit_s=self.seconds,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planning(PlanningOptions):
  """Place a model's layers on unlike machines, and say why.

  Contiguous layers, each once, in memory that is there; embedding on the first stage, norm and head on
  the last; any order of hosts, none used that only slows it down.

  Example: neurojax plan --model bonsai-8b --fleet fleet.toml --weights w2a16 --compare
  """

  compare: bool = False
  """Beside it the simple placements: proportional to memory, greedy, equal split, filled in order."""
  json: bool = False
  """Print one JSON object."""
  toml: bool = False
  """Print the plan as TOML, which `neurojax simulate --plan` reads."""

  def run(self) -> int:
    from neurojax.plan import best

    if self.json and self.toml:
      raise ValueError("--json and --toml: give one of them")
    config, fleet, load = self.read()
    made = self.plan(config, fleet, load)
    if self.toml:
      print(to_toml(made), end="")
      return 0
    load = load.serve(sequences=made.sequences or load.sequences)
    try:
      added, larger = best.one_more(
        config,
        fleet,
        load,
        made,
        pins=self.pins(),
        replicas=self._replicas(),
        time_limit_s=self.seconds,
      )
    except ValueError as error:
      # More places than can be planned for, say: the plan itself stands.
      added, larger = str(error), None
    simple: dict[str, Plan | str] = {}
    if self.compare:
      simple = best.compared(
        config,
        fleet,
        load,
        objective=self.objective,
        context=self.context,
        batch=self.batch,
        in_flight=made.in_flight,
      )
    if self.json:
      table: dict[str, Any] = dataclasses.asdict(made)
      table["one_more"] = {"error": added}
      if larger:
        table["one_more"] = {
          "added": added,
          "latency_s": larger.latency_s,
          "throughput": larger.throughput,
        }
      if self.compare:
        table["compared"] = {
          name: {"error": other} if isinstance(other, str) else dataclasses.asdict(other)
          for name, other in simple.items()
        }
      print(json.dumps(table, ensure_ascii=False, indent=1))
      return 0
    console = Console(markup=False)
    _show(console, made)
    if larger:
      console.print(f"One more {added}: {_speeds(larger)}, {_change(made, larger)}.")
    else:
      console.print(f"With one more host there is no plan: {added}.")
    if self.compare:
      console.print(_comparison({"ours": made, **simple}))
    return 0


def _model(model: str, weights: Weights, form: str) -> tuple[ModelConfig, forms.Forms | None]:
  """A configuration's, without JAX, or a file's."""
  if model in architectures() or Path(model).suffix == ".toml":
    config = ModelConfig.named(model)
    if weights not in ("w2a16", "w2a8"):
      return config, None
    if form not in forms.TERNARY_FORMATS:
      raise ValueError(f"--ternary {form}: choose one of {', '.join(forms.TERNARY_FORMATS)}")
    return config, count.uniform_ternary(config, forms.TERNARY_FORMATS[form])
  from neurojax.files.find import model_path
  from neurojax.files.load import stored_forms
  from neurojax.files.open import open_model

  try:
    path = model_path(model)
    if not path.exists():
      raise FileNotFoundError(f"{model}: no such file")
  except FileNotFoundError as error:
    known = ", ".join(architectures())
    raise ValueError(f"--model {error}; and no architecture of this name: {known}") from error
  with open_model(path) as file:
    return file.config, stored_forms(file)


def _speeds(plan: "Plan") -> str:
  each = f" in each of {plan.pipelines} pipelines" if plan.pipelines > 1 else ""
  return f"{short(plan.latency_s * 1e3)} ms a token, {short(plan.throughput)} tokens/s with {plan.batches} in flight{each}"


def _change(before: "Plan", after: "Plan") -> str:
  if before.objective == "latency":
    return f"{1 - after.latency_s / before.latency_s:.1%} less time a token"
  return f"{after.throughput / before.throughput - 1:.1%} more tokens"


def _gigabytes(size: int) -> str:
  return f"{size / 1e9:.3g} GB"


def _show(console: Console, plan: "Plan") -> None:
  title = f"{plan.objective}: {_speeds(plan)}"
  table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
  columns = ["host", "device", "layers", "memory", "of", "step"]
  columns += ["pipeline"] if plan.is_replicated else []
  for name in columns:
    # Of a narrow terminal only the device's name gives way.
    is_left = name in ("host", "device", "layers")
    table.add_column(name, justify="left" if is_left else "right", no_wrap=name != "device")
  for stage in plan.stages[:MOST_ROWS]:
    part = f"{stage.pipeline}" + (f": {stage.share:.0%}" if stage.share < 1 else "")
    table.add_row(
      stage.label,
      stage.device,
      f"{stage.first_layer}..{stage.last_layer} ({stage.layers})",
      _gigabytes(stage.memory_bytes),
      _gigabytes(stage.free_bytes),
      f"{short(stage.step_s * 1e3)} ms",
      *([part] if plan.is_replicated else []),
    )
  console.print(table)
  # Reasons are sentences: beside the table they would have a column of a few letters. Places that are
  # left out for the same reason share one.
  out: dict[str, list[str]] = {}
  why = {reason.host: reason.why for reason in plan.reasons}
  for stage in plan.stages[:MOST_ROWS]:
    console.print(f"{stage.label}: {why[stage.label]}", highlight=False)
  for reason in plan.reasons:
    if not reason.layers:
      out.setdefault(reason.why, []).append(reason.host)
  for reason, hosts in list(out.items())[:MOST_ROWS]:
    names = ", ".join(hosts[:3]) + (f" and {len(hosts) - 3} more" if len(hosts) > 3 else "")
    console.print(f"{names}: no layers; {reason}", highlight=False)
  hidden = max(0, len(plan.stages) - MOST_ROWS) + max(0, len(out) - MOST_ROWS)
  if hidden:
    console.print(f"and {hidden} rows more: see --json")
  for limit in plan.limits:
    console.print(f"{limit[0].upper()}{limit[1:]}.")
  proof = "not bounded" if plan.gap is None else f"at most {plan.gap:.2%} from the best"
  if plan.gap == 0:
    proof = "proven best"
  console.print(f"Found by {plan.method}: {proof}.")


def _comparison(plans: "dict[str, Plan | str]") -> Table:
  title = "side by side, by the same predictor"
  table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
  for name in ("placement", "stages", "a token", "tokens/s", "largest share of a place", ""):
    table.add_column(name, justify="right" if name not in ("placement", "") else "left")
  for name, plan in plans.items():
    if isinstance(plan, str):
      table.add_row(name, "", "", "", "", plan)
      continue
    fullest = max(stage.memory_bytes / stage.free_bytes for stage in plan.stages)
    table.add_row(
      name,
      str(len(plan.stages)),
      f"{short(plan.latency_s * 1e3)} ms",
      short(plan.throughput),
      f"{fullest:.0%}",
      plan.method,
    )
  return table
