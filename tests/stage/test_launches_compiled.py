"""Counts what a step of many rows starts on an H200, on a machine without one."""

import dataclasses
import functools
import re
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurojax.config import ModelConfig
from neurojax.measure.speed.stage import random_model
from neurojax.model.sample import Kind, SamplerState
from neurojax.stage.kernels import Kernels
from neurojax.stage.programs import FusedPrograms
from neurojax.stage.state import StageState
from neurojax.stage.step_programs import LOOP, PLAN, StepPrograms
from tests.kernels import aot

REASON = aot.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

SLOTS, CAPACITY, LAYERS = 64, 2304, 2

_STARTED = ("kCustomKernel", "kCustomCall", "kCopy", "kMemset", "kGemm", "kCuDnn", "kSort")


def operations(sequence: str) -> tuple[list[str], list[str]]:
  """Names of what a program starts: in its one loop, for each round of it, and outside."""
  inside, outside, is_inside = [], [], False
  for line in sequence.splitlines():
    if line.strip() == "body:":
      is_inside = True
    elif not line.startswith(" "):
      is_inside = False
    found = re.match(rf" *\d+: ({'|'.join(_STARTED)}) .*?\] (\S+)", line)
    if found:
      (inside if is_inside else outside).append(found[2])
  return inside, outside


def test_operations_by_hand():
  text = """000: kCommandBuffer [source       | next=009 (1)]
    001: kCopy         [source       | sink        ] kCopy
009: kWhile         [prev=000 (1) | next=000 (1)]
condition:
    010: kCustomKernel [source | sink] compare grid: [1, 1, 1] threads: [1, 1, 1]
  body:
    000: kCommandBuffer [source | sink]
        011: kCustomKernel [source       | next=012 (1)] norm grid: [8, 1, 1] threads: [256, 1, 1]
        017: kCustomCall   [prev=016 (1) | next=018 (1)] kCustomCall
000: kCommandBuffer [prev=009 (1) | sink        ]
    021: kCustomKernel [source       | next=022 (1)] add grid: [256, 1, 1] threads: [128, 1, 1]
"""
  assert operations(text) == (["norm", "kCustomCall"], ["kCopy", "compare", "add"])


def compiled_step(
  rows: int, kernels: Kernels, *, kind: Kind = "greedy", rounds: int = 1
) -> tuple[Any, str]:
  """The program of a step of rows in slots, and its sequence of device operations."""
  config = dataclasses.replace(ModelConfig.named("bonsai-8b"), num_layers=LAYERS)
  model = jax.eval_shape(lambda: random_model(config, "w2a8"))
  programs = FusedPrograms(model, kernels, np.dtype(jnp.bfloat16))
  state = jax.eval_shape(
    lambda: StageState(
      programs.new_cache(slots=SLOTS, capacity=CAPACITY),
      None,
      SamplerState.new(SLOTS, config.vocab_size),
      jnp.zeros(SLOTS, jnp.int32),
    )
  )
  steps = StepPrograms(programs, is_first=True, is_static=True)
  step = functools.partial(steps.decode, kind=kind, top=0, rounds=rounds, masked=False)
  plan = jax.ShapeDtypeStruct((PLAN, rows), jnp.int32)
  with tempfile.TemporaryDirectory() as folder:
    compiled = aot.compile_for_h200(
      step, model, state, plan, donate=(1,), options={"xla_dump_to": folder}
    )
    [path] = Path(folder).glob("*.thunk_sequence_after_thunk_passes.txt")
    return compiled, path.read_text()


@pytest.mark.parametrize("rows", [8, 64])
def test_a_layer_of_a_step_is_ten_operations(rows: int):
  compiled, sequence = compiled_step(rows, Kernels(device="NVIDIA H200", invariant=True))
  inside, outside = operations(sequence)
  assert len(inside) <= 10, inside
  assert len(outside) <= 24, outside
  memory = compiled.memory_analysis()
  cache = 2 * 2 * LAYERS * SLOTS * 8 * CAPACITY * 128
  assert memory.alias_size_in_bytes >= cache
  # A few arrays of logits.
  assert memory.temp_size_in_bytes < 3 * rows * 152_000 * 4


def test_activations_that_xla_rounds_take_more():
  kernels = Kernels(device="NVIDIA H200", invariant=True, rounds=False)
  inside, _ = operations(compiled_step(8, kernels)[1])
  assert len(inside) > 20


def test_the_host_is_not_asked_in_the_middle_of_a_call():
  """A choice, or a loop whose count XLA does not know, would stop the device until the host has looked."""
  kernels = Kernels(device="NVIDIA H200", invariant=True)
  compiled, sequence = compiled_step(8, kernels, kind="full", rounds=LOOP)
  assert "kWhile" in sequence and "kConditional" not in sequence
  loops = [line for line in compiled.as_text().splitlines() if " while(" in line]
  assert loops and all("known_trip_count" in line for line in loops)
