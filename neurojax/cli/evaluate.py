"""`neurojax eval golden` and `neurojax eval ppl`."""

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tyro.conf import subcommand

from neurojax.cli.options import EngineOptions, ModelOptions, open_engine, open_tokenizer, stderr
from neurojax.cli.text import read_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Golden(ModelOptions, EngineOptions):
  """Compare greedy answers with known ones, token by token.

  A differing token is excused where the known margin (the log-probability of the token minus that of
  the runner-up) is below 0.02; what follows it in that case is not judged. Exit code 0 only if all agree.

  Example: neurojax eval golden --model smollm2 --golden golden/smollm2.json --stages 3
  """

  golden: Annotated[Path, tyro.conf.arg(metavar="JSON")]
  """Cases with prompt, prompt_tokens, tokens, logprobs and margins."""
  tolerance: float = 0.003
  """Largest difference of a log-probability."""
  json: bool = False
  """Print one JSON object."""

  def run(self) -> int:
    return asyncio.run(self._evaluate())

  async def _evaluate(self) -> int:
    from neurojax.engine.golden import judge, read_golden

    golden = read_golden(self.golden)
    with self.open() as file:
      if golden.sha256 and golden.sha256 != file.sha256():
        raise ValueError(
          f"{self.golden} was made from a file with sha256 {golden.sha256[:12]}..., "
          f"{file.path} has {file.sha256()[:12]}...: take the file it names ({golden.file})"
        )
      tokenizer = open_tokenizer(file)
      async with open_engine(file, self) as engine:
        with Progress(console=stderr, transient=True) as progress:
          cases = progress.track(golden.cases, description="cases")
          verdicts = [
            await judge(engine, tokenizer, case, tolerance=self.tolerance) for case in cases
          ]
    passed = sum(verdict.ok for verdict in verdicts)
    if self.json:
      rows = [dataclasses.asdict(verdict) for verdict in verdicts]
      print(json.dumps({"passed": passed, "cases": rows}, ensure_ascii=False))
    else:
      table = Table()
      for name in (
        "",
        "prompt",
        "tokens equal",
        "first difference (margin)",
        "largest log-prob difference",
        "note",
      ):
        table.add_column(name)
      for verdict in verdicts:
        apart = (
          ""
          if verdict.first_difference is None
          else f"{verdict.first_difference} ({verdict.margin:.5f})"
        )
        table.add_row(
          "[green]ok[/]" if verdict.ok else "[red]no[/]",
          repr(verdict.prompt)[:48],
          f"{verdict.equal}/{verdict.length}",
          apart,
          f"{verdict.logprob_difference:.5f}",
          verdict.note,
        )
      console = Console()
      console.print(table)
      console.print(f"{passed} of {len(verdicts)} cases agree")
    return 0 if passed == len(verdicts) else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity(ModelOptions, EngineOptions):
  """Perplexity of a text.

  Without --stride the method is llama.cpp's: windows of --ctx tokens that do not overlap, the first
  token of each replaced by BOS where the model wants one, the second half of each scored. With
  --stride S windows start every S tokens, and each scores only what no window before it scored.

  Example: neurojax eval ppl --model smollm2 --text wiki.test.raw --ctx 512 --chunks 16
  """

  text: Annotated[Path, tyro.conf.arg(metavar="FILE")]
  """UTF-8 text."""
  ctx: Annotated[int, tyro.conf.arg(metavar="TOKENS")] = 512
  stride: Annotated[int | None, tyro.conf.arg(metavar="TOKENS")] = None
  chunks: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
  """Score only the first N windows."""
  json: bool = False
  """Print one JSON object with perplexity, nll and tokens."""

  def run(self) -> int:
    return asyncio.run(self._evaluate())

  async def _evaluate(self) -> int:
    from neurojax.engine.perplexity import perplexity

    text = read_text(self.text)
    with self.open() as file:
      tokenizer = open_tokenizer(file)
      if self.ctx > file.config.context_length:
        raise ValueError(f"--ctx {self.ctx}: the model was made for {file.config.context_length}")
      options = dataclasses.replace(
        self, context=self.ctx if self.context is None else self.context
      )
      async with open_engine(file, options) as engine:
        with Progress(console=stderr, transient=True) as progress:
          bar = progress.add_task("windows", total=None)

          def advance(done: int, total: int, so_far: float) -> None:
            progress.update(
              bar, completed=done, total=total, description=f"perplexity {so_far:.4f}"
            )

          result = await perplexity(
            engine,
            tokenizer,
            text,
            ctx=self.ctx,
            stride=self.stride,
            chunks=self.chunks,
            progress=advance,
          )
    if self.json:
      print(json.dumps(dataclasses.asdict(result)))
    else:
      print(
        f"perplexity {result.perplexity:.4f} +- {result.stderr:.4f}  "
        f"(nll {result.nll:.5f} over {result.tokens} tokens in {result.windows} windows)"
      )
    return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval:
  """Measure a model against known answers or real text."""

  what: Annotated[Golden, subcommand("golden")] | Annotated[Perplexity, subcommand("ppl")]

  def run(self) -> int:
    return self.what.run()
