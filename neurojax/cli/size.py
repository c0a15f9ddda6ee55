"""`neurojax size`: finds the largest architecture that a fleet can hold, and predicts its speed and loss."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from neurojax.cli.options import check_out
from neurojax.count.wording import short

if TYPE_CHECKING:
  from neurojax.plan.fleet import Fleet
  from neurojax.scaling.memory_curve import Point
  from neurojax.scaling.purpose import Purpose
  from neurojax.scaling.seed import SeedArchitecture
  from neurojax.scaling.size import Sized


OF_SEED = ("fleet", "memory", "mode", "out_config", "out_arch", "json", "toml")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
  """Find the largest architecture that fits a fleet, with a placement of its layers and predictions.

  The candidates are a fixed list of valid architectures, and their bytes are counted exactly: more memory never
  gives a smaller model. The arithmetic behind every number is printed.

  Example: neurojax size --memory 200GB --for train --tokens 100e9
  """

  fleet: Annotated[str | None, tyro.conf.arg(metavar="TOML")] = None
  """A fleet file, as `neurojax probe` writes it, or the name of one in configs/fleet."""
  memory: Annotated[str | None, tyro.conf.arg(metavar="SIZE")] = None
  """Instead of a fleet: the memory of one host with one device, whose speed is not known. 200GB is 200e9
  bytes, 200GiB is 200 * 2**30."""
  purpose: Annotated[Literal["serve", "train"], tyro.conf.arg(name="for")] = "serve"
  """Purpose of the memory: "serve" counts weights and caches, "train" master weights, gradients, optimizer and
  activations."""
  tokens: float | None = None
  """Training tokens, for loss and days, such as 100e9. If absent, the number that the law finds best for the
  size."""
  days: float | None = None
  """Days of training on this fleet, instead of a number of tokens."""
  context: int = 2048
  """Positions of a sequence."""
  batch: int = 1
  """Sequences in memory at once."""
  format: Annotated[str, tyro.conf.arg(metavar="FORMAT")] = "ternary-g128"
  """Format of the weights when serving: float32, bf16, int8, or a ternary format (ternary-g64, ternary-g128,
  ternary-g256, ternary-tensor, TQ1_0, TQ2_0, PQ2_0, I2_S). Training holds float32 master weights and
  computes in bfloat16, or in float32 if that is the format."""
  optimizer: Literal["adamw", "muon", "sgd"] = "adamw"
  """Optimizer of training, whose state takes memory."""
  remat: bool = True
  """Training keeps only the inputs of layers, and computes their activations again in the backward pass."""
  diloco: bool = False
  """Training also holds DiLoCo's snapshot and outer momentum."""
  law: Annotated[str, tyro.conf.arg(metavar="NAME|TOML")] = "besiroglu"
  """Law that predicts the loss: besiroglu, hoffmann, or the TOML file of your own fit."""
  mfu: float = 0.4
  """Share of the devices' FLOP/s that training reaches."""
  headroom: float = 0.1
  """Share of each place's free memory that stays free."""
  vocab: int | None = None
  """Size of the vocabulary; that of --current, or 50304, if absent."""
  most_parameters: float | None = None
  """Leave larger candidates out: a smaller model may be the better one for few tokens."""
  current: Annotated[str | None, tyro.conf.arg(metavar="NAME|TOML")] = None
  """The architecture in use: kept unless one at least 1.3 times larger fits, or it no longer fits itself."""
  mode: Literal["ours", "seed-formula", "seed-table"] = "ours"
  """"seed-formula" and "seed-table" show what the page that this project started from gives for the memory, and
  what is wrong with it. --out-config then writes that architecture, if it is one."""
  out_config: Annotated[Path | None, tyro.conf.arg(metavar="TOML")] = None
  """Write a configuration to this file: sized for training, what `neurojax train --config` takes; sized for
  serving, the architecture."""
  out_arch: Annotated[Path | None, tyro.conf.arg(metavar="TOML")] = None
  """Write the architecture alone to this file, as --arch and --model of other commands take it."""
  json: bool = False
  """Print one JSON object."""
  toml: bool = False
  """Print the same as TOML."""
  plot: Annotated[Path | None, tyro.conf.arg(metavar="PNG")] = None
  """Draw parameters, loss and speed against memory, from 1/16 to 16 times this, into this file."""

  def _check(self) -> None:
    if (self.fleet is None) == (self.memory is None):
      raise ValueError("give either --fleet or --memory")
    if self.json and self.toml:
      raise ValueError("--json and --toml: give one of them")
    if self.mode != "ours":
      for field in dataclasses.fields(self):
        if field.name not in OF_SEED and getattr(self, field.name) != field.default:
          flag = "for" if field.name == "purpose" else field.name.replace("_", "-")
          flag = f"no-{flag}" if field.default is True else flag
          raise ValueError(
            f"--mode {self.mode} knows memory alone, and draws nothing: leave --{flag} out"
          )
    for name, most in (("context", 2**31), ("batch", 2**20), ("vocab", 2**31)):
      value = getattr(self, name)
      if value is not None and not 1 <= value <= most:
        raise ValueError(f"--{name} {value}: between 1 and {most}")
    check_out("--out-config", self.out_config)
    check_out("--out-arch", self.out_arch)
    check_out("--plot", self.plot)
    if self.plot:
      check_plot(self.plot)

  def run(self) -> int:
    self._check()
    if self.mode != "ours":
      return self._seed()
    from neurojax.config import ModelConfig, to_toml
    from neurojax.forms import TERNARY_FORMATS
    from neurojax.scaling import train_file
    from neurojax.scaling.candidates import VOCAB_SIZE
    from neurojax.scaling.law import read_law
    from neurojax.scaling.size import size
    from neurojax.scaling.train_file import train_toml

    current = ModelConfig.named(self.current) if self.current else None
    fleet, purpose = self._fleet(), self.purpose_of()
    options: dict[str, Any] = {
      "headroom": self.headroom,
      "vocab_size": self.vocab or (current.vocab_size if current else VOCAB_SIZE),
      "most_parameters": self.most_parameters,
      "tokens": self.tokens,
      "days": self.days,
      "law": read_law(self.law),
      "mfu": self.mfu,
    }
    found = size(fleet, purpose, current=current, **options)
    if self.plot:
      from neurojax.scaling.memory_curve import curve

      draw(curve(fleet, purpose, **options), self.plot)
    if self.out_arch:
      self._write(self.out_arch, to_toml(found.config))
    if self.out_config and self.purpose == "serve":
      self._write(self.out_config, to_toml(found.config))
    elif self.out_config:
      scales = TERNARY_FORMATS.get(self.format)
      self._write(self.out_config, train_toml(found, scales), train_file.NOTE)
    if self.json or self.toml:
      print(_text(found.table(), toml=self.toml), end="\n" if self.json else "")
    else:
      render(found, Console(markup=False))
    return 0

  def purpose_of(self) -> "Purpose":
    """Raises: ValueError: an unknown format."""
    from neurojax.scaling.purpose import purpose_of

    try:
      return purpose_of(
        self.purpose,
        form=self.format,
        context=self.context,
        sequences=self.batch,
        optimizer=self.optimizer,
        remat=self.remat,
        diloco=self.diloco,
      )
    except ValueError as error:
      raise ValueError(f"--format {error}") from error

  def _fleet(self) -> "Fleet":
    from neurojax.plan.fleet import parse_bytes, read_fleet
    from neurojax.scaling.size import one_host

    if self.fleet is not None:
      return read_fleet(self.fleet)
    assert self.memory is not None
    return one_host(parse_bytes(self.memory))

  def _write(self, path: Path, text: str, note: str = "") -> None:
    comment = "".join(f"# {line}\n" for line in (self._command(), *note.splitlines()))
    path.write_text(comment + text, encoding="utf-8")

  def _command(self) -> str:
    """The command that writes the same file again."""
    defaults = {field.name: field.default for field in dataclasses.fields(self)}
    names = ("fleet", "memory", "purpose", "context", "batch", "format", "optimizer", "remat", "diloco",
             "headroom", "vocab", "most_parameters", "current", "mode", "out_config", "out_arch")  # fmt: skip
    if self.purpose == "train" and self.out_config:
      # The steps of a run follow from these.
      names += ("tokens", "days", "law", "mfu")
    if self.mode != "ours":
      names = OF_SEED[:5]
    words = ["neurojax", "size"]
    for name in names:
      value, flag = getattr(self, name), "for" if name == "purpose" else name.replace("_", "-")
      if value is None or (value == defaults[name] and name != "purpose"):
        continue
      if isinstance(value, bool):
        words.append(f"--{flag}" if value else f"--no-{flag}")
      else:
        words += [f"--{flag}", str(value)]
    return shlex.join(words)

  def _seed(self) -> int:
    from neurojax.config import to_toml
    from neurojax.scaling import seed

    # Its gigabytes are of the whole network, whatever its hosts are.
    memory_gb = sum(place.free_bytes for place in self._fleet().places()) / 1e9
    given = seed.formula(memory_gb) if self.mode == "seed-formula" else seed.row(memory_gb)
    for path in (self.out_config, self.out_arch):
      if path:
        self._write(path, to_toml(given.config()), seed.NOTE)
    table = _seed_table(given)
    if self.json or self.toml:
      print(_text(table, toml=self.toml), end="\n" if self.json else "")
      return 0
    console = Console(markup=False)
    console.print(
      f"{self.mode}, {given.memory_gb:g} GB: {given.num_layers} layers of {given.model_dim}, "
      f"{given.num_heads} heads, {given.num_kv_heads} key-value heads, ffn {given.ffn_dim}, "
      f"{given.parameters():,} parameters\n",
      highlight=False,
    )
    console.print("valid" if table["valid"] else "invalid: no architecture", highlight=False)
    for finding in table["findings"]:
      console.print(f"  - {finding}", highlight=False)
    return 0


