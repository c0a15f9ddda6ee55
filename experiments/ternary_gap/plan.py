"""Which runs there are, how each is started, and what came of it."""

import csv
import dataclasses
import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from neurojax import count
from neurojax.config import ModelConfig, from_toml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
Weights = Literal["ternary", "bf16"]
WEIGHTS: tuple[Weights, ...] = ("ternary", "bf16")
_BASE = {"ternary": "embedded.toml", "bf16": "embedded-bf16.toml"}
_LAST_STEPS = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
  """A model of configs/model/neurollm-NAME.toml.

  Attributes:
    learning_rates: Peaks; the first is run first.
    tokens_per_s: Expected of one H200.
  """

  name: str
  learning_rates: tuple[float, ...]
  tokens_per_s: float

  @property
  def model(self) -> ModelConfig:
    return ModelConfig.load(ROOT / "configs" / "model" / f"neurollm-{self.name}.toml")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repeats:
  """Runs again with the seeds given, in turn."""

  size: str
  learning_rate: float
  seeds: tuple[int, ...]
  weights: tuple[Weights, ...] = WEIGHTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """config.toml, where each value is explained."""

  steps: int
  batch_size: int
  seq_len: int
  warmup_steps: int
  second_fraction: float
  group_size: int
  eval_batches: int
  checkpoint_every: int
  workers: int
  start_s: float
  assumed_sd: float
  repeats: tuple[Repeats, ...]
  sizes: tuple[Size, ...]

  @classmethod
  def load(cls, path: Path = HERE / "config.toml") -> "Plan":
    return from_toml(cls, path.read_text(encoding="utf-8"), where=str(path))

  @property
  def tokens(self) -> int:
    return self.steps * self.batch_size * self.seq_len

  def size(self, name: str) -> Size:
    for size in self.sizes:
      if size.name == name:
        return size
    raise ValueError(f"size {name!r}: choose one of {', '.join(s.name for s in self.sizes)}")

  def runs(self) -> "list[Run]":
    """In the order in which they are worth having: a table of all sizes first, then other rates."""
    most = max(len(size.learning_rates) for size in self.sizes)
    found = [
      Run(size.name, weights, size.learning_rates[turn])
      for turn in range(most)
      for size in self.sizes
      if turn < len(size.learning_rates)
      for weights in WEIGHTS
    ]
    return found + [
      Run(again.size, weights, again.learning_rate, seed)
      for again in self.repeats
      for seed in again.seeds
      for weights in again.weights
    ]


@dataclasses.dataclass(frozen=True, order=True)
class Run:
  """One training run; `seed` is that of the initial weights, tokens are the same for all."""

  size: str
  weights: str
  learning_rate: float
  seed: int = 0

  @property
  def name(self) -> str:
    return f"{self.size}-{self.weights}-{self.learning_rate:g}-{self.seed}"

  def options(self, plan: Plan) -> dict[str, object]:
    """Keys of the training configuration that differ from the base's, without the data's folder."""
    model = plan.size(self.size).model
    options: dict[str, object] = {
      f"model.{name}": str(value).lower() if isinstance(value, bool) else value
      for name, value in dataclasses.asdict(model).items()
      if value is not None and value != ()
    }
    if self.weights == "ternary":
      options["quantization.group_size"] = plan.group_size
    return options | {
      "optimizer.peak_lr": self.learning_rate,
      "optimizer.second_lr": float(f"{self.learning_rate * plan.second_fraction:.4g}"),
      "optimizer.warmup_steps": plan.warmup_steps,
      "steps": plan.steps,
      "accumulation": 1,
      "seed": self.seed,
      "data.batch_size": plan.batch_size,
      "data.seq_len": plan.seq_len,
      "data.workers": plan.workers,
      "eval_every": plan.steps,
      "eval_batches": plan.eval_batches,
      "checkpoint_every": plan.checkpoint_every,
      "keep": 1,
      "log_every": 25,
    }

  def arguments(self, plan: Plan, data: Path, workdir: Path) -> list[str]:
    """Of `neurojax`."""
    base = ROOT / "configs" / "train" / _BASE[self.weights]
    found = ["train", "--config", str(base), "--workdir", str(workdir), "--data.folder", str(data)]
    for key, value in self.options(plan).items():
      found += [f"--{key}", "none" if value is None else str(value)]
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """A line of results.csv.

  Attributes:
    parameters: All of them; non_embedding: without the embedding, which is the head too.
    tokens: Trained on. train_loss: mean of the last 50 steps. valid_loss: in nats per token, over
      valid_tokens of the held-out split. Both are None for a run that diverged.
    skipped: Steps that changed nothing, since their loss or gradient was not finite.
    tokens_per_s: Median. at_once: how many runs shared the device.
    data: The first digits of the data's digest.
  """

  size: str
  parameters: int
  non_embedding: int
  weights: str
  lr: float
  seed: int
  tokens: int
  train_loss: float | None
  valid_loss: float | None
  valid_tokens: int | None
  outcome: str
  skipped: int
  tokens_per_s: float | None
  at_once: int
  data: str
  device: str
  jax: str
  jaxlib: str
  optax: str
  commit: str
  date: str

  @property
  def run(self) -> Run:
    return Run(self.size, self.weights, self.lr, self.seed)


