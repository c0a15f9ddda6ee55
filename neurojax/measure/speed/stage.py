"""How fast a model of a named architecture runs, fused, with random ternary weights."""

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
from neurojax.kernels.decode.weights import LayerWeights
from neurojax.kernels.gemm.bench import GROUP, dense_s, random_rows
from neurojax.stage import fused
from neurojax.stage.fused import REFERENCE, Fused, Kernels
from neurojax.weights.ternary import Mode, TernaryArray

STEPS = (16, 144)
"""Two lengths of the loop over tokens; the difference of their times is of the steps alone."""

_PREFILL_TOKENS = 4096
"""Of one call at least, in as many prompts as that takes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One line of results.csv. Rates are medians over the runs.

  Attributes:
    length: decode: positions in the cache before the first timed step; prefill: of the prompt.
    us: decode: one step of all sequences; prefill: one prompt.
    bf16_us: What XLA takes, in the same run, for the matrix products of that step or prompt alone, with
      bfloat16 weights of the same shapes; attention and all else left out.
    speedup: bf16_us / us.
    weight_bytes_per_s: Weights, read once per step, per second (decode only).
    flops_per_s: Of matrix products, attention not counted (prefill only).
    read_fraction, copy_fraction, matmul_fraction: Of what the device does at best, see `Rates`.
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
) -> Iterator[Row]:
  """Measure decode for each batch and context, and prefill for each length of a prompt.

  Args:
    arch: The configuration's name, for the rows.
    kernels: None: what suits the device, the mode and the batch.
    rates: None: measured now.
  Raises: ValueError: a number below 1, or activations that are not finite.
  """
  for name, numbers in (("batch", batches), ("context", contexts), ("prefill", prompts)):
    if any(number < 1 for number in numbers):
      raise ValueError(f"{name} {tuple(numbers)}: positive numbers")
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


def describe(rows: Sequence[Row]) -> str:
  """A table, under what it was measured on."""
  row = rows[0]
  return (
    f"{row.arch} {row.weights}, {row.weight_gib:.2f} GiB of weights; {row.device}, jax {row.jax},"
    f" jaxlib {row.jaxlib}, {row.date}\nat best: read {row.read_bytes_per_s / 1e9:.1f} GB/s, copy"
    f" {row.copy_bytes_per_s / 1e9:.1f} GB/s, bf16 product {row.bf16_flops_per_s / 1e9:.0f}"
    f" GFLOP/s\n{timing.table(rows, COLUMNS)}"
  )


def kernels_for(mode: Mode, rows: int) -> Kernels:
  """What suits the default device."""
  device = jax.devices()[0]
  if device.platform != "gpu":
    return REFERENCE
  programs = device.core_count if mode == "w2a8" and rows == 1 else 0
  return Kernels(programs=programs, device=device.device_kind)


Loops = dict[int, Any]
"""By its number of steps, a compiled loop over tokens."""


def _compile_loops(
  model: Fused,
  batches: Sequence[int],
  longest: int,
  kernels: Kernels | None,
  steps: tuple[int, int],
) -> dict[int, Loops]:
  """For each batch, loops of `steps` tokens after at most `longest` positions, compiled at once."""
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
  """Seconds of one step of `batch` sequences after `context` positions each.

  The loop over tokens runs on the device and takes the likeliest token. Keys and values so far are
  random.

  Args:
    loops: Two; the difference of their times is of the steps alone.
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
  """Seconds of a prompt of `length` tokens, from ids to the logits that follow it.

  Raises: ValueError: activations are not finite.
  """
  count = -(-_PREFILL_TOKENS // length)
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
  """Of the matrix products of a prompt: every layer for each token, the head for the last one."""
  per_token = sum(n * k for n, k in _layer_shapes(model)) * model.layers.num_layers
  return 2 * (length * per_token + model.head.contraction.n * model.head.contraction.k)


def products_bf16_s(
  model: Fused, rows: int, head_rows: int, rates: timing.Rates, runs: int = 5
) -> float:
  """Seconds of a model's matrix products by XLA with bfloat16 weights of the same shapes: `rows` rows
  through every layer, `head_rows` through the head."""
  layer_s = sum(dense_s(rows, n, k, rates, runs) for n, k in _layer_shapes(model))
  head = model.head.contraction
  return layer_s * model.layers.num_layers + dense_s(head_rows, head.n, head.k, rates, runs)


def _layer_shapes(model: Fused) -> list[tuple[int, int]]:
  layers = model.layers
  matrices = (layers.qkv, layers.o, layers.gate_up, layers.down)
  return [(w.contraction.n, w.contraction.k) for w in matrices]


def random_model(config: ModelConfig, mode: Mode, *, seed: int = 0) -> Fused:
  """A model of `random_rows`, embedding and head included, made on the device.

  Raises: ValueError: a contracted width that is no multiple of the group of 128, or what `fused.check` refuses.
  """
  fused.check(config)
  c, s, layers = config, fused.shape_of(config), config.num_layers
  keys = iter(jax.random.split(jax.random.key(seed, impl="rbg"), 6))

  def matrix(n: int, k: int) -> TernaryArray:
    return TernaryArray(*random_rows(next(keys), layers, n, k), (k, n), 1, GROUP, mode)

  def table() -> TernaryArray:
    rows = (rows[0] for rows in random_rows(next(keys), 1, c.vocab_size, s.d))
    return TernaryArray(*rows, (c.vocab_size, s.d), -1, GROUP, mode)

  def ones(*shape: int) -> Array:
    return jnp.ones(shape, jnp.float32)

  weights = LayerWeights(
    qkv=matrix((s.n + 2 * s.k) * s.h, s.d),
    o=matrix(s.d, s.n * s.h),
    gate_up=matrix(2 * s.f, s.d),
    down=matrix(s.d, s.f),
    attn_norm=ones(layers, s.d),
    ffn_norm=ones(layers, s.d),
    q_norm=ones(layers, s.h) if c.qk_norm else None,
    k_norm=ones(layers, s.h) if c.qk_norm else None,
    shape=s,
  )
  embedding = table()
  return Fused(
    layers=weights,
    embedding=embedding,
    final_norm=ones(s.d),
    head=embedding if c.tied_embedding else table(),
    rope_base=c.rope_base,
  )


def abstract_model(config: ModelConfig, mode: Mode, *, num_layers: int) -> Fused:
  """Shapes in place of arrays, of the first layers."""
  config = dataclasses.replace(config, num_layers=num_layers)
  return jax.eval_shape(lambda: random_model(config, mode))


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
