"""`neurojax bench`: decode, gemm, attention and int8; train is in its own file."""

import asyncio
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

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

  With --model, the engine runs a file, beside the bound that memory sets and llama.cpp on the same
  file. Each repetition runs the engine, then llama-bench, so that both meet the same machine. llama-bench
  is taken from --llama-bench or the PATH; without one its columns stay empty.

  With --arch, the fused programs run random ternary weights, all tokens on the device, for each
  batch, context and prompt, beside what the device can read and multiply. A CPU runs the reference
  kernels, which are slow: take a small architecture there.

  Example: neurojax bench decode --model neurollm --weights w2a8 --repetitions 1
  Example: neurojax bench decode --arch bonsai-8b --random --batch 1 64 --context 128 2048
  Example: neurojax bench decode --arch neurollm-10m --random
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
  """Form of the matrices. Without it, "dense" for a file and "w2a8" for an architecture."""
  batch: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = (1,)
  """Sequences at once, with --arch."""
  context: Annotated[tuple[int, ...], tyro.conf.arg(metavar="TOKENS ...")] = ()
  """--arch: positions before the first timed token; if absent 128 and 2048, on a CPU 32. --model: one
  number, positions for prompt and answer."""
  prefill: Annotated[tuple[int, ...] | None, tyro.conf.arg(metavar="TOKENS ...")] = None
  """Lengths of a prompt, one for --model; if absent 512, on a CPU with --arch 64."""
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
    contexts, prompts, steps = stage.defaults()
    contexts = self.context or contexts
    prompts = prompts if self.prefill is None else self.prefill
    if not (self.batch or prompts):
      raise ValueError("nothing to measure: give a --batch or a --prefill")
    if self.out:
      timing.check_csv(self.out, stage.Row)
    config = ModelConfig.named(self.arch)
    if not (self.context and self.prefill):
      _say_small(f"contexts {contexts}, prompts {prompts}")
    rows = stage.run(
      config,
      arch=Path(self.arch).stem if self.arch.endswith(".toml") else self.arch,
      mode=weights,
      batches=self.batch,
      contexts=contexts,
      prompts=prompts,
      steps=steps,
      runs=self.repetitions,
      most_s=_patience_s(),
    )
    rows = show(rows, stage.headline, stage.COLUMNS, out=self.out, quiet=self.json)
    if self.json:
      print(json.dumps({"rows": [dataclasses.asdict(row) for row in rows]}))
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
    prompts = (512,) if self.prefill is None else self.prefill
    if len(prompts) != 1 or len(self.context) > 1 or self.batch != (1,):
      raise ValueError("--model takes one --prefill, at most one --context and no --batch")
    [prefill] = prompts
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
    title = (
      f"{rows[0].device}, jax {rows[0].jax}, jaxlib {timing.origin()['jaxlib']}, {rows[0].date};"
      " GB/s are of weights and cache"
    )
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
  """Measure products with ternary weights by each implementation that the device has, beside XLA's
  product with bfloat16 weights.

  Each row is printed as soon as it is measured.

  Example: neurojax bench gemm --shapes 24576x4096 --rows 1 8 64 2048
  """

  shapes: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NxK ...")] = ()
  """Output channels x contracted elements; if absent those of Qwen3-8B, on a CPU two of a 1.1B
  model."""
  rows: Annotated[tuple[int, ...] | None, tyro.conf.arg(metavar="M ...")] = None
  """Activation rows: 1 is decode, many are prefill. If absent 1, 8, 64 and 2048, on a CPU 1 and 8."""
  weights: tuple[Literal["w2a8", "w2a16"], ...] = ("w2a8", "w2a16")
  """How activations meet the ternary weights: rounded to int8, or as they are."""
  repetitions: Annotated[int, tyro.conf.arg(metavar="N")] = 5
  """Timed calls of each product; the median counts."""
  out: Annotated[Path | None, tyro.conf.arg(metavar="CSV")] = None
  """Append the rows to this file; made with a header if it is not there."""
  tune: bool = False
  """Store what was fastest as this device's table (kernels/gemm/tuned/), from which products are
  chosen from now on; what was measured there before is replaced."""

  def run(self) -> int:
    import jax

    from neurojax.kernels import timing
    from neurojax.kernels.gemm import bench, tuned

    if self.repetitions < 1:
      raise ValueError(f"--repetitions {self.repetitions}: at least 1")
    if self.rows == () or not self.weights:
      raise ValueError("nothing to measure: give --rows and --weights")
    if self.out:
      timing.check_csv(self.out, bench.Row)
    device = jax.devices()[0].device_kind
    if self.tune and jax.default_backend() != "gpu":
      raise ValueError(f"--tune: tables are of GPUs, and this device is {device}")
    products, counts = bench.defaults()
    products = tuple(map(_shape, self.shapes)) or products
    counts = self.rows or counts
    if not (self.shapes and self.rows):
      shown = " ".join(f"{n}x{k}" for n, k in products)
      _say_small(f"--shapes {shown} --rows {' '.join(map(str, counts))}")
    rows = bench.run(
      products,
      counts,
      self.weights,
      runs=self.repetitions,
      most_s=_patience_s() if self.shapes or self.rows else None,
      skipped=stderr.print,
    )
    rows = show(rows, timing.headline, bench.COLUMNS, out=self.out)
    if rows and self.tune:
      source = f"neurojax bench gemm --tune, jax {rows[0].jax}, {rows[0].date}"
      path = tuned.path_for(device)
      tuned.write(path, device, source, bench.fastest(rows))
      stderr.print(f"wrote {path}")
    return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
  """Measure attention of one layer: a token over the cache, a chunk of a prompt over it, and a whole prompt,
  beside the same in plain JAX as XLA compiles it.

  Each row is printed as soon as it is measured.

  Example: neurojax bench attention --shape qwen3-8b --batch 1 64 --context 2048
  Example: neurojax bench attention --shape smollm2-135m --context 512 --prefill 256
  """

  shape: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
  """The model whose heads are taken: qwen3-8b, llama3.2-1b, bitnet-2b-4t or smollm2-135m; if absent
  the first, on a CPU the last."""
  batch: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = ()
  """Sequences at once when a token is decoded; if absent 1 and 64, on a CPU 1."""
  context: Annotated[tuple[int, ...], tyro.conf.arg(metavar="TOKENS ...")] = ()
  """Keys of each sequence when a token is decoded; if absent 128 and 2048, on a CPU 512. The chunk
  ends at the longest."""
  prefill: Annotated[tuple[int, ...], tyro.conf.arg(metavar="TOKENS ...")] = ()
  """Lengths of a whole prompt; if absent 512 and 2048, on a CPU 256."""
  repetitions: Annotated[int, tyro.conf.arg(metavar="N")] = 5
  """Timed calls of each case; the median counts."""
  out: Annotated[Path | None, tyro.conf.arg(metavar="CSV")] = None
  """Append the rows to this file; made with a header if it is not there."""

  def run(self) -> int:
    from neurojax.kernels import timing
    from neurojax.kernels.attention import bench
    from neurojax.kernels.attention.shapes import SHAPES

    if self.repetitions < 1:
      raise ValueError(f"--repetitions {self.repetitions}: at least 1")
    known = {shape.name: shape for shape in SHAPES}
    if self.shape is not None and self.shape not in known:
      raise ValueError(f"--shape {self.shape}: one of {', '.join(known)}")
    if self.out:
      timing.check_csv(self.out, bench.Row)
    cases = bench.cases(known.get(self.shape), self.batch, self.context, self.prefill)
    if not (self.shape and self.batch and self.context and self.prefill):
      _say_small(f"the heads of {cases[0].shape.name}, {max(c.length for c in cases)} keys at most")
    most_s = _patience_s() if self.shape or self.batch or self.context or self.prefill else None
    rows = bench.run(cases, runs=self.repetitions, most_s=most_s, skipped=stderr.print)
    show(rows, timing.headline, bench.COLUMNS, out=self.out)
    return 0


