"""Times fused programs of a named architecture with random ternary weights."""

import concurrent.futures
import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from neurojax.config import ModelConfig
from neurojax.forms import capacity_for
from neurojax.kernels import timing
from neurojax.kernels.decode.bench import random_layers
from neurojax.kernels.gemm import reference as gemm
from neurojax.kernels.gemm.bench import GROUP, dense_s, random_rows
from neurojax.stage import fused
from neurojax.stage.fused import Fused
from neurojax.stage.kernels import REFERENCE, Kernels
from neurojax.weights.ternary import Mode, TernaryArray

STEPS = (16, 144)
"""Two lengths of the loop over tokens; the difference of their times is that of steps alone."""

_PREFILL_TOKENS = 4096
"""Tokens of one timed call on a GPU at least, in as many prompts as that takes; one prompt on a CPU."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One line of results.csv. Rates are medians over the runs.

  Attributes:
    length: For decode, positions in the cache before the first timed step; for prefill, tokens of the
      prompt.
    us: Time of one step of all sequences, or of one prompt.
    bf16_us: The time that XLA takes, in the same run, for the matrix products of that step or prompt alone, with
      bfloat16 weights of the same shapes; attention and all else left out.
    speedup: bf16_us / us.
    weight_bytes_per_s: Bytes of weights, read once per step, per second (decode only).
    flops_per_s: FLOP/s of matrix products, attention not counted (prefill only).
    read_fraction, copy_fraction, matmul_fraction: Shares of what the device does at best, see `Rates`.
  """

  what: str
  arch: str
  weights: Mode
  batch: int
  length: int
  tokens_per_s: float
  us: float
  bf16_us: float
  speedup: float
  weight_gib: float
  weight_bytes_per_s: float | None = None
  flops_per_s: float | None = None
  read_fraction: float | None = None
  copy_fraction: float | None = None
  matmul_fraction: float | None = None
  read_bytes_per_s: float
  copy_bytes_per_s: float
  bf16_flops_per_s: float
  kernels: str
  device: str
  jax: str
  jaxlib: str
  date: str

  @property
  def bound_fraction(self) -> float:
    """The least time over the time taken: reading the weights for decode, matrix products for prefill."""
    fraction = self.read_fraction if self.what == "decode" else self.matmul_fraction
    assert fraction is not None
    return fraction


COLUMNS = {
  "what": lambda row: row.what,
  "batch": lambda row: str(row.batch),
  "length": lambda row: str(row.length),
  "tok/s": lambda row: f"{row.tokens_per_s:,.0f}",
  "us": lambda row: f"{row.us:,.0f}",
  "bf16 us": lambda row: f"{row.bf16_us:,.0f}",
  "speedup": lambda row: f"{row.speedup:.2f}x",
  "GB/s": lambda row: _show(row.weight_bytes_per_s, 1e9, ".1f"),
  "of read": lambda row: _show(row.read_fraction, 1, ".0%"),
  "of copy": lambda row: _show(row.copy_fraction, 1, ".0%"),
  "GFLOP/s": lambda row: _show(row.flops_per_s, 1e9, ".0f"),
  "of bf16": lambda row: _show(row.matmul_fraction, 1, ".0%"),
  "bound us": lambda row: f"{row.us * row.bound_fraction:,.0f}",
  "of it": lambda row: f"{row.bound_fraction:.0%}",
  "kernels": lambda row: row.kernels,
}


