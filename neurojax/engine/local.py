"""The engine that holds the whole model in this process."""

import asyncio
import concurrent.futures
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TypeVar

from neurojax.config import Sampling
from neurojax.config.serving import Speculate
from neurojax.engine.api import EngineError, EngineLoad, Request, Scores, StageReport, Token
from neurojax.engine.batch import Batch
from neurojax.engine.draft import Lookup
from neurojax.stage.compile import CompiledStage
from neurojax.stage.runtime import StageRuntime
from neurojax.stage.step import Row, RowOutput

T = TypeVar("T")

_LOG = logging.getLogger(__name__)


class LocalSteps:
  """The `engine.steps.Steps` of one stage in this process.

  One thread gives steps to the device, another waits for their results: the device has the next step before
  the host has read the last one.

  Args:
    thread: A pool of one thread, the only one that uses the runtime.

  Attributes:
    decode_steps: Tokens that were drawn after others.
    decode_s: Seconds that their steps took.
  """

  def __init__(self, runtime: StageRuntime, thread: concurrent.futures.ThreadPoolExecutor):
    stage = runtime.stage
    self.slots, self.places, self.chunks = stage.slots, stage.places, stage.chunks
    self.most_draws, self.most_drafts = runtime.most_draws, runtime.most_drafts
    self.ahead, self.chains = 2, True
    self.decode_steps, self.decode_s = 0, 0.0
    self._runtime, self._thread = runtime, thread
    self._reader = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="neurojax-reader")
    self._is_over = False

  async def open(
    self,
    slot: int,
    sampling: Sampling,
    *,
    stop_ids: frozenset[int] = frozenset(),
    restore: Sequence[int] = (),
    copy: tuple[int, int] | None = None,
  ) -> None:
    await self._do(
      self._thread,
      lambda: self._runtime.open(slot, sampling, stop_ids=stop_ids, restore=restore, copy=copy),
    )

  async def step(self, rows: Sequence[Row]) -> list[RowOutput]:
    pending = await self._do(self._thread, lambda: self._runtime.dispatch(rows))
    outputs = await self._do(self._reader, pending.result)
    drawn = max(
      (
        len(output.tokens)
        for row, output in zip(rows, outputs, strict=True)
        if row.role == "drawn" and output.tokens is not None
      ),
      default=0,
    )
    self.decode_steps += drawn
    self.decode_s += outputs[0].compute_s if drawn else 0.0
    return outputs

  async def close(self, slot: int) -> None:
    if not self._is_over:
      await self._do(self._thread, lambda: self._runtime.close(slot))

  def end(self) -> None:
    """Compute nothing any more."""
    self._is_over = True
    for thread in (self._thread, self._reader):
      thread.shutdown(wait=False, cancel_futures=True)

  async def _do(self, thread: concurrent.futures.ThreadPoolExecutor, work: Callable[[], T]) -> T:
    if self._is_over:
      raise EngineError("the engine is closed")
    return await asyncio.get_running_loop().run_in_executor(thread, work)


class LocalEngine:
  """An `engine.api.Engine` over one stage that holds every layer.

  Args:
    thread: A pool of one thread that computes; a new one if absent. `close` shuts it down.
    speculate: As `config.Serving.speculate`.
  Raises: ValueError: the stage holds only a part of the model.
  """

  def __init__(
    self,
    stage: CompiledStage,
    *,
    thread: concurrent.futures.ThreadPoolExecutor | None = None,
    speculate: Speculate = "off",
  ):
    if len(stage.span) != stage.config.num_layers:
      raise ValueError(f"a local engine needs all layers, this stage holds {stage.span}")
    self._stage = stage
    thread = thread or concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="neurojax-local")
    self._steps = LocalSteps(StageRuntime(stage), thread)
    self._batch = Batch(
      self._steps,
      self,
      make_drafter=None if speculate == "off" else Lookup,
      always_drafts=speculate == "lookup",
    )
    if speculate == "lookup" and stage.why_no_drafts:
      _LOG.warning("answers go on without drafts: %s", stage.why_no_drafts)

  @property
  def vocab_size(self) -> int:
    return self._stage.config.vocab_size

  @property
  def context_length(self) -> int:
    return self._stage.context_length

  @property
  def longest_context(self) -> int:
    return self._stage.config.context_length

  def generate(self, request: Request) -> AsyncGenerator[Token, int | None]:
    return self._batch.generate(request)

  async def score(self, tokens: Sequence[int], *, first: int = 1, top: int = 0) -> Scores:
    return await self._batch.score(tokens, first=first, top=top)

  def load(self) -> EngineLoad:
    return self._batch.load()

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
    await self._batch.close()
    self._steps.end()
