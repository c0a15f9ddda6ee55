"""`neurojax bench`: decode, gemm, int8 here, train in its own file."""

import asyncio
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from neurojax.cli.console import stderr
from neurojax.cli.options import EngineOptions, ModelOptions, open_engine
from neurojax.forms import Weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode(EngineOptions):
  """Measure the speed of decode and prefill.

  With --model: the engine, beside the bound that memory sets and llama.cpp on the same file. Each
  repetition runs the engine, then llama-bench, so that both meet the same machine. llama-bench is
  taken from --llama-bench or the PATH; without one its columns stay empty.

  With --arch: the fused programs on random ternary weights, with all tokens on the device, for each
  batch, context and prompt, beside what the device can read and multiply.

  Example: neurojax bench decode --model neurollm --weights w2a8 --repetitions 1
  Example: neurojax bench decode --arch bonsai-8b --random --batch 1 64 --context 128 2048
  """

  model: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
  """A model, as for `neurojax generate`."""
  tokenizer: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
  """The tokenizer, for formats that keep it apart (llama2.c)."""
  arch: Annotated[str | None, tyro.conf.arg(metavar="NAME|TOML")] = None
  """An architecture instead of a model: bonsai-8b, for example, or a TOML file."""
  random: bool = False
  """Make random ternary weights, which --arch needs."""
  weights: Weights | None = None
  """As for `neurojax generate`. Without it, "dense" for a file and "w2a8" for an architecture."""
  batch: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = (1,)
  """Sequences at once, with --arch."""
  context: Annotated[tuple[int, ...], tyro.conf.arg(metavar="TOKENS ...")] = ()
  """With --model one number, positions for prompt and answer. With --arch, positions before the
  first timed token; without it, 128 and 2048."""
  prefill: Annotated[tuple[int, ...], tyro.conf.arg(metavar="TOKENS ...")] = (512,)
  """Lengths of the prompt; with --model, one length."""
  decode: Annotated[int, tyro.conf.arg(metavar="TOKENS")] = 64
  """Tokens to generate, with --model."""
  repetitions: Annotated[int, tyro.conf.arg(metavar="N")] = 5
  """Number of times that everything is measured."""
  llama_bench: Annotated[str | None, tyro.conf.arg(metavar="PROGRAM")] = None
  """llama.cpp's program llama-bench."""
  out: Annotated[Path | None, tyro.conf.arg(metavar="CSV")] = None
  """Append the rows to this file; made with a header if it is not there."""
  json: bool = False
  """Print one JSON object."""

  def run(self) -> int:
    if (self.model is None) == (self.arch is None):
      raise ValueError("give either --model FILE or --arch NAME --random")
    if self.repetitions < 1:
      raise ValueError(f"--repetitions {self.repetitions}: at least 1")
    return asyncio.run(self._bench_file()) if self.arch is None else self._bench_random()

  def _bench_random(self) -> int:
    from neurojax.config import ModelConfig
    from neurojax.kernels import timing
    from neurojax.measure.speed import stage

    weights = self.weights or "w2a8"
    if not self.random:
      raise ValueError(f"--arch {self.arch}: a name has no weights; add --random for random ones")
    if weights not in ("w2a8", "w2a16"):
      raise ValueError(f"--weights {weights}: an architecture's are ternary, 'w2a8' or 'w2a16'")
    assert self.arch is not None
    self._refuse(
      "--arch",
      ("stages", "hosts", "plan", "programs", "dtype", "decode", "llama_bench", "tokenizer"),
    )
    if not (self.batch or self.prefill):
      raise ValueError("nothing to measure: give a --batch or a --prefill")
    if self.out:
      timing.check_csv(self.out, stage.Row)
    rows = []
    with stderr.status("measuring"):
      for row in stage.run(
        ModelConfig.named(self.arch),
        arch=Path(self.arch).stem if self.arch.endswith(".toml") else self.arch,
        mode=weights,
        batches=self.batch,
        contexts=self.context or (128, 2048),
        prompts=self.prefill,
        runs=self.repetitions,
      ):
        rows.append(row)
        if self.out:
          timing.append_csv(self.out, [row])
    if self.json:
      print(json.dumps({"rows": [dataclasses.asdict(row) for row in rows]}))
    else:
      print(stage.describe(rows))
    return 0

  def _refuse(self, source: str, names: tuple[str, ...]) -> None:
    """Raises: ValueError: one of these options, which mean nothing for the source, was given."""
    defaults = {field.name: field.default for field in dataclasses.fields(self)}
    for name in names:
      if getattr(self, name) != defaults[name]:
        raise ValueError(f"--{name.replace('_', '-')} means nothing for {source}: leave it out")

  async def _bench_file(self) -> int:
    from neurojax.api.opening import resolve
    from neurojax.kernels import timing
    from neurojax.measure.speed import engine as engine_speed

    self._refuse("--model", ("random",))
    if self.out:
      timing.check_csv(self.out, engine_speed.Row)
    if len(self.prefill) != 1 or len(self.context) > 1 or self.batch != (1,):
      raise ValueError("--model takes one --prefill, at most one --context and no --batch")
    [prefill] = self.prefill
    for name, value in (("prefill", prefill), ("decode", self.decode)):
      if value < 1:
        raise ValueError(f"--{name} {value}: at least 1")
    program = self.llama_bench or shutil.which("llama-bench")
    if self.llama_bench and not shutil.which(self.llama_bench):
      raise FileNotFoundError(f"--llama-bench {self.llama_bench}: no such program")
    assert self.model is not None
    values = {f.name: getattr(self, f.name) for f in dataclasses.fields(EngineOptions)}
    values["context"] = self.context[0] if self.context else max(prefill, self.decode) + 2
    values["weights"] = self.weights or "auto"
    options = EngineOptions(**values)
    with ModelOptions(model=self.model, tokenizer=self.tokenizer).open() as file:
      chosen = resolve(file, options.serving()).weights
      async with open_engine(file, options) as engine:
        work = engine_speed.decode_and_prefill(
          engine,
          model=file.path,
          weights=f"dense {self.dtype}" if chosen == "dense" else chosen,
          stages=len(await engine.reports()),
          prefill=prefill,
          decode=self.decode,
          repetitions=self.repetitions,
          llama_bench=program,
        )
        with stderr.status("measuring"):
          rows = await work
    if self.out:
      timing.append_csv(self.out, rows)
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
class Gemm:
  """Measure matrix products with ternary weights in each implementation that the device has, beside
  XLA's with bfloat16 weights.

  Example: neurojax bench gemm --shapes 24576x4096 --rows 1 8 64 2048
  """

  shapes: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NxK ...")] = ()
  """Output channels x contracted elements. Without it, the shapes of an 8B model."""
  rows: Annotated[tuple[int, ...], tyro.conf.arg(metavar="M ...")] = (1, 8, 64, 2048)
  """Rows of activations: 1 as in decode, many as in prefill."""
  weights: tuple[Literal["w2a8", "w2a16"], ...] = ("w2a8", "w2a16")
  """Weights to measure."""
  repetitions: Annotated[int, tyro.conf.arg(metavar="N")] = 5
  """Number of times that each product is measured."""
  out: Annotated[Path | None, tyro.conf.arg(metavar="CSV")] = None
  """Append the rows to this file; made with a header if it is not there."""
  tune: bool = False
  """From now on choose on this device what was fastest (kernels/gemm/tuned/), instead of what was
  measured there before."""

  def run(self) -> int:
    import jax

    from neurojax.kernels import timing
    from neurojax.kernels.gemm import bench, tuned

    if self.repetitions < 1:
      raise ValueError(f"--repetitions {self.repetitions}: at least 1")
    if not (self.rows and self.weights):
      raise ValueError("nothing to measure: give --rows and --weights")
    if self.out:
      timing.check_csv(self.out, bench.Row)
    device = jax.devices()[0].device_kind
    if self.tune and jax.default_backend() != "gpu":
      raise ValueError(f"--tune: tables are of GPUs, and this device is {device}")
    shapes = tuple(map(_shape, self.shapes)) or bench.SHAPES
    rows = []
    with stderr.status("measuring"):
      for row in bench.run(
        shapes, self.rows, self.weights, runs=self.repetitions, skipped=stderr.print
      ):
        rows.append(row)
        if self.out:
          timing.append_csv(self.out, [row])
    if rows:
      print(bench.describe(rows))
    if rows and self.tune:
      source = f"neurojax bench gemm --tune, jax {rows[0].jax}, {rows[0].date}"
      path = tuned.path_for(device)
      tuned.write(path, device, source, bench.fastest(rows))
      stderr.print(f"wrote {path}")
    return 0


def _shape(text: str) -> tuple[int, int]:
  n, _, k = text.partition("x")
  if not (n.isdecimal() and k.isdecimal()):
    raise ValueError(f"--shapes {text}: write output channels x contracted elements, 24576x4096")
  return int(n), int(k)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8:
  """Measure the int8 matrix product beside float32, on the shapes of SmolLM2-135M.

  Example: neurojax bench int8 --rows 1 16 128
  """

  rows: tuple[int, ...] = (1, 4, 16, 32, 128)
  """Rows of activations: 1 as in decode, many as in prefill."""
  turns: Annotated[int, tyro.conf.arg(metavar="N")] = 20
  """Number of times that each product is measured."""

  def run(self) -> int:
    from neurojax.measure.speed import int8

    if not self.rows or min(self.rows) < 1 or self.turns < 1:
      raise ValueError(
        f"--rows {self.rows}, --turns {self.turns}: positive numbers, at least one row count"
      )
    int8.run(self.rows, self.turns)
    return 0
