"""The engine that holds the whole model in this process."""

import asyncio
import concurrent.futures
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TypeVar

import numpy as np

from neurojax.config import Sampling
from neurojax.engine import loop
from neurojax.engine.api import EngineError, Request, StageReport, Token
from neurojax.stage.compile import CompiledStage
from neurojax.stage.runtime import StageRuntime
from neurojax.stage.step import StepInput, StepOutput

T = TypeVar("T")


class LocalSteps:
  """The `engine.steps.Steps` of one stage in this process.

  Attributes:
    decode_steps: Decode steps that were computed.
    decode_s: Seconds that they took, queueing excluded.
  """

  def __init__(self, runtime: StageRuntime, thread: concurrent.futures.ThreadPoolExecutor):
    self._runtime, self._thread = runtime, thread
    self.decode_steps, self.decode_s = 0, 0.0
    self._ended = False

  async def open(self, sequence: str, sampling: Sampling) -> None:
    await self._do(lambda: self._runtime.open(sequence, sampling))

  async def step(self, sequence: str, given: StepInput) -> StepOutput:
    output = await self._do(lambda: self._runtime.step(sequence, given))
    if given.is_answer:
      self.decode_steps += 1
      self.decode_s += output.compute_s
    return output

  async def close(self, sequence: str) -> None:
    if not self._ended:
      await self._do(lambda: self._runtime.close(sequence))

  def end(self) -> None:
    """Compute nothing any more."""
    self._ended = True
    self._thread.shutdown(wait=False, cancel_futures=True)

  async def _do(self, work: Callable[[], T]) -> T:
    if self._ended:
      raise EngineError("the engine is closed")
    try:
      return await asyncio.get_running_loop().run_in_executor(self._thread, work)
    except FloatingPointError as error:
      raise EngineError(f"this process: {error}") from error


class LocalEngine:
  """An `engine.api.Engine` over one stage that holds every layer.

  Args:
    max_sequences: Sequences that may be open at the same time.
    thread: A pool of one thread that computes; a new one if absent. `close` shuts it down.
  Raises: ValueError: the stage holds only a part of the model.
  """

  def __init__(
    self,
    stage: CompiledStage,
    *,
    max_sequences: int = 4,
    thread: concurrent.futures.ThreadPoolExecutor | None = None,
  ):
    if len(stage.span) != stage.config.num_layers:
      raise ValueError(f"a local engine needs all layers, this stage holds {stage.span}")
    self._stage = stage
    thread = thread or concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="neurojax-local")
    self._steps = LocalSteps(StageRuntime(stage, max_sequences=max_sequences), thread)

  @property
  def vocab_size(self) -> int:
    return self._stage.config.vocab_size

  @property
  def context_length(self) -> int:
    return self._stage.context_length

  @property
  def longest_context(self) -> int:
    return self._stage.config.context_length

  def generate(self, request: Request) -> AsyncGenerator[Token, None]:
    return loop.generate(self._steps, request, self)

  async def score(self, tokens: Sequence[int], *, first: int = 1) -> np.ndarray:
    return await loop.score(self._steps, tokens, self, first=first)

  async def reports(self) -> tuple[StageReport, ...]:
    steps, stage = self._steps, self._stage
    return (
      StageReport(
        host="this process",
        address="",
        first_layer=stage.span.first_layer,
        last_layer=stage.span.last_layer,
        weight_bytes=stage.weight_bytes,
        cache_bytes=stage.cache_bytes,
        decode_steps=steps.decode_steps,
        step_s=steps.decode_s / steps.decode_steps if steps.decode_steps else None,
      ),
    )

  async def close(self) -> None:
    self._steps.end()
