"""Times of the decode steps of a pipeline, from what every stage tells of them."""

import dataclasses
import time

from neurojax.pipeline import pipeline_pb2 as pb
from neurojax.pipeline.contact import Contact, Timing
from neurojax.pipeline.stages import Stages

_MOST = 256
"""Steps whose times not all stages have told yet; older ones are forgotten."""


@dataclasses.dataclass
class _Mark:
  """Times of one decode step.

  Attributes:
    sent_s: When it was sent.
    outcomes: The stages' outcomes of the step, by the stage's index.
    back_s: When the last stage's outcome arrived.
  """

  sent_s: float
  outcomes: dict[int, pb.Outcome] = dataclasses.field(default_factory=dict)
  back_s: float = 0.0


class Marks:
  """Follows decode steps that are sent as one frame, each known by its first row.

  Attributes:
    returned: Times of tokens from the last stage back to here.
  """

  def __init__(self, stages: Stages):
    self._stages, self.returned = stages, Timing()
    self._marks: dict[tuple[str, int], _Mark] = {}

  def sent(self, first: pb.Row) -> None:
    """Take note that a step is being sent."""
    self._marks[first.sequence, first.index] = _Mark(time.time())
    if len(self._marks) > _MOST:
      del self._marks[next(iter(self._marks))]

  def take(self, contact: Contact, outcome: pb.Outcome) -> None:
    """Take what a stage tells of a step, and add up the times once every stage has told."""
    now_s = time.time()
    key = (outcome.rows[0].sequence, outcome.rows[0].index) if outcome.rows else None
    mark = self._marks.get(key) if key else None
    if key is None or mark is None:
      return
    index = self._stages.index(contact)
    mark.outcomes[index] = outcome
    mark.back_s = now_s if index == len(self._stages) - 1 else mark.back_s
    if len(mark.outcomes) == len(self._stages):
      del self._marks[key]
      self._account(mark)

  def _account(self, mark: _Mark) -> None:
    before_s = mark.sent_s
    for index, contact in enumerate(self._stages):
      outcome = mark.outcomes[index]
      contact.timing.steps += 1
      contact.timing.compute_s += outcome.compute_s
      contact.timing.wire_s += outcome.received_s - contact.clock_ahead_s - before_s
      before_s = outcome.finished_s - contact.clock_ahead_s
    self.returned.steps += 1
    self.returned.wire_s += mark.back_s - before_s
