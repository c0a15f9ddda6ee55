"""`neurojax demo`: a real model across two stage servers, checked against one process."""

import asyncio
import contextlib
import dataclasses
import os
import sys
import time
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from neurojax.cli.console import importing_jax, stderr
from neurojax.cli.options import (
  EngineOptions,
  ModelOptions,
  SamplingOptions,
  open_engine,
  open_tokenizer,
)
from neurojax.files import find
from neurojax.forms import Weights

if TYPE_CHECKING:
  from neurojax.engine.api import Engine, Request, StageReport, Token
  from neurojax.files.model_file import ModelFile
  from neurojax.tokenizer.tokenizer import Tokenizer


DEFAULT_MODEL = "neurollm"
QUESTION = "What is the capital of France, and what is it known for?"
PROMPT = "The old house stood at the end of the road, and"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo(ModelOptions, SamplingOptions):
  """Run a model on stage servers on this machine, and compare its tokens with those of one process.

  A model with a chat template answers a question; another model continues a text. Then this process
  alone computes the same request, and the tokens are compared.

  Example: neurojax demo --prompt "It was late in the evening when" --stages 3
  """

  model: Annotated[str, tyro.conf.arg(metavar="MODEL")] = DEFAULT_MODEL
  """A model, as for `neurojax generate`; "neurollm" is the one in this package."""
  question: str | None = None
  """The question for a model with a chat template. Without it, a question about a capital."""
  prompt: str | None = None
  """Continue this text, whatever the model. Without it, the start of a story."""
  temperature: float | None = None
  """0 is greedy. Without it, 0 for an answer and 0.7 for a continued text."""
  weights: Weights | Literal["auto"] = "auto"
  """Form of the matrices; "auto" is the form that the file is made for."""
  stages: Annotated[int, tyro.conf.arg(metavar="N")] = 2
  """Number of stage servers."""
  max_tokens: Annotated[int, tyro.conf.arg(metavar="N")] = 96
  """Longest answer, in tokens."""

  def run(self) -> int:
    if self.stages < 2:
      raise ValueError(
        f"--stages {self.stages}: the demo compares stages with one process: at least 2"
      )
    if self.question is not None and self.prompt is not None:
      raise ValueError("--question is answered and --prompt continued: give one of them")
    if self.max_tokens < 1:
      raise ValueError(f"--max-tokens {self.max_tokens}: at least 1")
    dataclasses.replace(self, temperature=self.temperature or 0.0).sampling()
    return asyncio.run(self._demo(time.perf_counter() - _age_s()))

  async def _demo(self, began_s: float) -> int:
    with importing_jax():
      from neurojax.engine.api import Request

    out = Console(highlight=False, soft_wrap=True)
    with self.open() as file:
      tokenizer = open_tokenizer(file)
      prompt, lead, temperature = self._prompt(tokenizer)
      temperature = temperature if self.temperature is None else self.temperature
      request = Request(
        prompt=prompt,
        max_tokens=self.max_tokens,
        sampling=dataclasses.replace(self, temperature=temperature).sampling(),
        stop_ids=tokenizer.stop_ids,
      )
      out.print(
        f"[bold]{find.model_path(self.model).name}[/], {file.config.num_layers} layers, on {self.stages} stage servers\n"
      )
      options = EngineOptions(stages=self.stages, weights=self.weights)
      async with open_engine(file, options) as engine:
        out.print(lead, end="")
        tokens, times_s = await self._stream(engine, file, request)
        ready_s = times_s[0] - began_s
        out.print("\n")
        out.print(_table(await engine.reports(), getattr(engine, "return_s", None)))
      decode_s = times_s[-1] - times_s[0]
      rate = f"{(len(tokens) - 1) / decode_s:.1f}" if decode_s > 0 else "-"
      out.print(
        f"first token {ready_s:.1f} s after the command, "
        f"{times_s[0] - times_s.began_s:.2f} s after the request; "
        f"{rate} tokens/s after it, {len(tokens)} tokens\n"
      )
      with stderr.status("computing the same request in this process alone"):
        async with open_engine(file, EngineOptions(weights=self.weights)) as alone:
          single = [token async for token in alone.generate(request)]
    return self._verdict(out, tokens, single)

  def _prompt(self, tokenizer: "Tokenizer") -> tuple[list[int], str, float]:
    """The ids to go on from, what is shown in front of the answer, and the temperature that suits."""
    if self.prompt is None and (self.question is not None or tokenizer.spec.chat_template):
      from neurojax.tokenizer.chat.prompt import encode_chat

      question = QUESTION if self.question is None else self.question
      lead = f"[bold cyan]user[/]       {escape(question)}\n[bold cyan]assistant[/]  "
      return encode_chat(tokenizer, [{"role": "user", "content": question}]), lead, 0.0
    prompt = PROMPT if self.prompt is None else self.prompt
    # A small model that takes the likeliest token each time soon goes in circles.
    return tokenizer.encode(prompt, add_special=True), f"[bold cyan]{escape(prompt)}[/]", 0.7

  async def _stream(
    self, engine: "Engine", file: "ModelFile", request: "Request"
  ) -> "tuple[list[Token], Times]":
    from neurojax.engine.text import stream_text

    tokens, times_s = [], Times(time.perf_counter())
    async with contextlib.aclosing(stream_text(engine, open_tokenizer(file), request)) as stream:
      async for piece in stream:
        times_s.append(time.perf_counter())
        tokens.append(piece.token)
        sys.stdout.write(piece.text)
        sys.stdout.flush()
    return tokens, times_s

  def _verdict(self, out: Console, tokens: "list[Token]", single: "list[Token]") -> int:
    ids, alone = [token.id for token in tokens], [token.id for token in single]
    apart = max(
      (abs(a.logprob - b.logprob) for a, b in zip(tokens, single, strict=False)), default=0.0
    )
    if ids == alone:
      out.print(
        f"[bold green]same tokens[/]: one process alone gives the same {len(alone)} tokens; "
        f"log-probabilities differ by at most {apart:.1e}"
      )
      return 0
    first = next(
      (i for i, (a, b) in enumerate(zip(ids, alone, strict=False)) if a != b),
      min(len(ids), len(alone)),
    )
    out.print(f"[bold red]different tokens[/]: one process alone differs from token {first} on")
    return 1


