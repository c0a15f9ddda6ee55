"""How fast a training step is: ternary weights beside a bfloat16 twin, and both beside the device."""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from neurojax import count, layout
from neurojax.config import ModelConfig
from neurojax.kernels import timing
from neurojax.train import step
from neurojax.train.config import DataConfig, OptimizerConfig, Quantization, TrainConfig
from neurojax.train.mesh_program import peak_flops_per_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One setting.

  Attributes:
    weights: "none" in bfloat16, the twin; else "ternary", with its group and activations.
    batch: Sequences of one pass; a step has `accumulation` passes.
    step_ms: Median of runs of several steps; slowest_ms and fastest_ms are of runs too.
    overhead: step_ms over that of the twin with the same setting in the same run, less 1.
    flops_per_token: 6 N + attention, by `count`: three times the forward products, N being the
      parameters of matrices, the head among them and the embedding's lookup not; causal attention
      over the keys that a query sees. Computing anew does not count.
    mfu: flops_per_token * tokens_per_s / peak_flops_per_s, the data sheet's.
    matmul_fraction: The same over matmul_flops_per_s, of square matrices in this run.
    memory_gib: Of the compiled step, state included, by XLA's account.
    loss: After the steps timed, on random tokens: it must stay near log(vocab_size).
    flags: XLA_FLAGS.
  """

  arch: str
  parameters: int
  weights: str
  group_size: int | None
  activations: str
  optimizer: str
  batch: int
  seq_len: int
  accumulation: int
  layout: str
  remat: str
  unroll: int
  attention: str
  step_ms: float
  fastest_ms: float
  slowest_ms: float
  tokens_per_s: float
  overhead: float | None
  flops_per_token: int
  mfu: float | None
  matmul_fraction: float
  peak_flops_per_s: float | None
  matmul_flops_per_s: float
  memory_gib: float
  compile_s: float
  loss: float
  flags: str
  device: str
  jax: str
  jaxlib: str
  date: str


COLUMNS: dict[str, Callable[[Row], str]] = {
  "arch": lambda row: row.arch,
  "weights": lambda row: _name(row),
  "optimizer": lambda row: row.optimizer,
  "batch": lambda row: f"{row.accumulation} x {row.batch} x {row.seq_len}",
  "remat": lambda row: row.remat,
  "unroll": lambda row: str(row.unroll),
  "attention": lambda row: row.attention,
  "step ms": lambda row: f"{row.step_ms:,.1f}",
  "tok/s": lambda row: f"{row.tokens_per_s:,.0f}",
  "MFU": lambda row: "-" if row.mfu is None else f"{row.mfu:.1%}",
  "of matmul": lambda row: f"{row.matmul_fraction:.1%}",
  "overhead": lambda row: "-" if row.overhead is None else f"{row.overhead:+.1%}",
  "GiB": lambda row: f"{row.memory_gib:.1f}",
  "compile s": lambda row: f"{row.compile_s:.0f}",
}


def _name(row: Row) -> str:
  if row.weights == "none":
    return "bf16"
  group = "tensor" if row.group_size is None else f"g{row.group_size}"
  return f"ternary {group}" + (" int8" if row.activations == "int8" else "")


def describe(rows: Sequence[Row]) -> str:
  """The table of a run."""
  first = rows[0]
  peak = (
    "" if first.peak_flops_per_s is None else f", data sheet {first.peak_flops_per_s / 1e12:.0f}"
  )
  return (
    f"{timing.table(rows, COLUMNS)}\n{first.device}: {first.matmul_flops_per_s / 1e12:.1f} TFLOP/s"
    f" in a square product{peak}; FLOPs are 6 N + causal attention; jax {first.jax}, {first.date}"
  )


def run(
  model: ModelConfig,
  *,
  arch: str,
  batches: Sequence[int],
  seq_len: int,
  accumulation: int = 1,
  remats: Sequence[str] = ("dots",),
  unrolls: Sequence[int] = (1,),
  recipes: Sequence[Quantization] = (Quantization(), Quantization(weights="ternary")),
  optimizer: str = "adamw",
  attention: str = "auto",
  where: layout.Layout | None = None,
  steps: int = 5,
  runs: int = 3,
  skipped: Callable[[str], None] = print,
) -> Iterator[Row]:
  """A row for each batch, remat, unroll and recipe; what does not fit the device is told to `skipped`.

  The first recipe is the twin that overheads are over.
  """
  rates = timing.rates()
  for batch in batches:
    for remat in remats:
      for unroll in unrolls:
        twin: Row | None = None
        for recipe in recipes:
          config = TrainConfig(
            model=dataclasses.replace(model, context_length=max(model.context_length, seq_len)),
            optimizer=OptimizerConfig(name=optimizer, peak_lr=1e-6),
            data=DataConfig(folder="-", batch_size=batch, seq_len=seq_len),
            quantization=recipe,
            layout=where or layout.Layout(),
            steps=1_000_000,
            accumulation=accumulation,
            remat=remat,
            unroll=unroll,
            attention=attention,
          )
          try:
            row = _measure(config, arch, rates, twin, steps, runs)
          except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
              raise
            skipped(f"batch {batch}, remat {remat}, unroll {unroll}: out of memory, left out")
            break
          twin = twin or row
          yield row


def _measure(
  config: TrainConfig, arch: str, rates: timing.Rates, twin: Row | None, steps: int, runs: int
) -> Row:
  mesh = config.layout.mesh(jax.devices()[: config.layout.devices])
  state = step.init_state(config, mesh)
  tokens = _tokens(config, mesh)
  began = time.perf_counter()
  compiled = step.make_train_step(config, mesh).lower(state, tokens).compile()
  compile_s = time.perf_counter() - began
  memory = compiled.memory_analysis()
  state, metrics = compiled(state, tokens)
  jax.block_until_ready(metrics)
  times = []
  for _ in range(runs):
    began = time.perf_counter()
    for _ in range(steps):
      state, metrics = compiled(state, tokens)
    jax.block_until_ready(metrics)
    times.append((time.perf_counter() - began) / steps)
  step_s = statistics.median(times)
  tokens_per_s = config.tokens_per_step / step_s
  flops = count.flops_per_token(config.model, context=config.data.seq_len, mode="train")
  peak = peak_flops_per_s(config)
  recipe, where = config.quantization, config.layout
  return Row(
    arch=arch,
    parameters=count.parameters(config.model),
    weights=recipe.weights,
    group_size=recipe.group_size,
    activations=recipe.activations,
    optimizer=config.optimizer.name,
    batch=config.data.batch_size,
    seq_len=config.data.seq_len,
    accumulation=config.accumulation,
    layout=f"{where.data}x{where.fsdp}x{where.tensor}",
    remat=config.remat,
    unroll=config.unroll,
    attention=step.attention_kind(config, mesh),
    step_ms=1e3 * step_s,
    fastest_ms=1e3 * min(times),
    slowest_ms=1e3 * max(times),
    tokens_per_s=tokens_per_s,
    overhead=None if twin is None else 1e3 * step_s / twin.step_ms - 1,
    flops_per_token=flops,
    mfu=None if peak is None else flops * tokens_per_s / peak,
    matmul_fraction=flops * tokens_per_s / (rates.bf16_flops_per_s * where.devices),
    peak_flops_per_s=peak,
    matmul_flops_per_s=rates.bf16_flops_per_s,
    memory_gib=(memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30,
    compile_s=compile_s,
    loss=float(metrics["loss"]),
    flags=os.environ.get("XLA_FLAGS", ""),
    **timing.origin(),
  )


def _tokens(config: TrainConfig, mesh: Mesh) -> jax.Array:
  shape = (config.accumulation * config.data.batch_size, config.data.seq_len + 1)
  make = jax.jit(
    lambda key: jax.random.randint(key, shape, 0, config.model.vocab_size, jnp.int32),
    out_shardings=layout.sharding(mesh, "BT"),
  )
  return make(jax.random.key(0))