def outcome(
  plan: Plan, run: Run, workdir: Path, *, device: str, at_once: int, diverged: bool = False
) -> Row | None:
  """What the folder of a run says; None if it is not at its end."""
  path = workdir / "metrics.jsonl"
  if not path.is_file():
    return None
  steps, events = _records(path)
  ends = [e for e in events if e.get("event") == "evaluation" and e["step"] == plan.steps]
  if not ends and not diverged:
    return None
  env = json.loads((workdir / "env.json").read_text(encoding="utf-8"))[-1]
  identity = json.loads((workdir / "data.json").read_text(encoding="utf-8"))["identity"]
  losses = [r["loss"] for r in steps[-_LAST_STEPS:] if r["loss"] is not None]
  rates = [record["tokens_per_s"] for record in steps if record.get("tokens_per_s")]
  model = plan.size(run.size).model
  return Row(
    size=run.size,
    parameters=count.parameters(model),
    non_embedding=count.parameters(model) - model.vocab_size * model.model_dim,
    weights=run.weights,
    lr=run.learning_rate,
    seed=run.seed,
    tokens=plan.tokens,
    train_loss=round(statistics.fmean(losses), 5) if ends else None,
    valid_loss=round(ends[-1]["valid_loss"], 5) if ends else None,
    valid_tokens=ends[-1]["valid_tokens"] if ends else None,
    outcome="done" if ends else "diverged",
    skipped=sum(record.get("verdict") == "skipped" for record in steps),
    tokens_per_s=round(statistics.median(rates)) if rates else None,
    at_once=at_once,
    data=identity[:12],
    device=device,
    jax=env["versions"]["jax"],
    jaxlib=env["versions"]["jaxlib"],
    optax=env["versions"]["optax"],
    commit=(env["commit"] or "")[:10],
    date=env["time"][:10],
  )


def has_diverged(workdir: Path) -> bool:
  """Whether training gave up: the last step sent the run back once more than it may."""
  path = workdir / "metrics.jsonl"
  if not path.is_file():
    return False
  steps, _ = _records(path)
  return bool(steps) and steps[-1].get("verdict") == "back"


def _records(path: Path) -> tuple[list[dict], list[dict]]:
  steps: list[dict] = []
  events: list[dict] = []
  for line in path.read_text(encoding="utf-8").splitlines():
    try:
      record = json.loads(line)
    except json.JSONDecodeError:
      # The last line of a run that was killed; what comes back is cut before it.
      continue
    (events if "event" in record else steps).append(record)
  return steps, events


def read(path: Path) -> list[Row]:
  """Rows of results.csv; none if there is no file. Raises: ValueError: other columns."""
  if not path.is_file():
    return []
  with path.open(encoding="utf-8", newline="") as lines:
    table = csv.DictReader(lines)
    names = [field.name for field in dataclasses.fields(Row)]
    if table.fieldnames != names:
      raise ValueError(f"{path}: its columns are not {', '.join(names)}: take the file away")
    return [_row(line) for line in table]


_NUMBERS = {
  "parameters": int, "non_embedding": int, "lr": float, "seed": int, "tokens": int,
  "train_loss": float, "valid_loss": float, "valid_tokens": int, "skipped": int,
  "tokens_per_s": float, "at_once": int,
}  # fmt: skip


def _row(line: Mapping[str, str]) -> Row:
  return Row(**{
    name: (_NUMBERS[name](text) if text else None) if name in _NUMBERS else text
    for name, text in line.items()
  })  # fmt: skip


def write(path: Path, rows: Iterable[Row], plan: Plan) -> None:
  """In the order of sizes, weights and learning rates; whole or not at all."""
  sizes = [size.name for size in plan.sizes]
  ordered = sorted(rows, key=lambda r: (sizes.index(r.size), r.weights != "bf16", r.lr, r.seed))
  write_table(path, [dataclasses.asdict(row) for row in ordered])


def write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
  partial = path.with_name(f".{path.name}.partial")
  with partial.open("w", encoding="utf-8", newline="") as out:
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _text(value) for key, value in row.items()} for row in rows)
  os.replace(partial, path)


def _text(value: object) -> object:
  return f"{value:.10g}" if isinstance(value, float) else value


def comparable(rows: Sequence[Row], plan: Plan) -> None:
  """Raises: ValueError: rows of other tokens than the plan's or than each other's."""
  for row in rows:
    if row.tokens != plan.tokens or row.data != rows[0].data:
      raise ValueError(
        f"results.csv: {row.run.name} was trained on {row.tokens:,} tokens of data {row.data}, others"
        f" on {plan.tokens:,} of {rows[0].data}: losses on other tokens do not compare; take it away"
      )