def run(
  config: ModelConfig,
  *,
  arch: str,
  mode: Mode = "w2a8",
  batches: Sequence[int] = (1,),
  contexts: Sequence[int] = (128,),
  prompts: Sequence[int] = (),
  kernels: Kernels | None = None,
  rates: timing.Rates | None = None,
  steps: tuple[int, int] = STEPS,
  runs: int = 5,
  most_s: float | None = None,
) -> Iterator[Row]:
  """Measure decode for each batch and context, and prefill for each length of a prompt.

  Args:
    arch: The configuration's name, for the rows.
    kernels: None: what suits the device, the mode and the batch.
    rates: None: measured now.
    most_s: Refuse work that the reference kernels would take longer for; None: any is done.
  Raises: ValueError: a number below 1, activations that are not finite, or more work than `most_s`
    allows.
  """
  for name, numbers in (("batch", batches), ("context", contexts), ("prefill", prompts)):
    if any(number < 1 for number in numbers):
      raise ValueError(f"{name} {tuple(numbers)}: positive numbers")
  fused.check(config)
  if most_s is not None:
    _check_work(config, batches, contexts, prompts, steps, runs, most_s)
  rates = rates or timing.rates()
  model = random_model(config, mode)
  common = {
    "arch": arch,
    "weights": mode,
    "weight_gib": model.nbytes / 2**30,
    **dataclasses.asdict(rates),
    **timing.origin(),
  }
  loops = _compile_loops(model, batches, max(contexts, default=0), kernels, steps)
  for batch in batches:
    chosen = kernels or kernels_for(mode, batch)
    bf16_s = products_bf16_s(model, batch, batch, rates, runs)
    for context in contexts:
      step_s = decode_s(model, batch, context, loops[batch], runs)
      bytes_per_s = model.step_nbytes / step_s
      yield Row(
        what="decode",
        batch=batch,
        length=context,
        tokens_per_s=batch / step_s,
        us=step_s * 1e6,
        bf16_us=bf16_s * 1e6,
        speedup=bf16_s / step_s,
        weight_bytes_per_s=bytes_per_s,
        read_fraction=bytes_per_s / rates.read_bytes_per_s,
        copy_fraction=bytes_per_s / rates.copy_bytes_per_s,
        kernels=_name(chosen, batch),
        **common,
      )
  for length in prompts:
    chosen = kernels or kernels_for(mode, length)
    prompt_s = prefill_s(model, length, chosen, runs)
    bf16_s = products_bf16_s(model, length, 1, rates, runs)
    flops_per_s = prefill_flops(model, length) / prompt_s
    yield Row(
      what="prefill",
      batch=1,
      length=length,
      tokens_per_s=length / prompt_s,
      us=prompt_s * 1e6,
      bf16_us=bf16_s * 1e6,
      speedup=bf16_s / prompt_s,
      flops_per_s=flops_per_s,
      matmul_fraction=flops_per_s / rates.bf16_flops_per_s,
      kernels=_name(chosen, length),
      **common,
    )


def defaults() -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, int]]:
  """Contexts, prompts and `steps` that suit the default device: few and short on a CPU."""
  if jax.default_backend() == "gpu":
    return (128, 2048), (512,), STEPS
  return (32,), (64,), (2, 10)


def _check_work(
  config: ModelConfig,
  batches: Sequence[int],
  contexts: Sequence[int],
  prompts: Sequence[int],
  steps: tuple[int, int],
  runs: int,
  most_s: float,
) -> None:
  """Refuse what the reference kernels would take more than `most_s` for, by a small product's time."""
  side = 1024
  w = TernaryArray(
    *random_rows(jax.random.key(0, impl="rbg"), 1, side, side), (side, side), 1, GROUP
  )
  w = jax.tree.map(lambda leaf: leaf[0], w)

  def rows_s(m: int) -> float:
    """Seconds of m rows times one weight."""
    return timing.seconds(jax.jit(gemm.matmul), jnp.ones((m, side)), w, runs=3) / side**2

  c, s = config, fused.shape_of(config)
  per_layer = s.d * (2 * s.n + 2 * s.k) * s.h + 3 * s.d * s.f
  weights = c.num_layers * per_layer + c.vocab_size * c.model_dim
  tokens = (runs + 1) * sum(steps) * len(contexts)
  work_s = sum(tokens * weights * rows_s(batch) for batch in batches)
  work_s += sum((runs + 1) * weights * rows_s(length) for length in prompts)
  if work_s > most_s:
    raise ValueError(
      f"{weights / 1e9:.1f} billion weights would take {timing.device_name()} about {max(1, round(work_s / 60))}"
      " minutes with the reference kernels: name a smaller --arch (neurollm-10m), fewer --batch,"
      " --context and --prefill, or --repetitions 1"
    )