def render(found: "Sized", console: Console) -> None:
  console.print(f"{found.summary()}\n", highlight=False)
  stages = Table(box=None, pad_edge=False)
  columns = ["stage", "layers", "memory", "of", "stays free"]
  if has_steps := any(stage.step_s is not None for stage in found.stages):
    columns.append("step")
  for column in columns:
    stages.add_column(column, justify="left" if column in ("stage", "layers") else "right")
  for stage in found.stages[:32]:
    free = stage.free_bytes - stage.memory_bytes
    stages.add_row(
      stage.label,
      f"{stage.first_layer}..{stage.last_layer}",
      _gb(stage.memory_bytes),
      _gb(stage.free_bytes),
      f"{_gb(free)} ({free / stage.free_bytes:.0%})",
      *([_step(stage.step_s)] if has_steps else []),
    )
  console.print(stages)
  if len(found.stages) > 32:
    console.print(f"and {len(found.stages) - 32} more (--json has all)")
  idle = [host.host for host in found.hosts if not host.memory_bytes]
  if idle:
    console.print(f"without layers: {', '.join(idle[:8])}{' ...' if len(idle) > 8 else ''}")
  console.print()
  predicted = Table(box=None, show_header=False, pad_edge=False)
  for what, value in found.predictions():
    predicted.add_row(what, value)
  console.print(predicted, highlight=False)
  console.print()
  arithmetic = Table(box=None, show_header=False, pad_edge=False)
  for line in found.arithmetic:
    arithmetic.add_row(line.what, line.how)
  console.print(arithmetic, highlight=False)
  if found.notes:
    console.print()
  for note in found.notes:
    console.print(f"note: {note}", highlight=False)