PATIENCE_S = 60.0
"""Seconds that a benchmark on a CPU may take by an estimate, else it is refused."""


def _patience_s() -> float | None:
  """Seconds that a benchmark may take before it is refused; None on a GPU."""
  import jax

  return PATIENCE_S if jax.default_backend() == "cpu" else None


def _say_small(what: str) -> None:
  """Say on a CPU that what was left open is small there."""
  import jax

  if jax.default_backend() == "cpu":
    stderr.print(f"on a CPU what is not named is small: {what}")


def show(
  rows: Iterator[Any],
  headline: Callable[[Any], str],
  columns: dict[str, Callable[[Any], str]],
  *,
  out: Path | None = None,
  quiet: bool = False,
) -> list[Any]:
  """Print each row, and append it to a file, as soon as it is there."""
  from neurojax.kernels import timing

  found: list[Any] = []
  status = stderr.status("measuring")
  status.start()
  try:
    for row in rows:
      if out:
        timing.append_csv(out, [row])
      if not quiet:
        # While the status runs, what is printed goes where it is shown.
        status.stop()
        if not found:
          print(f"{headline(row)}\n{timing.titles(columns)}")
        print(timing.line(row, columns), flush=True)
        status.start()
      found.append(row)
  finally:
    status.stop()
  return found


def _shape(text: str) -> tuple[int, int]:
  n, _, k = text.partition("x")
  if not (n.isdecimal() and k.isdecimal()):
    raise ValueError(f"--shapes {text}: write output channels x contracted elements, 24576x4096")
  return int(n), int(k)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8:
  """Measure the int8 matrix product beside float32, on the shapes of SmolLM2-135M, and
  beside the rate at which this machine copies memory, which bounds both.

  Example: neurojax bench int8 --rows 1 16 128
  """

  rows: tuple[int, ...] = (1, 4, 16, 32, 128)
  """Rows of activations: 1 as in decode, many as in prefill."""
  turns: Annotated[int, tyro.conf.arg(metavar="N")] = 20
  """Times that each candidate is run in turn; the fastest counts."""

  def run(self) -> int:
    from neurojax.measure.speed import int8

    if not self.rows or min(self.rows) < 1 or self.turns < 1:
      raise ValueError(
        f"--rows {self.rows}, --turns {self.turns}: positive numbers, at least one row count"
      )
    int8.run(self.rows, self.turns)
    return 0