def headline(row: Row) -> str:
  """The weights of a row, the device, and what it does at best."""
  weights = f"{row.arch} {row.weights}, {row.weight_gib:.2f} GiB of weights; "
  return weights + timing.headline(row)


def report(rows: Sequence[Row]) -> str:
  """A table, under the device and what it does at best."""
  lines = [timing.line(row, COLUMNS) for row in rows]
  return "\n".join([headline(rows[0]), timing.titles(COLUMNS), *lines])


def kernels_for(mode: Mode, rows: int) -> Kernels:
  """Choose the kernels that suit the default device."""
  device = jax.devices()[0]
  if device.platform != "gpu":
    return REFERENCE
  programs = device.core_count if mode == "w2a8" and rows == 1 else 0
  return Kernels(programs=programs, device=device.device_kind)


Loops = dict[int, Any]
"""Compiled loops over tokens, by their number of steps."""


def _compile_loops(
  model: Fused,
  batches: Sequence[int],
  longest: int,
  kernels: Kernels | None,
  steps: tuple[int, int],
) -> dict[int, Loops]:
  """Compile, all at once, loops of `steps` tokens after at most `longest` positions for each batch."""
  capacity = capacity_for(longest + max(steps))
  jobs = {}
  for batch in batches:
    chosen = kernels or kernels_for(model.layers.qkv.mode, batch)
    cache = jax.eval_shape(lambda batch=batch: model.new_cache(batch=batch, capacity=capacity))
    ids = jax.ShapeDtypeStruct((batch,), jnp.int32)
    for count in steps:
      loop = functools.partial(fused.generate, steps=count, kernels=chosen)
      # The cache is given back to it: it is written in place.
      program = jax.jit(lambda *args, loop=loop: loop(*args), donate_argnums=(2, 3))
      jobs[batch, count] = program.lower(model, ids, *cache, ids)
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    compiled = dict(zip(jobs, pool.map(lambda job: job.compile(), jobs.values()), strict=True))
  return {batch: {count: compiled[batch, count] for count in steps} for batch in batches}


def decode_s(model: Fused, batch: int, context: int, loops: Loops, runs: int = 5) -> float:
  """Time one step of `batch` sequences after `context` positions each, in seconds.

  The loop over tokens runs on the device and takes the likeliest token. Keys and values so far are
  random.

  Args:
    loops: Two loops; the difference of their times is that of steps alone.
  Raises: ValueError: activations are not finite, or times make no sense.
  """
  few, many = sorted(loops)
  shape = loops[few].in_avals[0][2].shape
  cache = [_random_cache(shape, seed) for seed in range(2)]
  tokens_B = jnp.arange(batch, dtype=jnp.int32)
  position_B = jnp.full(batch, context, jnp.int32)

  def timed(count: int) -> float:
    nonlocal cache
    began = time.perf_counter()
    tokens, *cache = loops[count](model, tokens_B, *cache, position_B)
    jax.block_until_ready(tokens)
    return time.perf_counter() - began

  for count in (few, many):
    timed(count)
  step_s = statistics.median((timed(many) - timed(few)) / (many - few) for _ in range(runs))
  _check_finite(cache[1][-1, :, :, context + many - 1])
  if step_s <= 0:
    raise ValueError(f"{many} steps took no longer than {few}: the machine is too busy to measure")
  return step_s


