"""`neurojax simulate`: serves requests by a plan, without the machines."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from neurojax.cli.plan import PlanningOptions

if TYPE_CHECKING:
  from neurojax.plan.simulate import Failure, Result, Spread, Use

MOST_ROWS = 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class Simulate(PlanningOptions):
  """Simulate a plan that serves requests: prompts, decoding, queues, and hosts that fail.

  Takes a plan (--plan), or plans by itself from --model and --fleet.

  Example: neurojax simulate --model bonsai-8b --fleet fleet.toml --requests 100 --concurrency 8 --sequences 8 --fail b@10
  """

  plan_file: Annotated[Path | None, tyro.conf.arg(name="plan", metavar="TOML")] = None
  """A plan that `neurojax plan --toml` printed, instead of --model and --fleet."""
  requests: Annotated[int, tyro.conf.arg(metavar="N")] = 16
  """Requests to serve."""
  concurrency: Annotated[int, tyro.conf.arg(metavar="N")] = 4
  """Requests that are served at the same time."""
  prompt: Annotated[int, tyro.conf.arg(metavar="TOKENS")] = 128
  """Length of each prompt."""
  answer: Annotated[int, tyro.conf.arg(metavar="TOKENS")] = 128
  """Length of each answer."""
  fail: Annotated[
    tuple[str, ...], tyro.conf.arg(metavar="HOST@SECONDS"), tyro.conf.UseAppendAction
  ] = ()
  """A host that fails, and after how many seconds: requests under way in its pipeline start again. May be
  given several times."""
  failures_per_hour: float = 0.0
  """Failures of each host in an hour, at random times."""
  repair: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 60.0
  """Time until a replacement serves the layers of a host that failed."""
  retry: bool = True
  """Send a request again if a host fails that it needs."""
  seed: int = 0
  """Seed of the random failures."""
  json: bool = False
  """Print one JSON object."""

  def run(self) -> int:
    from neurojax.plan.plan_file import read_plan
    from neurojax.plan.simulate import simulate

    if self.plan_file is not None:
      if self.model is not None or self.fleet is not None:
        raise ValueError("--plan has a model and a fleet already: leave --model and --fleet out")
      for field in dataclasses.fields(PlanningOptions):
        if getattr(self, field.name) != field.default:
          raise ValueError(
            f"--plan is made already: leave --{field.name} out, or plan again with it"
          )
      plan = read_plan(self.plan_file)
    else:
      plan = self.plan(self.asked())
    result = simulate(
      plan,
      requests=self.requests,
      concurrency=self.concurrency,
      prompt=self.prompt,
      answer=self.answer,
      failures=[_failure(text) for text in self.fail],
      failures_per_hour=self.failures_per_hour,
      repair_s=self.repair,
      retry=self.retry,
      within_plan=True,
      seed=self.seed,
    )
    if self.json:
      print(json.dumps(dataclasses.asdict(result), ensure_ascii=False, indent=1))
      return 0
    _show(Console(markup=False), result)
    return 0


def _failure(text: str) -> "Failure":
  from neurojax.plan.simulate import Failure

  host, _, at_s = text.rpartition("@")
  try:
    return Failure(host=host, at_s=float(at_s))
  except ValueError as error:
    raise ValueError(f"--fail {text}: write HOST@SECONDS, for example gpu-1@10") from error


def _show(console: Console, result: "Result") -> None:
  console.print(f"{result.summary()}.")
  table = _table("seconds", "median", "95%", "99%", "longest")
  for name, spread in (
    ("until the first token", result.first_token_s),
    ("between two tokens", result.token_s),
    ("for a whole answer", result.request_s),
  ):
    table.add_row(name, *_cells(spread))
  console.print(table)
  for title, uses in (("stages", result.stages), ("links", result.links)):
    console.print(_uses(title, uses))
  if result.failures:
    console.print(
      f"{result.failures} failures ended {result.restarts} attempts, {result.lost_tokens} computed "
      f"positions were lost, and {result.failed} requests got no answer."
    )


def _table(title: str, *columns: str) -> Table:
  table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
  table.add_column("")
  for name in columns:
    table.add_column(name, justify="right")
  return table


def _cells(spread: "Spread") -> list[str]:
  values = (spread.p50_s, spread.p95_s, spread.p99_s, spread.max_s)
  return ["-" if value is None else f"{value:.4g}" for value in values]


def _uses(title: str, uses: "tuple[Use, ...]") -> Table:
  busiest = sorted(uses, key=lambda use: -use.busy)[:MOST_ROWS]
  shown = (
    f"{title}, the busiest {len(busiest)} of {len(uses)}" if len(busiest) < len(uses) else title
  )
  table = _table(shown, "busy", "tokens")
  for use in busiest:
    table.add_row(use.name, f"{use.busy:.1%}", str(use.tokens))
  return table
