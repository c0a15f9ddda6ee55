"""`neurojax bench decode` and `neurojax bench int8`."""

import asyncio
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from tyro.conf import subcommand

from neurojax.cli.options import EngineOptions, ModelOptions, open_engine, stderr


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode(ModelOptions, EngineOptions):
  """Decode and prefill speed, beside the bound that memory sets and llama.cpp on the same file.

  Each repetition runs ours, then llama-bench, so that both meet the same machine. llama-bench is
  taken from --llama-bench or the PATH; without one its columns stay empty.

  Example: neurojax bench decode --model smollm2 --weights int8 --llama-bench build/bin/llama-bench
  """

  prefill: Annotated[int, tyro.conf.arg(metavar="TOKENS")] = 512
  decode: Annotated[int, tyro.conf.arg(metavar="TOKENS")] = 64
  repetitions: Annotated[int, tyro.conf.arg(metavar="N")] = 5
  llama_bench: Annotated[str | None, tyro.conf.arg(metavar="PROGRAM")] = None
  out: Annotated[Path | None, tyro.conf.arg(metavar="CSV")] = None
  """Append the rows to this file; made with a header if it is not there."""
  json: bool = False
  """Print one JSON object."""

  def run(self) -> int:
    return asyncio.run(self._bench())

  async def _bench(self) -> int:
    from neurojax.engine import bench

    for name in ("prefill", "decode", "repetitions"):
      if getattr(self, name) < 1:
        raise ValueError(f"--{name} {getattr(self, name)}: at least 1")
    program = self.llama_bench or shutil.which("llama-bench")
    if self.llama_bench and not shutil.which(self.llama_bench):
      raise FileNotFoundError(f"--llama-bench {self.llama_bench}: no such program")
    with self.open() as file:
      options = dataclasses.replace(
        self, context=self.context or max(self.prefill, self.decode) + 2
      )
      async with open_engine(file, options) as engine:
        work = bench.decode_and_prefill(
          engine,
          model=file.path,
          weights=f"{self.weights} {self.dtype}" if self.weights == "dense" else self.weights,
          stages=len(await engine.reports()),
          prefill=self.prefill,
          decode=self.decode,
          repetitions=self.repetitions,
          llama_bench=program,
        )
        with stderr.status("measuring"):
          rows = await work
    if self.out:
      bench.append_csv(self.out, rows)
    if self.json:
      print(json.dumps({"rows": [dataclasses.asdict(row) for row in rows]}))
      return 0
    title = f"{rows[0].device}, jax {rows[0].jax}, {rows[0].date}; GB/s are of weights and cache"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("what")
    for name in ("tok/s", "min", "max", "llama.cpp", "ratio", "GB/s", "bound", "of it"):
      table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
      table.add_row(
        f"{row.what} {row.length}",
        f"{row.tokens_per_s:.1f}",
        f"{row.slowest:.1f}",
        f"{row.fastest:.1f}",
        "-" if row.llama_tokens_per_s is None else f"{row.llama_tokens_per_s:.1f}",
        "-" if row.ratio is None else f"{row.ratio:.2f}x",
        "-" if row.bytes_per_s is None else f"{row.bytes_per_s / 1e9:.1f}",
        "-" if row.bound_bytes_per_s is None else f"{row.bound_bytes_per_s / 1e9:.1f}",
        "-" if row.bound_fraction is None else f"{row.bound_fraction:.0%}",
      )
    Console().print(table)
    return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8:
  """The int8 matrix product beside float32, on the shapes of SmolLM2-135M.

  Example: neurojax bench int8 --rows 1 16 128
  """

  rows: tuple[int, ...] = (1, 4, 16, 32, 128)
  """Activation rows: 1 is decode, many are prefill."""
  turns: Annotated[int, tyro.conf.arg(metavar="N")] = 20

  def run(self) -> int:
    from neurojax.quant import bench

    if not self.rows or min(self.rows) < 1 or self.turns < 1:
      raise ValueError(
        f"--rows {self.rows}, --turns {self.turns}: positive numbers, at least one row count"
      )
    bench.run(self.rows, self.turns)
    return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
  """Measure speed, beside a baseline and a bound from the same run."""

  what: Annotated[Decode, subcommand("decode")] | Annotated[Int8, subcommand("int8")]

  def run(self) -> int:
    return self.what.run()