def prefill_s(model: Fused, length: int, kernels: Kernels, runs: int = 5) -> float:
  """Time a prompt of `length` tokens, from ids to the logits that follow it, in seconds.

  Raises: ValueError: activations are not finite.
  """
  count = -(-_PREFILL_TOKENS // length) if jax.default_backend() == "gpu" else 1
  vocab = model.embedding.shape[0]
  dtype = jnp.float32 if kernels.attention == "reference" else jnp.bfloat16

  def prompts(model: Fused, tokens_BT: Array, keys: Array, values: Array) -> tuple[Array, ...]:
    def prompt(_: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
      tokens_BT, keys, values, _ = carry
      x_BTD, keys, values = fused.prefill(
        model, fused.embed(model, tokens_BT), keys, values, kernels=kernels, dtype=dtype
      )
      logits_BV = fused.logits(model, x_BTD[:, -1], kernels=kernels)
      # The next prompt depends on this one's answer, or XLA could run only one of them.
      shift = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
      return (tokens_BT + shift[:, None]) % vocab, keys, values, logits_BV

    start = (tokens_BT, keys, values, jnp.zeros((1, vocab), jnp.float32))
    return lax.fori_loop(0, count, prompt, start)[1:]

  cache = model.new_cache(batch=1, capacity=capacity_for(length))
  tokens_BT = jax.random.randint(jax.random.key(0), (1, length), 0, vocab)
  run = jax.jit(prompts, donate_argnums=(2, 3))
  times = []
  for _ in range(runs + 1):
    began = time.perf_counter()
    *cache, logits_BV = run(model, tokens_BT, *cache)
    jax.block_until_ready(logits_BV)
    times.append(time.perf_counter() - began)
  _check_finite(logits_BV)
  return statistics.median(times[1:]) / count


def prefill_flops(model: Fused, length: int) -> int:
  """FLOPs of the matrix products of a prompt: every layer for each token, the head for the last one."""
  per_token = sum(n * k for n, k in _layer_shapes(model)) * model.layers.num_layers
  return 2 * (length * per_token + model.head.contraction.n * model.head.contraction.k)


def products_bf16_s(
  model: Fused, rows: int, head_rows: int, rates: timing.Rates, runs: int = 5
) -> float:
  """Time a model's matrix products by XLA with bfloat16 weights of the same shapes: `rows` rows
  through every layer, `head_rows` through the head."""
  layer_s = sum(dense_s(rows, n, k, rates, runs) for n, k in _layer_shapes(model))
  head = model.head.contraction
  return layer_s * model.layers.num_layers + dense_s(head_rows, head.n, head.k, rates, runs)


def _layer_shapes(model: Fused) -> list[tuple[int, int]]:
  layers = model.layers
  matrices = (layers.qkv, layers.o, layers.gate_up, layers.down)
  return [(w.contraction.n, w.contraction.k) for w in matrices]


def random_model(config: ModelConfig, mode: Mode, *, seed: int = 0) -> Fused:
  """Make a model of `random_rows`, embedding and head included, on the device.

  Raises: ValueError: a contracted width that is no multiple of the group of 128, or what `fused.check` refuses.
  """
  fused.check(config)
  c, shape = config, fused.shape_of(config)
  *of_layers, of_embedding, of_head = jax.random.split(jax.random.key(seed, impl="rbg"), 6)

  def table(key: Array) -> TernaryArray:
    rows = (rows[0] for rows in random_rows(key, 1, c.vocab_size, shape.d))
    return TernaryArray(*rows, (c.vocab_size, shape.d), -1, GROUP, mode)

  weights = random_layers(shape, c.num_layers, mode, jnp.stack(of_layers), qk_norm=bool(c.qk_norm))
  embedding = table(of_embedding)
  return Fused(
    layers=weights,
    embedding=embedding,
    final_norm=jnp.ones(shape.d, jnp.float32),
    head=embedding if c.tied_embedding else table(of_head),
    rope_base=c.rope_base,
  )


def _random_cache(shape: tuple[int, ...], seed: int) -> Array:
  fill = jax.jit(
    lambda key: lax.map(
      lambda key: jax.random.normal(key, shape[1:], jnp.bfloat16), jax.random.split(key, shape[0])
    )
  )
  return fill(jax.random.key(seed, impl="rbg"))


def _check_finite(x: Array) -> None:
  if not jnp.isfinite(x).all():
    raise ValueError("activations are not finite: a time of such numbers means nothing")


def _name(kernels: Kernels, rows: int) -> str:
  if kernels.programs and rows == 1:
    return f"one kernel, {kernels.programs} programs"
  loop = "unrolled" if kernels.unroll else "loop"
  return f"{kernels.product}, {kernels.attention} attention, {loop}"


def _show(value: float | None, unit: float, spec: str) -> str:
  return "-" if value is None else format(value / unit, spec)
