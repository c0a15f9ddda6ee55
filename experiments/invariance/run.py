"""Compare the bits of rows between fused programs of different widths and chunk lengths, and time each.

python -m experiments.invariance.run             (an H100 or H200; results.csv is written anew)
python -m experiments.invariance.run --small     (anywhere, by the reference kernels; nothing is written)
"""

import argparse
import concurrent.futures
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neurojax.config import ModelConfig
from neurojax.kernels import timing
from neurojax.measure.speed.stage import random_model
from neurojax.stage import fused
from neurojax.stage.fused import Fused
from neurojax.stage.kernels import REFERENCE, Kernels

RESULTS = Path(__file__).with_name("results.csv")

Rows = dict[str, np.ndarray]
"""What a program computes for each row: "layers", "keys", "values" and "logits", rows first."""


@dataclasses.dataclass(frozen=True)
class Case:
  """What is compared.

  Attributes:
    variants: Kernels by name; all of a name's programs are compared with its widest.
    widths: Rows of a decode step, ascending.
    lengths: Tokens of a chunk, ascending; the last is the whole prompt, which the others divide.
    every: Of so many positions of a prompt one has logits.
  """

  config: ModelConfig
  variants: dict[str, Kernels]
  widths: tuple[int, ...]
  lengths: tuple[int, ...]
  slots: int
  capacity: int
  every: int
  dtype: Any = jnp.bfloat16
  repeats: int = 20


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of results.csv.

  Attributes:
    rows: Rows of a decode step, or tokens of a chunk.
    part: What is compared: the last layer's output, new keys, new values, or logits.
    equal: Rows that have the very bits that they have in the widest program.
    of: Rows compared.
    difference: The largest difference of the others, as a share of the largest magnitude.
    us: Microseconds of one run of the program.
  """

  variant: str
  what: str
  rows: int
  part: str
  equal: int
  of: int
  difference: float
  us: float
  layers: int
  device: str
  jax: str
  jaxlib: str
  date: str


def full() -> Case:
  """Four layers of an 8B model, by the kernels of the default device."""
  device = jax.devices()[0]
  kernels = Kernels(device=device.device_kind)
  return Case(
    config=dataclasses.replace(ModelConfig.named("bonsai-8b"), num_layers=4),
    variants={
      "fastest": dataclasses.replace(kernels, programs=device.core_count),
      "invariant": dataclasses.replace(kernels, invariant=True),
    },
    widths=(1, 8, 16, 64),
    lengths=(256, 512, 1024, 2048),
    slots=64,
    capacity=2304,
    every=128,
  )


def small() -> Case:
  """Two narrow layers, by the reference kernels."""
  config = ModelConfig(
    vocab_size=256, model_dim=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32,
    ffn_dim=384, rope_style="half", norm_eps=1e-6, qk_norm=True, tied_embedding=False,
  )  # fmt: skip
  return Case(
    config=config,
    variants={"reference": REFERENCE},
    widths=(1, 2, 5),
    lengths=(8, 16),
    slots=6,
    capacity=128,
    every=4,
    dtype=jnp.float32,
    repeats=2,
  )


def decode(case: Case, kernels: Kernels) -> Callable[..., tuple[Any, Any]]:
  """Make a step: (model, tokens, (keys, values), positions, slots) to rows and caches."""

  def step(model: Fused, tokens_B, caches, position_B, slot_B):
    x_BD = fused.embed(model, tokens_B)
    if fused.has_token_kernel(model, len(tokens_B), kernels):
      x_BD, logits_BV, *caches = fused.decode_one(
        model, x_BD, *caches, position_B, slot_B, kernels=kernels, head=True
      )
    else:
      x_BD, *caches = fused.decode_batch(model, x_BD, *caches, position_B, slot_B, kernels=kernels)
      logits_BV = fused.logits(model, x_BD, kernels=kernels)
    # Indices on both sides of a slice come first: [B, L, K, H].
    keys, values = (cache[:, slot_B, :, position_B] for cache in caches)
    rows = {"layers": x_BD, "keys": keys, "values": values, "logits": logits_BV}
    return rows, tuple(caches)

  return step


def prefill(case: Case, kernels: Kernels) -> Callable[..., tuple[Any, Any]]:
  """Make a chunk: (model, tokens, (keys, values), start, slot) to rows and caches."""

  def chunk(model: Fused, tokens_BT, caches, start_B, slot_B):
    x_BTD, *caches = fused.prefill(
      model, fused.embed(model, tokens_BT), *caches, start_B, slot_B,
      kernels=kernels, dtype=case.dtype,
    )  # fmt: skip
    last_BTD = x_BTD[0, case.every - 1 :: case.every]
    at = start_B[0] + jnp.arange(tokens_BT.shape[1])
    keys, values = (cache[:, slot_B[0], :, at] for cache in caches)
    logits = fused.logits(model, last_BTD, kernels=kernels)
    rows = {"layers": x_BTD[0], "keys": keys, "values": values, "logits": logits}
    return rows, tuple(caches)

  return chunk


def programs(case: Case, model: Fused) -> dict[tuple[str, str, int], Any]:
  """Compile every program, all at once: by variant, what it does, and its number of rows."""
  shape = (case.config.num_layers, case.slots, case.config.num_kv_heads, case.capacity)
  cache = jax.ShapeDtypeStruct((*shape, case.config.head_dim), case.dtype)

  def ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)

  jobs = {}
  for name, kernels in case.variants.items():
    for what, make, counts in (
      ("decode", decode, case.widths), ("prefill", prefill, case.lengths)
    ):  # fmt: skip
      program = jax.jit(make(case, kernels), donate_argnums=2)
      for rows in counts:
        tokens, b = (ints(rows), rows) if what == "decode" else (ints(1, rows), 1)
        jobs[name, what, rows] = program.lower(model, tokens, (cache, cache), ints(b), ints(b))
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    return dict(zip(jobs, pool.map(lambda job: job.compile(), jobs.values()), strict=True))


def new_caches(case: Case) -> tuple[jax.Array, jax.Array]:
  """Make keys and values of every slot: normal, and the same in each call."""
  c = case.config
  shape = (c.num_layers, case.slots, c.num_kv_heads, case.capacity, c.head_dim)
  make = jax.jit(lambda key: jax.random.normal(key, shape, case.dtype))
  return tuple(make(jax.random.key(seed, impl="rbg")) for seed in (1, 2))


def decode_rows(case: Case, model: Fused, program: Any, width: int) -> tuple[Rows, float]:
  """Run a step of the first `width` rows, each at a position and in a slot of its own."""
  rng = np.random.default_rng(0)
  most = max(case.widths)
  tokens = rng.integers(0, case.config.vocab_size, most)
  positions = rng.integers(0, case.capacity - 1, most)
  slots = rng.permutation(case.slots)[:most]
  args = [jnp.asarray(a[:width], jnp.int32) for a in (tokens, positions, slots)]
  return _run(case, model, program, args[0], args[1:])


def prefill_rows(case: Case, model: Fused, program: Any, length: int) -> tuple[Rows, float]:
  """Run a whole prompt in chunks of `length`, in a slot of several; seconds are of one chunk."""
  total = max(case.lengths)
  tokens = np.random.default_rng(3).integers(0, case.config.vocab_size, (1, total))
  slot = jnp.full(1, case.slots // 2, jnp.int32)
  caches, parts = new_caches(case), []
  for start in range(0, total, length):
    chunk = jnp.asarray(tokens[:, start : start + length], jnp.int32)
    at = jnp.full(1, start, jnp.int32)
    rows, caches = program(model, chunk, caches, at, slot)
    parts.append(jax.tree.map(np.asarray, rows))
  _, chunk_s = _run(case, model, program, chunk, [at, slot])
  joined = jax.tree.map(lambda *part: np.concatenate(part), *parts)
  return joined, chunk_s


def _run(case: Case, model: Fused, program: Any, tokens: Any, rest: list) -> tuple[Rows, float]:
  rows, caches = program(model, tokens, new_caches(case), *rest)
  times = []
  for _ in range(3):
    began = time.perf_counter()
    for _ in range(case.repeats):
      again, caches = program(model, tokens, caches, *rest)
    jax.block_until_ready(again)
    times.append((time.perf_counter() - began) / case.repeats)
  return jax.tree.map(np.asarray, rows), statistics.median(times)


def compare(rows: Rows, widest: Rows) -> Iterator[tuple[str, int, int, float]]:
  """Yield each part's name, rows with equal bits, rows, and the largest difference."""
  for name, part in rows.items():
    a, b = (r.reshape(len(part), -1).astype(np.float32) for r in (part, widest[name][: len(part)]))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
      raise ValueError(f"{name}: not finite, so that a comparison would mean nothing")
    equal = int((a.view(np.uint32) == b.view(np.uint32)).all(axis=1).sum())
    yield name, equal, len(a), float(np.abs(a - b).max() / np.abs(b).max())


