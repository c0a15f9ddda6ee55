"""The whole model in this process."""

import asyncio
import concurrent.futures
from collections.abc import Callable
from typing import TypeVar

from neurojax.config import Sampling
from neurojax.engine.api import EngineError, StageReport
from neurojax.engine.drive import DrivenEngine
from neurojax.stage.compile import CompiledStage
from neurojax.stage.runtime import StageRuntime
from neurojax.stage.step import StepInput, StepOutput

T = TypeVar("T")


class LocalEngine(DrivenEngine):
  """An engine over one stage that holds every layer.

  Args:
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
    self._runtime = StageRuntime(stage, max_sequences=max_sequences)
    self._thread = thread or concurrent.futures.ThreadPoolExecutor(
      1, thread_name_prefix="neurojax-local"
    )
    self._decode_steps, self._decode_s = 0, 0.0
    self._closed = False

  @property
  def vocab_size(self) -> int:
    return self._runtime.stage.config.vocab_size

  @property
  def context_length(self) -> int:
    return self._runtime.stage.context_length

  async def reports(self) -> tuple[StageReport, ...]:
    stage = self._runtime.stage
    return (
      StageReport(
        host="this process",
        address="",
        first_layer=stage.span.first_layer,
        last_layer=stage.span.last_layer,
        weight_bytes=stage.weight_bytes,
        cache_bytes=stage.cache_bytes,
        decode_steps=self._decode_steps,
        step_s=self._decode_s / self._decode_steps if self._decode_steps else None,
      ),
    )

  async def close(self) -> None:
    self._closed = True
    self._thread.shutdown(wait=False, cancel_futures=True)

  async def _open(self, sequence: str, sampling: Sampling) -> None:
    await self._do(lambda: self._runtime.open(sequence, sampling))

  async def _step(self, sequence: str, given: StepInput) -> StepOutput:
    output = await self._do(lambda: self._runtime.step(sequence, given))
    if given.is_answer:
      self._decode_steps += 1
      self._decode_s += output.compute_s
    return output

  async def _close(self, sequence: str) -> None:
    if not self._closed:
      await self._do(lambda: self._runtime.close(sequence))

  async def _do(self, work: Callable[[], T]) -> T:
    if self._closed:
      raise EngineError("the engine is closed")
    try:
      return await asyncio.get_running_loop().run_in_executor(self._thread, work)
    except FloatingPointError as error:
      raise EngineError(f"this process: {error}") from error
