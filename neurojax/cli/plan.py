"""`neurojax plan`: says which host holds which layers, and why."""

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from neurojax.config import MOST_SEQUENCES, ModelConfig, Serving, to_toml
from neurojax.count.wording import short
from neurojax.forms import Weights

if TYPE_CHECKING:
  from neurojax.count.serving import Load
  from neurojax.forms import Forms
  from neurojax.plan.fleet import Fleet
  from neurojax.plan.plan import Plan

MOST_ROWS = 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanningOptions:
  """Options of planning, which `neurojax plan` and `neurojax simulate` share."""

  model: Annotated[str | None, tyro.conf.arg(metavar="MODEL|NAME|TOML")] = None
  """The model to place: the name of an architecture in configs/model, the TOML file of one, or a model file
  as for `neurojax generate`."""
  fleet: Annotated[str | None, tyro.conf.arg(metavar="TOML")] = None
  """The machines: a fleet file, which `neurojax probe` writes, or the name of one in configs/fleet."""
  objective: Literal["latency", "throughput"] = "latency"
  """"latency": the least time of a decoded token; "throughput": the most tokens a second over many
  sequences."""
  context: Annotated[int | None, tyro.conf.arg(metavar="TOKENS")] = None
  """Positions for prompt and answer together; the model's own, at most 2048, if absent."""
  batch: Annotated[int, tyro.conf.arg(metavar="N")] = 1
  """Sequences that each decode step computes together."""
  sequences: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
  """Sequences in flight at once in each pipeline: memory is planned for their caches. If absent 4; for
  throughput as many as make it faster and memory has room for."""
  dtype: Literal["float32", "bfloat16"] = "float32"
  """Floating-point type of activations and caches, and of dense weights."""
  weights: Weights | Literal["auto"] = "auto"
  """How matrices are held: "auto" takes the form that the model file is made for, dense for an architecture
  without a file; "dense" in the dtype; "int8" as 8-bit integers; "w2a16" and "w2a8" with two bits for each
  ternary weight; "stored" as the file has them."""
  ternary: Annotated[str, tyro.conf.arg(metavar="FORMAT")] = "ternary-g128"
  """Layout of the scales of two-bit weights, for an architecture without a model file."""
  pin: Annotated[
    tuple[str, ...], tyro.conf.arg(metavar="HOST=LAYERS"), tyro.conf.UseAppendAction
  ] = ()
  """Number of layers that a host has to hold, whatever is best; 0 keeps it out. May be given several times."""
  replicas: Annotated[Literal["auto"] | int, tyro.conf.arg(metavar="N|auto")] = 1
  """1: every layer has one place, and other commands can run the plan (`--plan`). "auto", for throughput: the
  same layers go to several machines wherever that is faster. A larger number: so many whole pipelines side by
  side."""
  seconds: Annotated[float, tyro.conf.arg(metavar="S")] = 5.0
  """Time limit of the search, where the best plan cannot be computed."""

  def _check(self) -> None:
    for name, most in (("sequences", MOST_SEQUENCES), ("batch", 4096), ("context", 2**31)):
      value = getattr(self, name)
      if value is not None and not 1 <= value <= most:
        raise ValueError(f"--{name} {value}: between 1 and {most}")
    if not 0 < self.seconds < math.inf:
      raise ValueError(f"--seconds {self.seconds}: a positive number of seconds")

  def asked(self) -> "Asked":
    """The model, the fleet and the serving that the options name.

    Raises: ValueError: what is missing or does not go together.
    """
    from neurojax.files.described import described
    from neurojax.plan.fleet import read_fleet

    self._check()
    if not self.model or not self.fleet:
      raise ValueError(
        "give --model and --fleet: which model is to be placed, and on which machines"
      )
    found = described(self.model, weights=self.weights, ternary=self.ternary)
    serving = Serving(
      dtype=self.dtype,
      weights=self.weights,
      context=self.context,
      sequences=self.sequences or Serving().sequences,
    )
    serving = serving.resolve(found.config, found.forms, found.activations)
    are_chosen = self.sequences is None and self.objective == "throughput"
    if not are_chosen and serving.sequences < self.batch:
      raise ValueError(
        f"--batch {self.batch} and --sequences {serving.sequences}: a batch has more sequences than are in "
        "flight: plan for more of them or make the batch smaller"
      )
    return Asked(found.config, read_fleet(self.fleet), serving, found.forms)

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

  def plan(self, asked: "Asked") -> "Plan":
    from neurojax.plan.in_flight import planned

    return planned(
      asked.config,
      asked.fleet,
      asked.serving,
      asked.forms,
      objective=self.objective,
      replicas=self._replicas(),
      batch=self.batch,
      pins=self.pins(),
      choose_sequences=self.sequences is None,
      time_limit_s=self.seconds,
    )


