"""Measures the speed of an engine, beside what memory allows and what llama.cpp does on the same file."""

import contextlib
import dataclasses
import datetime
import json
import statistics
import subprocess
import time
from pathlib import Path

import jax
import numpy as np

from neurojax.engine.api import Engine, Request
from neurojax.kernels import timing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One measured speed. Speeds are medians over the repetitions unless they say otherwise.

  Attributes:
    what: "decode" or "prefill".
    length: Tokens that were decoded, or of the prompt.
    model: Name of the model file.
    weights: The user's choice of weights.
    stages: Number of stages.
    tokens_per_s: Tokens per second.
    slowest: Least tokens per second of any repetition.
    fastest: Most tokens per second of any repetition.
    llama_tokens_per_s: llama.cpp's tokens per second on the same file; None without llama-bench.
    ratio: tokens_per_s over llama_tokens_per_s.
    bytes_per_s: Bytes of weights and cache that each token reads, times tokens_per_s (decode only).
    bound_bytes_per_s: Read bandwidth measured in the same run, by a sum over an array that no CPU cache
      holds (decode only).
    bound_fraction: bytes_per_s over bound_bytes_per_s.
    device: Name of the device.
    cores: CPU cores that this process may use.
    jax: Version of JAX.
    date: Date of the run.
  """

  what: str
  length: int
  model: str
  weights: str
  stages: int
  tokens_per_s: float
  slowest: float
  fastest: float
  llama_tokens_per_s: float | None
  ratio: float | None
  bytes_per_s: float | None
  bound_bytes_per_s: float | None
  bound_fraction: float | None
  device: str
  cores: int
  jax: str
  date: str


async def decode_and_prefill(
  engine: Engine,
  *,
  model: Path,
  weights: str,
  stages: int,
  prefill: int,
  decode: int,
  repetitions: int,
  llama_bench: str | None,
) -> list[Row]:
  """Measure as llama-bench does: a prompt of random tokens, and decode after a prompt of one token.

  Args:
    model: The model file, for llama-bench too.
    weights: Name of the weights in the result.
    stages: Number of stages in the result.
    prefill: Tokens of the prompt.
    decode: Tokens to decode.
    repetitions: Number of measurements of each.
    llama_bench: The llama-bench program to compare with; None compares with nothing.
  Returns: A row for decode and one for prefill.
  Raises: OSError: llama-bench fails.
  """
  rng = np.random.default_rng(0)
  prompt = rng.integers(0, engine.vocab_size, prefill).tolist()
  await _generate(engine, prompt[:1], 4)
  await _generate(engine, prompt, 1)
  ours: dict[str, list[float]] = {"decode": [], "prefill": []}
  theirs: dict[str, list[float]] = {"decode": [], "prefill": []}
  bandwidths = []
  for _ in range(repetitions):
    first_s, _ = await _generate(engine, prompt, 1)
    ours["prefill"].append(prefill / first_s)
    first_s, total_s = await _generate(engine, prompt[:1], decode + 1)
    ours["decode"].append(decode / (total_s - first_s))
    bandwidths.append(timing.read_rate())
    if llama_bench:
      for name, speed in _llama(llama_bench, model, prefill, decode).items():
        theirs[name].append(speed)
  reports = await engine.reports()
  cache_share = decode / 2 / engine.context_length
  token_bytes = sum(r.weight_bytes + r.cache_bytes * cache_share for r in reports)
  bound = statistics.median(bandwidths)
  rows = []
  for what, length in (("decode", decode), ("prefill", prefill)):
    speed = statistics.median(ours[what])
    other = statistics.median(theirs[what]) if theirs[what] else None
    moved = token_bytes * speed if what == "decode" else None
    rows.append(
      Row(
        what=what,
        length=length,
        model=model.name,
        weights=weights,
        stages=stages,
        tokens_per_s=speed,
        slowest=min(ours[what]),
        fastest=max(ours[what]),
        llama_tokens_per_s=other,
        ratio=speed / other if other else None,
        bytes_per_s=moved,
        bound_bytes_per_s=bound if moved else None,
        bound_fraction=moved / bound if moved else None,
        device=timing.device_name(),
        cores=_cores(),
        jax=jax.__version__,
        date=datetime.date.today().isoformat(),
      )
    )
  return rows


def _cores() -> int:
  import os

  return len(os.sched_getaffinity(0))


async def _generate(engine: Engine, prompt: list[int], tokens: int) -> tuple[float, float]:
  """Generate an answer. Returns: Seconds to the first token and to the last."""
  began_s = time.perf_counter()
  first_s = 0.0
  async with contextlib.aclosing(
    engine.generate(Request(prompt=prompt, max_tokens=tokens))
  ) as stream:
    async for token in stream:
      if token.index == 0:
        first_s = time.perf_counter() - began_s
  return first_s, time.perf_counter() - began_s


def _llama(program: str, model: Path, prefill: int, decode: int) -> dict[str, float]:
  command = [
    program,
    "-m",
    str(model),
    "-p",
    str(prefill),
    "-n",
    str(decode),
    "-r",
    "1",
    "-t",
    str(_cores()),
    "-o",
    "json",
  ]
  done = subprocess.run(command, capture_output=True, text=True, timeout=600)
  if done.returncode:
    raise OSError(
      f"{program} failed with exit code {done.returncode}: {done.stderr.strip()[-300:]}"
    )
  speeds = {}
  for test in json.loads(done.stdout):
    speeds["prefill" if test["n_prompt"] else "decode"] = test["avg_ts"]
  return speeds