class Times(list[float]):
  """When each token came, and when the request was made (`began_s`); seconds of one clock."""

  def __init__(self, began_s: float):
    super().__init__()
    self.began_s = began_s


def _table(reports: "tuple[StageReport, ...]", return_s: float | None) -> Table:
  table = Table(
    title="one decode step, mean",
    title_justify="left",
    box=box.SIMPLE_HEAD,
    pad_edge=False,
    padding=(0, 1, 0, 0),
  )
  for name in ("host", "address", "layers", "weights", "cache/seq", "step", "wire"):
    table.add_column(
      name, justify="left" if name in ("host", "address", "layers") else "right", no_wrap=True
    )
  for report in reports:
    table.add_row(
      report.host,
      report.address,
      f"{report.first_layer}..{report.last_layer}",
      f"{report.weight_bytes / 1e6:.1f} MB",
      f"{report.cache_bytes / 1e6:.1f} MB",
      _ms(report.step_s),
      _ms(report.wire_s),
    )
  if return_s is not None:
    table.add_row("", "coordinator", "", "", "", "", _ms(return_s))
  return table


def _age_s() -> float:
  """Seconds since this process was started, imports of Python and packages included."""
  with open("/proc/self/stat", encoding="ascii", errors="replace") as stat:
    started_ticks = int(stat.read().rpartition(")")[2].split()[19])
  return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")


def _ms(seconds: float | None) -> str:
  return "-" if seconds is None else f"{seconds * 1e3:.2f} ms"
