"""The engine whose layers live on stage servers."""

import dataclasses
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Self

from neurojax.config import ModelConfig, Span
from neurojax.engine.api import EngineLoad, Request, Scores, StageReport, Token
from neurojax.engine.batch import Batch
from neurojax.pipeline import messages
from neurojax.pipeline.contact import PipelineOptions
from neurojax.pipeline.flights import Flights
from neurojax.pipeline.stages import Stages
from neurojax.plan.fleet import Fleet
from neurojax.plan.plan import Placement


class PipelineEngine:
  """An `engine.api.Engine` over stage servers, made by `connect`. Use from one event loop."""

  def __init__(
    self, config: ModelConfig, options: PipelineOptions, stages: Stages, flights: Flights
  ):
    self._config, self._options, self.stages = config, options, stages
    self._flights, self._batch = flights, Batch(flights, self)

  @classmethod
  async def connect(
    cls,
    config: ModelConfig,
    sha256: str,
    fleet: Fleet,
    options: PipelineOptions,
    *,
    spans: Mapping[str, Span] | None = None,
  ) -> Self:
    """Meet every host, decide which layers it holds, and have it load and run them.

    Args:
      sha256: Digest of the model file; every host must have the same file.
      spans: Layers by address, one span for each host in the order of the fleet (`plan.plan_file` reads
        them from a plan); in proportion to free memory if None.
    Raises:
      HandshakeError, StageLost, StageTimeout: a host fails; names it.
      ValueError: the fleet is too small, or the context is longer than the model's.
    """
    serving = options.serving.resolve(config, options.forms)
    options = dataclasses.replace(options, serving=serving)
    assert serving.context is not None
    identity = messages.identity(
      config,
      sha256=sha256,
      dtype=serving.dtype,
      context_length=serving.context,
      programs="auto" if serving.programs == "quick" else serving.programs,
    )
    stages = Stages(config, identity, options)
    flights = Flights(
      stages, slots=serving.sequences, vocab_size=config.vocab_size, step_s=options.step_s
    )
    try:
      await stages.meet(fleet, spans)
      await stages.load()
      await stages.link(flights.on_frame, flights.on_lost)
    except BaseException:
      await stages.close()
      raise
    return cls(config, options, stages, flights)

  @property
  def vocab_size(self) -> int:
    return self._config.vocab_size

  @property
  def context_length(self) -> int:
    context = self._options.serving.context
    assert context is not None
    return context

  @property
  def longest_context(self) -> int:
    return self._config.context_length

  @property
  def placements(self) -> tuple[Placement, ...]:
    return self.stages.placements

  def generate(self, request: Request) -> AsyncGenerator[Token, None]:
    return self._batch.generate(request)

  async def score(self, tokens: Sequence[int], *, first: int = 1, top: int = 0) -> Scores:
    return await self._batch.score(tokens, first=first, top=top)

  def load(self) -> EngineLoad:
    return self._batch.load()

  async def reports(self) -> tuple[StageReport, ...]:
    return tuple(
      StageReport(
        host=contact.name,
        address=contact.host.address,
        first_layer=contact.span.first_layer,
        last_layer=contact.span.last_layer,
        weight_bytes=contact.description.weight_bytes,
        cache_bytes=contact.description.cache_bytes,
        decode_steps=contact.timing.steps,
        step_s=contact.timing.mean(contact.timing.compute_s),
        wire_s=contact.timing.mean(contact.timing.wire_s),
      )
      for contact in self.stages
    )

  @property
  def return_s(self) -> float | None:
    """Mean seconds of a token from the last stage back to here."""
    returned = self._flights.marks.returned
    return returned.mean(returned.wire_s)

  async def close(self) -> None:
    self._flights.end()
    await self._batch.close()
    await self.stages.close()
