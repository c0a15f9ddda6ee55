"""What the stages of a pipeline are at: the opening of a sequence, or a step of some."""

import asyncio
import dataclasses
from collections.abc import Sequence

from neurojax.engine.api import EngineError
from neurojax.pipeline.contact import Contact
from neurojax.pipeline.errors import PipelineError, StageTimeout
from neurojax.stage.step import Row, RowOutput

OPENING = -1
"""Stands for the opening of a sequence where its steps are numbered from 0."""


@dataclasses.dataclass(eq=False)
class Flown:
  """A sequence that is open, or being opened.

  Attributes:
    name: By which the stages know it.
    done: Number of its steps that each stage has finished; OPENING before it is open there.
    steps: Number of steps that were sent.
    failure: Why the sequence ended; None while it goes on.
    works: What it is part of and somebody waits for, by the number of its step.
  """

  name: str
  done: list[int]
  steps: int = 0
  failure: EngineError | None = None
  works: "dict[int, Work]" = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(eq=False)
class Work:
  """An opening, or a step, that somebody waits for.

  Attributes:
    parts: For each sequence the number of its step, or OPENING, and the row that it was given.
    over: Set when the work is done, or with the error that ended all of it.
    progress_s: When some stage last got on with it or with what was asked before; or when it was asked.
    outputs: Outputs of the rows that came back.
  """

  parts: dict[Flown, tuple[int, Row | None]]
  over: asyncio.Future[EngineError | None]
  progress_s: float
  outputs: dict[Flown, RowOutput] = dataclasses.field(default_factory=dict)

  def take(self, sequence: Flown, output: RowOutput) -> None:
    """Take the output of a row; the work is done with the last of them."""
    self.outputs.setdefault(sequence, output)
    if len(self.outputs) == len(self.parts):
      self.end(None)

  def end(self, error: EngineError | None) -> None:
    if not self.over.done():
      self.over.set_result(error)


async def blame(work: Work, contacts: Sequence[Contact], step_s: float) -> PipelineError:
  """Name the stage that hangs: the first one behind that does not even answer a health check."""
  going = {s: index for s, (index, _) in work.parts.items() if s not in work.outputs}

  def late(stage: int) -> list[int]:
    return [s.done[stage] for s, index in going.items() if s.done[stage] <= index]

  behind = [stage for stage in range(len(contacts)) if late(stage)] or [len(contacts) - 1]
  healthy = await asyncio.gather(*(contacts[stage].is_responsive() for stage in behind))
  silent = [stage for stage, ok in zip(behind, healthy, strict=True) if not ok]
  culprit = (silent or behind)[0]
  done = min(late(culprit), default=0)
  what = "open the sequence" if OPENING in going.values() else f"finish step {done}"
  return StageTimeout(contacts[culprit].label, f"did not {what} within {step_s:g} s")
