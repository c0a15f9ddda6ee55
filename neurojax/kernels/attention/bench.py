"""Times attention for inference, beside the reference as XLA compiles it.

One call on the device is timed: a loop over the layers of a cache that holds far more bytes than the
L2 cache. Each turn's queries depend on the turn before, so that none can be dropped or run at once
with another. Queries, keys and values are standard normal.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from neurojax.forms import PREFILL, capacity_for
from neurojax.kernels import timing
from neurojax.kernels.attention import api
from neurojax.kernels.attention.shapes import QWEN3_8B, SMOLLM2_135M, AttentionShape

_CACHED_BYTES = {"gpu": 1 << 28, "cpu": 1 << 24}
"""Least bytes of keys and values: several times a GPU's L2 cache; few on a CPU, which is slow at this."""

_MOST_LAYERS = 64

_SECONDS = 0.01
"""Least seconds of a call, by an estimate from the device's own rates."""


@dataclasses.dataclass(frozen=True)
class Case:
  """One thing to measure.

  Attributes:
    what: "decode" is one token of each sequence, from the projections on. "chunk" is `rows` queries
      over the cache, their own keys included. "prompt" is causal attention within `rows` tokens.
    batch: Sequences at once.
    length: Keys of each sequence.
    rows: Queries of each sequence.
  """

  what: str
  shape: AttentionShape
  batch: int
  length: int
  rows: int

  @property
  def nbytes(self) -> int:
    """Bytes of keys and values that are read, bfloat16."""
    s = self.shape
    return 2 * 2 * self.batch * self.length * s.num_kv_heads * s.head_dim

  @property
  def flops(self) -> int:
    """Operations of the two products: scores, and sums of values, over the keys that are seen."""
    s = self.shape
    seen = self.rows * (self.length - self.rows) + self.rows * (self.rows + 1) // 2
    return 4 * self.batch * s.num_heads * s.head_dim * seen

  def bound_s(self, rates: timing.Rates) -> float:
    """Seconds at what the device does at best."""
    return max(self.nbytes / rates.read_bytes_per_s, self.flops / rates.bf16_flops_per_s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One line of a results file; times are medians over the runs.

  Attributes:
    length: Keys of each sequence.
    queries: Queries of each sequence.
    bytes_per_s: Bytes of keys and values read per second.
    flops_per_s: Operations of the two products per second.
    bound_us: The least time that memory and matrix units allow.
    bound_fraction: bound_us / us.
    speedup: Time of the reference, compiled by XLA in the same run, over this time.
  """

  what: str
  shape: str
  batch: int
  length: int
  queries: int
  implementation: str
  us: float
  bytes_per_s: float
  flops_per_s: float
  bound_us: float
  bound_fraction: float
  speedup: float
  read_bytes_per_s: float
  copy_bytes_per_s: float
  bf16_flops_per_s: float
  device: str
  jax: str
  jaxlib: str
  date: str


COLUMNS = {
  "           shape": lambda row: row.shape,
  "what": lambda row: row.what,
  "batch": lambda row: str(row.batch),
  "keys": lambda row: str(row.length),
  "queries": lambda row: str(row.queries),
  "       by": lambda row: row.implementation,
  "us": lambda row: f"{row.us:.1f}",
  "GB/s": lambda row: f"{row.bytes_per_s / 1e9:.1f}",
  "GFLOP/s": lambda row: f"{row.flops_per_s / 1e9:.0f}",
  "bound us": lambda row: f"{row.bound_us:.1f}",
  "of it": lambda row: f"{row.bound_fraction:.0%}",
  "speedup": lambda row: f"{row.speedup:.2f}x",
}


def cases(
  shape: AttentionShape | None = None,
  batches: Sequence[int] = (),
  contexts: Sequence[int] = (),
  prompts: Sequence[int] = (),
) -> list[Case]:
  """List what to measure; what is left out is chosen for the default device, small on a CPU.

  Args:
    contexts: Keys of each sequence when a token is decoded; a chunk is measured at the longest.
    prompts: Lengths of whole prompts.
  """
  on_gpu = jax.default_backend() == "gpu"
  shape = shape or (QWEN3_8B if on_gpu else SMOLLM2_135M)
  batches = batches or ((1, 64) if on_gpu else (1,))
  contexts = contexts or ((128, 2048) if on_gpu else (512,))
  prompts = prompts or ((512, 2048) if on_gpu else (256,))
  found = [Case("decode", shape, b, length, 1) for b in batches for length in contexts]
  found.append(Case("chunk", shape, 1, max(contexts), min(PREFILL, max(contexts))))
  return [*found, *(Case("prompt", shape, 1, length, length) for length in prompts)]


def run(
  wanted: Sequence[Case],
  *,
  rates: timing.Rates | None = None,
  runs: int = 5,
  most_s: float | None = None,
  skipped: Callable[[str], None] = print,
) -> Iterator[Row]:
  """Measure every case, the reference first.

  Args:
    rates: None: measured now.
    most_s: Refuse work that takes longer than so many seconds even at the bound; None: any is done.
    skipped: Called with a line about each case that an implementation does not do.
  Raises: ValueError: a number below 1, or more work than `most_s` allows.
  """
  for case in wanted:
    if min(case.batch, case.length, case.rows) < 1:
      raise ValueError(f"batch {case.batch}, keys {case.length}, queries {case.rows}: at least 1")
  rates = rates or timing.rates()
  if most_s is not None:
    work_s = sum((runs + 1) * _turns(c, rates) * c.bound_s(rates) for c in wanted)
    if work_s > most_s:
      raise ValueError(
        f"this would take {work_s / 60:.0f} minutes on {timing.device_name()} at the very least: name"
        " a smaller --shape (smollm2-135m), shorter --context and --prefill, or --repetitions 1"
      )
  for case in wanted:
    reference_s = None
    for implementation in _implementations(case):
      try:
        taken_s = case_s(case, implementation, rates, runs)
      except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        skipped(f"{case.shape.name} {case.what}, {implementation}: {str(error).splitlines()[0]}")
        continue
      reference_s = reference_s or taken_s
      bound_s = case.bound_s(rates)
      yield Row(
        what=case.what,
        shape=case.shape.name,
        batch=case.batch,
        length=case.length,
        queries=case.rows,
        implementation=implementation,
        us=taken_s * 1e6,
        bytes_per_s=case.nbytes / taken_s,
        flops_per_s=case.flops / taken_s,
        bound_us=bound_s * 1e6,
        bound_fraction=bound_s / taken_s,
        speedup=reference_s / taken_s,
        **dataclasses.asdict(rates),
        **timing.origin(),
      )


def _implementations(case: Case) -> tuple[str, ...]:
  if jax.default_backend() != "gpu":
    return ("reference",)
  return ("reference", "cudnn" if case.what == "prompt" else "triton")


def _layers(case: Case) -> int:
  """Layers of a cache that no processor cache holds; a prompt reads no cache."""
  if case.what == "prompt":
    return 1
  wanted = _CACHED_BYTES.get(jax.default_backend(), 1 << 24)
  return max(1, min(_MOST_LAYERS, wanted // case.nbytes))


def _turns(case: Case, rates: timing.Rates) -> int:
  """Turns of a timed call."""
  return max(_layers(case), math.ceil(_SECONDS / case.bound_s(rates)))


def case_s(case: Case, implementation: Any, rates: timing.Rates, runs: int = 5) -> float:
  """Seconds of one layer's attention."""
  s, rows = case.shape, case.rows
  capacity = capacity_for(case.length)
  layers = _layers(case)
  key = jax.random.key(0)
  normal = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
  rotated = api.rotation(jnp.full(case.batch, case.length - 1), s.head_dim, base=1e6, style="half")
  start_B = jnp.full(case.batch, case.length - rows, jnp.int32)

  def attend(x: Array, keys: Array, values: Array, layer: Array) -> tuple[Array, Array, Array]:
    if case.what == "decode":
      return api.decode(
        x, keys, values, layer, start_B, rotation_B2H=rotated, implementation=implementation
      )
    if case.what == "chunk":
      out = api.attend_cache(x, keys, values, layer, start_B, implementation=implementation)
    else:
      out = api.attend(x, keys, values, implementation=implementation)
    return out, keys, values

  if case.what == "prompt":
    cache = (case.batch, case.length, s.num_kv_heads, s.head_dim)
  else:
    cache = s.cache_shape(layers=layers, batch=case.batch, capacity=capacity)
  width = (s.num_heads + 2 * s.num_kv_heads) * s.head_dim
  shape = (case.batch, rows, s.num_heads, s.head_dim)
  x = normal(key, (case.batch, width) if case.what == "decode" else shape)
  turns = _turns(case, rates)

  def loop(x: Array, keys: Array, values: Array) -> Array:
    def body(turn: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
      x, keys, values = carry
      out, keys, values = attend(x, keys, values, turn % layers)
      # Far below a bfloat16's last bit, but XLA cannot know.
      return x + (out.ravel()[0] * 1e-30).astype(x.dtype), keys, values

    return lax.fori_loop(0, turns, body, (x, keys, values))[0]

  caches = [normal(jax.random.key(i), cache) for i in (1, 2)]
  return timing.seconds(jax.jit(loop), x, *caches, runs=runs) / turns


def report(rows: Sequence[Row]) -> str:
  """A table, under the device and what it does at best."""
  lines = [timing.line(row, COLUMNS) for row in rows]
  return "\n".join([timing.headline(rows[0]), timing.titles(COLUMNS), *lines])