def run(case: Case) -> Iterator[Row]:
  """Compare and time every program."""
  model = random_model(case.config, "w2a8")
  compiled = programs(case, model)
  origin = timing.origin()
  for name in case.variants:
    for what, rows_of, counts in (
      ("decode", decode_rows, case.widths), ("prefill", prefill_rows, case.lengths)
    ):  # fmt: skip
      found = {n: rows_of(case, model, compiled[name, what, n], n) for n in counts}
      widest = found[max(counts)][0]
      for n, (rows, seconds) in found.items():
        for part, equal, of, difference in compare(rows, widest):
          yield Row(
            name, what, n, part, equal, of, difference, seconds * 1e6, case.config.num_layers,
            **origin,
          )  # fmt: skip


def line(row: Row) -> str:
  """One line of the printed table."""
  return (
    f"{row.variant:10} {row.what:8} {row.rows:5} {row.part:7} {row.equal:5} of {row.of:5} equal,"
    f" off by {row.difference:.1e}, {row.us:9.0f} us"
  )


def main(arguments: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--small", action="store_true", help="a small model by the reference kernels")
  is_small = parser.parse_args(arguments).small
  if not is_small and jax.default_backend() != "gpu":
    print("needs a GPU of compute capability 9.0 and the extra cuda13, or --small", file=sys.stderr)
    return 1
  rows = []
  for row in run(small() if is_small else full()):
    print(line(row), flush=True)
    rows.append(row)
  if not is_small:
    RESULTS.unlink(missing_ok=True)
    timing.append_csv(RESULTS, rows)
  return 0


if __name__ == "__main__":
  sys.exit(main())