def check_plot(path: Path) -> None:
  """Raises: ValueError: matplotlib is not installed, or does not know the file's type."""
  try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
  except ImportError as error:
    raise ValueError(
      '--plot needs matplotlib: `make setup EXTRA=plot`, or `pip install "CHECKOUT[plot]"`'
    ) from error
  known = FigureCanvasAgg.get_supported_filetypes()
  if path.suffix[1:].lower() not in known:
    raise ValueError(f"--plot {path}: a name that ends in one of {', '.join(sorted(known))}")


def draw(points: "list[Point]", path: Path) -> None:
  """With what `check_plot` looked for."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 8), layout="constrained")
  FigureCanvasAgg(figure)
  # Without a speed there is nothing to draw below.
  rates = [point.tokens_per_s for point in points]
  panels = [
    ("parameters", [point.parameters for point in points], "log"),
    ("predicted loss, bf16 (nats)", [point.loss for point in points], "linear"),
    ("tokens/s", rates, "log"),
  ]
  panels = [panel for panel in panels if any(value is not None for value in panel[1])]
  for axes, (what, values, scale) in zip(
    figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], panels, strict=True
  ):
    kept = [(p.memory_bytes / 1e9, v) for p, v in zip(points, values, strict=True) if v is not None]
    axes.plot(*zip(*kept, strict=True), marker=".")
    axes.set(ylabel=what, xscale="log", yscale=scale)
    axes.grid(alpha=0.3)
  axes.set_xlabel("memory of the fleet (GB)")
  figure.savefig(path)


def _seed_table(given: "SeedArchitecture") -> dict[str, Any]:
  from neurojax.scaling import seed

  fields = {name: value for name, value in dataclasses.asdict(given).items() if value is not None}
  return {
    **fields,
    "parameters": given.parameters(),
    "parameters_untied": given.parameters(tied=False),
    "estimated_gib": given.estimated_gib(),
    "train_gib": seed.train_gib(given),
    "valid": not seed.invalid(given),
    "invalid": list(seed.invalid(given)),
    "findings": list(seed.findings(given)),
  }


def _text(table: dict[str, Any], *, toml: bool) -> str:
  if not toml:
    return json.dumps(table, ensure_ascii=False, indent=1)
  import tomli_w

  return tomli_w.dumps(table)


def _gb(size: int) -> str:
  return f"{size / 1e9:,.2f} GB"


def _step(seconds: float | None) -> str:
  return "" if seconds is None else _seconds(seconds)


def _seconds(seconds: float) -> str:
  for factor, unit in ((1e6, "us"), (1e3, "ms")):
    if seconds * factor < 1000:
      return f"{seconds * factor:.3g} {unit}"
  return f"{short(seconds)} s"
