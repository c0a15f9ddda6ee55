"""Measures the time that each extra pipeline stage adds to a token, on stage servers of this machine."""

import contextlib
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from neurojax.config import ModelConfig, Serving
from neurojax.count import wording
from neurojax.engine.api import Request
from neurojax.files.dummy import write_dummy
from neurojax.files.load import ternary_matrices
from neurojax.files.open import open_model
from neurojax.measure.machine.links import Measured
from neurojax.pipeline.coordinator import PipelineEngine, PipelineOptions
from neurojax.pipeline.spawn import LocalStages
from neurojax.plan.fleet import Device

FEW, MANY = 1, 3
"""Stages of the two pipelines."""

MIDDLING = ModelConfig(
  vocab_size=512,
  model_dim=512,
  num_layers=18,
  num_heads=8,
  num_kv_heads=2,
  head_dim=64,
  ffn_dim=2048,
  tied_embedding=True,
)
"""A model whose step takes about 1 ms. Short steps matter: between its turns a stage's threads go to
sleep and its caches go cold."""


def _nothing(_: str) -> None:
  pass


async def extra_stage_s(
  config: ModelConfig = MIDDLING,
  *,
  tokens: int = 64,
  rounds: int = 8,
  say: Callable[[str], None] = _nothing,
) -> float:
  """Seconds that each extra stage adds to a token when the same layers are cut into more stages.

  They contain the step overhead, the hop, and what no part shows when it is measured alone: the thread
  that a step is handed to, the report to the coordinator while the next stage works, caches and threads
  that went cold.

  Args:
    config: Architecture that gets random ternary weights: at least `MANY` layers, widths multiples of
      128.
    tokens: Length of each answer.
    rounds: Answers of either pipeline, in turn. The shortest token of each counts.
    say: Called with a few words before each part of the work.
  Raises: EngineError: a stage server failed.
  """
  best_s: dict[int, float] = {}
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "random.gguf"
    write_dummy(path, config, "Q2_0 (group 128)")
    with open_model(path) as file:
      config, sha256, ternary = file.config, file.sha256(), ternary_matrices(file)
    options = PipelineOptions(
      serving=Serving(weights="w2a8", context=tokens + 64, sequences=1), forms=ternary
    )
    async with contextlib.AsyncExitStack() as stack:
      engines = {}
      for number in (FEW, MANY):
        say(f"a pipeline of {wording.counted(number, 'stage server')}: starting")
        local = await stack.enter_async_context(LocalStages(path, number))
        assert local.fleet is not None
        engines[number] = await PipelineEngine.connect(config, sha256, local.fleet, options)
        stack.push_async_callback(engines[number].close)
      for turn, (number, engine) in itertools.product(range(rounds), engines.items()):
        say(
          f"a pipeline of {wording.counted(number, 'stage server')}: answer {turn + 1} of {rounds}"
        )
        times = []
        async for _ in engine.generate(Request(prompt=[1], max_tokens=tokens)):
          times.append(time.perf_counter())
        shortest_s = min(b - a for a, b in itertools.pairwise(times[1:]))
        best_s[number] = min(shortest_s, best_s.get(number, shortest_s))
  return (best_s[MANY] - best_s[FEW]) / (MANY - FEW)


async def with_handover(
  devices: Sequence[Device], local: Measured, *, say: Callable[[str], None] = _nothing
) -> tuple[Device, ...]:
  """The devices, CPUs with their `handover_s`: the cost of an extra stage that neither the step overhead
  nor the hop explains.

  GPUs stay as they are: stage servers are started on CPUs only.

  Args:
    local: The link between two processes of this host.
    say: Called with a few words before each part of the work.
  Raises: EngineError: a stage server failed.
  """
  more_s = await extra_stage_s(say=say)
  hop_s = local.latency_s + MIDDLING.model_dim * 4 / local.bytes_per_s
  return tuple(
    dataclasses.replace(device, handover_s=max(0.0, more_s - hop_s - device.step_overhead_s))
    if device.kind == "cpu"
    else device
    for device in devices
  )
