"""Small models whose programs are fused, and answers through stages compiled of them."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from neurojax.config import ModelConfig, Sampling, Span
from neurojax.files.dummy import write_dummy
from neurojax.files.load import load_span
from neurojax.files.open import open_model
from neurojax.model.neurollm import NeuroLLM
from neurojax.stage.compile import CompiledStage
from neurojax.stage.kernels import REFERENCE, Kernels
from neurojax.stage.runtime import StageRuntime
from neurojax.stage.step import Row, RowOutput

LLAMA = ModelConfig(
  vocab_size=97, model_dim=256, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32,
  ffn_dim=384, rope_style="interleaved", norm_eps=1e-5, tied_embedding=True,
)  # fmt: skip
QWEN = dataclasses.replace(
  LLAMA, rope_style="half", rope_base=1e6, qk_norm=True, tied_embedding=False
)
FAMILIES = {"llama": LLAMA, "qwen3": QWEN}
PROMPT = np.random.default_rng(0).integers(0, 97, 41).astype(np.int32)
ANSWER = 4
BUCKETS = (1, 16)


def write(folder: Path) -> dict[str, Path]:
  """A file of each family."""
  found = {name: folder / f"{name}.gguf" for name in FAMILIES}
  for name, path in found.items():
    write_dummy(path, FAMILIES[name], "Q2_0 (group 64)")
  return found


def load(path: Path, mode: str, dtype: str = "bfloat16", span: Span | None = None) -> NeuroLLM:
  with open_model(path) as file:
    return load_span(file, span, weights=mode, dtype=jnp.dtype(dtype))


def stage(model: NeuroLLM, kernels: Kernels | None = REFERENCE, **options) -> CompiledStage:
  options = {"programs": "fused", "context_length": 100, "buckets": BUCKETS, **options}
  return CompiledStage(model, kernels=kernels, **options)


def answer(stages: list[CompiledStage]) -> tuple[list[int], list[float], np.ndarray]:
  """Tokens and log-probabilities after PROMPT, and of PROMPT itself, through all stages."""
  runtimes = [StageRuntime(stage) for stage in stages]
  for runtime in runtimes:
    runtime.open(0, Sampling())

  def step(row: Row) -> RowOutput:
    for runtime in runtimes:
      [output] = runtime.step([row])
      assert output.error is None, output.error
      row = dataclasses.replace(row, hidden=output.hidden)
    return output

  scores, chunk, last = [], stages[0].chunks[0], len(PROMPT) - 1
  for start in range(0, last, chunk):
    part = slice(start, min(start + chunk, last))
    targets = PROMPT[start + 1 : part.stop + 1]
    scores.append(step(Row(slot=0, start=start, tokens=PROMPT[part], targets=targets)).scores)
  outputs = [step(Row(slot=0, start=last, tokens=PROMPT[-1:], draws=1))]
  while len(outputs) < ANSWER:
    row = Row(slot=0, start=last + len(outputs), tokens=outputs[-1].tokens, role="drawn", draws=1)
    outputs.append(step(row))
  tokens = [int(output.tokens[0]) for output in outputs]
  return tokens, [float(output.logprobs[0]) for output in outputs], np.concatenate(scores)


def check_any_cut(
  path: Path, mode: str, kernels: Kernels, spans: tuple[tuple[int, int], ...]
) -> None:
  """Stages of these spans, one after the other, give the bits of one stage of all layers."""
  whole = answer([stage(load(path, mode), kernels)])
  parts = []
  for first, last in spans:
    span = Span(first_layer=first, last_layer=last, num_layers=3)
    parts.append(stage(load(path, mode, span=span), kernels))
  tokens, logprobs, scores = answer(parts)
  assert (tokens, logprobs) == whole[:2]
  np.testing.assert_array_equal(scores, whole[2])
