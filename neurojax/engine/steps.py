"""The seam between the generation loop and the programs that compute its steps."""

from typing import Protocol

from neurojax.config import Sampling
from neurojax.stage.step import StepInput, StepOutput


class Steps(Protocol):
  """Computes the steps of sequences, in this process or on stage servers.

  Sequences are independent of each other and may be open at the same time. One sequence has one step
  at a time. Methods raise ValueError for what can never be served and EngineError when it failed.
  """

  async def open(self, sequence: str, sampling: Sampling) -> None:
    """Make room for a sequence on every stage."""
    ...

  async def step(self, sequence: str, given: StepInput) -> StepOutput | None:
    """Advance a sequence through every stage.

    A step that asks for nothing may return None before it is done. Steps of one sequence are carried
    out in order, and a failure is raised by this or a later step.
    """
    ...

  async def close(self, sequence: str) -> None:
    """Free a sequence on every stage that can be reached; one that is not open is no error."""
    ...
