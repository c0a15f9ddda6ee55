"""Time the decode program of a stage, a step and its sampler, with random weights of an 8B model.

python -m experiments.gpu_step.run                    (an H100 or H200)
python -m experiments.gpu_step.run --activations xla  (activations rounded by XLA, several kernels each)
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import os
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neurojax.config import ModelConfig
from neurojax.measure.speed.stage import random_model
from neurojax.model.sample import SamplerState
from neurojax.stage.fused import Fused
from neurojax.stage.kernels import Kernels
from neurojax.stage.programs import FusedPrograms
from neurojax.stage.state import StageState
from neurojax.stage.step_programs import LOOP, PLAN, StepPrograms

CAPACITY = 512
CALLS = 12
"""Calls that are timed, of LOOP tokens of each row; the median counts."""


def state_of(programs: FusedPrograms, slots: int, vocab_size: int) -> StageState:
  cache = programs.new_cache(slots=slots, capacity=CAPACITY)
  last_P = jnp.zeros(slots, jnp.int32)
  return StageState(cache, None, SamplerState.new(slots, vocab_size), last_P)


def program(
  model: Fused, rows: int, kernels: Kernels, rounds: int, slots: int, vocab_size: int
) -> Any:
  """Lower the program of `rounds` greedy tokens of each row."""
  programs = FusedPrograms(model, kernels, np.dtype(jnp.bfloat16))
  steps = StepPrograms(programs, is_first=True, is_static=True)
  decode = functools.partial(steps.decode, kind="greedy", top=0, rounds=rounds, masked=False)
  state = jax.eval_shape(lambda: state_of(programs, slots, vocab_size))
  plan = jax.ShapeDtypeStruct((PLAN, rows), jnp.int32)
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), model)
  return jax.jit(decode, donate_argnums=1).lower(shapes, state, plan)


def step_s(compiled: Any, model: Fused, state: StageState, rows: int, at: int) -> Any:
  """Seconds of a step, and the state; rows have `at` tokens in front of them."""
  plan_XR = np.full((PLAN, rows), -1, np.int32)
  plan_XR[0], plan_XR[1], plan_XR[2], plan_XR[3] = np.arange(rows), at, LOOP, 1
  plan_XR[4] = np.arange(rows) + 5
  times = []
  for _ in range(CALLS + 2):
    began = time.perf_counter()
    state, out = compiled(model, state, jnp.asarray(plan_XR))
    np.asarray(out)
    times.append((time.perf_counter() - began) / LOOP)
  return statistics.median(times[2:]), state


def main(arguments: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
  parser.add_argument("--activations", choices=["kernels", "xla"], nargs="+", default=["kernels"])
  parser.add_argument("--unroll", action="store_true", help="write layers one after the other")
  parser.add_argument("--context", type=int, default=128)
  parser.add_argument("--layers", type=int)
  options = parser.parse_args(arguments)
  if jax.default_backend() != "gpu":
    print("needs a GPU of compute capability 9.0 and the extra cuda13", file=sys.stderr)
    return 1
  device = jax.devices()[0]
  config = ModelConfig.named("bonsai-8b")
  if options.layers:
    config = dataclasses.replace(config, num_layers=options.layers)
  model = random_model(config, "w2a8")
  slots = max(options.rows)
  lowered = {}
  for activations in options.activations:
    kernels = Kernels(
      device=device.device_kind, invariant=True, rounds=activations == "kernels",
      unroll=options.unroll,
    )  # fmt: skip
    for rows in options.rows:
      lowered[activations, rows] = program(model, rows, kernels, LOOP, slots, config.vocab_size)
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    compiled = dict(zip(lowered, pool.map(lambda p: p.compile(), lowered.values()), strict=True))
  programs = FusedPrograms(model, Kernels(), np.dtype(jnp.bfloat16))
  state = state_of(programs, slots, config.vocab_size)
  print(f"{device.device_kind}, {config.num_layers} layers, {options.context} tokens in front")
  for (activations, rows), run in compiled.items():
    seconds, state = step_s(run, model, state, rows, options.context)
    print(
      f"activations rounded by {activations:8} {rows:4} rows: {seconds * 1e3:7.3f} ms a step,"
      f" {rows / seconds:9,.0f} tokens/s",
      flush=True,
    )
  return 0


if __name__ == "__main__":
  sys.exit(main())