@dataclasses.dataclass(frozen=True)
class Asked:
  """The model, the fleet and the serving to plan for, with every choice made."""

  config: ModelConfig
  fleet: "Fleet"
  serving: Serving
  forms: "Forms | None"

  def load(self, plan: "Plan") -> "Load":
    """The load of each stage with the sequences of a plan."""
    from neurojax.count.serving import Load

    load = Load(serving=self.serving, forms=self.forms)
    return load.serve(sequences=plan.sequences or load.sequences)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planning(PlanningOptions):
  """Place a model's layers on machines of different memory and speed, and say why.

  Each host gets contiguous layers that fit its free memory; the first stage also holds the embedding, the
  last one the final norm and the head. Hosts may come in any order, and a host that would only slow the model
  down gets none.

  Example: neurojax plan --model bonsai-8b --fleet fleet.toml --weights w2a16 --compare
  """

  compare: bool = False
  """Show simple placements beside it: proportional to memory, greedy, equal split, filled in order."""
  json: bool = False
  """Print one JSON object."""
  toml: bool = False
  """Print the plan as TOML, which `neurojax simulate --plan` reads."""

  def run(self) -> int:
    from neurojax.plan import best

    if self.json and self.toml:
      raise ValueError("--json and --toml: give one of them")
    asked = self.asked()
    made = self.plan(asked)
    if self.toml:
      print(to_toml(made), end="")
      return 0
    config, fleet, load = asked.config, asked.fleet, asked.load(made)
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
      # The plan itself stands; the larger fleet may have more places than can be planned, for one.
      added, larger = str(error), None
    simple: dict[str, Plan | str] = {}
    if self.compare:
      simple = best.compared(
        config,
        fleet,
        load,
        objective=self.objective,
        context=made.context,
        batch=made.batch,
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
      console.print(f"With another {added}: {larger.summary()}, {_change(made, larger)}.")
    else:
      console.print(f"No plan with another host: {added}.")
    if self.compare:
      console.print(_comparison({"ours": made, **simple}))
    return 0


def _change(before: "Plan", after: "Plan") -> str:
  if before.objective == "latency":
    return f"{1 - after.latency_s / before.latency_s:.1%} less time a token"
  return f"{after.throughput / before.throughput - 1:.1%} more tokens"


def _gigabytes(size: int) -> str:
  return f"{size / 1e9:.3g} GB"


def _show(console: Console, plan: "Plan") -> None:
  title = f"{plan.objective}: {plan.summary()}"
  table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
  columns = ["host", "device", "layers", "memory", "of", "step"]
  columns += ["pipeline"] if plan.is_replicated else []
  for name in columns:
    # On a narrow terminal only the device's name is broken into lines.
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
  # Reasons are sentences, too long for a column of the table. Places that get no layers for the same
  # reason share a line.
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
    console.print(f"{hidden} rows are left out here: --json has all")
  for limit in plan.limits:
    console.print(f"{limit[0].upper()}{limit[1:]}.")
  console.print(plan.proof())


def _comparison(plans: "dict[str, Plan | str]") -> Table:
  title = "compared with simple placements, times predicted alike"
  table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
  for name in ("placement", "stages", "a token", "tokens/s", "fullest place", ""):
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
