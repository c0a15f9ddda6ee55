"""Several steps under way: whose outcome is whose, who is failed and who is blamed. The stages are played by the
test, and waiting takes no time."""

import asyncio
import types
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from neurojax.config import Sampling, Span
from neurojax.pipeline import flights, rows
from neurojax.pipeline import pipeline_pb2 as pb
from neurojax.pipeline.contact import Timing
from neurojax.pipeline.errors import ProtocolError, StageFailed, StageLost, StageTimeout
from neurojax.pipeline.flights import Flights
from neurojax.plan.fleet import Host
from neurojax.stage.step import Row, RowOutput
from tests.engine import virtual

STEP_S = 10.0


class Stage:
  """What is sent to a stage, and what it says."""

  lost, places, clock_ahead_s = None, 0, 0.0

  def __init__(self, index: int):
    self.name = self.label = f"stage-{index}"
    self.host = Host(address=f"h{index}:1")
    self.span = Span(first_layer=index, last_layer=index, num_layers=9)
    self.timing = Timing()
    self.sent: list[pb.Frame] = []
    self.is_healthy = True
    self.say: Callable[[pb.Frame], None]

  async def send(self, frame: pb.Frame) -> None:
    self.sent.append(frame)

  async def is_responsive(self) -> bool:
    return self.is_healthy

  @property
  def steps(self) -> list[pb.Step]:
    return [frame.step for frame in self.sent if frame.HasField("step")]

  def opened(self) -> None:
    for frame in self.sent:
      if frame.HasField("open"):
        self.say(pb.Frame(opened=pb.Opened(sequence=frame.open.sequence)))

  def done(self, *asked: pb.Row, token: int | None = None) -> None:
    """Answer rows; the last stage with a token."""
    output = RowOutput()
    if token is not None:
      output = RowOutput(tokens=np.array([token], np.int32), logprobs=np.zeros(1, np.float32))
    outcomes = [rows.outcome(row.sequence, row.index, output) for row in asked]
    self.say(pb.Frame(outcome=pb.Outcome(rows=outcomes, compute_s=1.0)))

  def failed(self, row: pb.Row, kind: str = "numeric") -> None:
    self.say(pb.Frame(failure=pb.Failure(sequence=row.sequence, kind=kind, message="no number")))


class Stages(list):
  block, places = 256, 0


Script = Callable[[Flights, Stages], Coroutine[Any, Any, None]]


def play(monkeypatch: pytest.MonkeyPatch, number: int, slots: int, script: Script) -> None:
  """Run a script with so many stages, on which so many sequences are open."""

  async def work() -> None:
    clock = types.SimpleNamespace(monotonic=asyncio.get_running_loop().time)
    monkeypatch.setattr(flights, "time", clock)
    stages = Stages(Stage(index) for index in range(number))
    pipeline = Flights(stages, slots=slots, vocab_size=99, step_s=STEP_S)
    for stage in stages:
      stage.say = lambda frame, stage=stage: pipeline.on_frame(stage, frame)
    opening = [asyncio.ensure_future(pipeline.open(slot, Sampling())) for slot in range(slots)]
    await settle()
    for stage in stages:
      assert not any(task.done() for task in opening)
      stage.opened()
    await asyncio.gather(*opening)
    await script(pipeline, stages)

  virtual.run(work())


async def settle() -> None:
  for _ in range(20):
    await asyncio.sleep(0)


def drawn(slot: int, start: int = 0) -> Row:
  return Row(slot=slot, start=start, tokens=np.array([1], np.int32), role="drawn", draws=1)


def given(pipeline: Flights, *slots: int, start: int = 0) -> asyncio.Task[list[RowOutput]]:
  return asyncio.ensure_future(pipeline.step([drawn(slot, start) for slot in slots]))


def test_steps_follow_each_other_and_each_gets_its_own_outcomes(monkeypatch):
  async def script(pipeline: Flights, stages: Stages) -> None:
    tasks = [given(pipeline, 2, 0), given(pipeline, 1), given(pipeline, 3)]
    await settle()
    steps = stages[0].steps
    assert [len(step.rows) for step in steps] == [2, 1, 1] and not stages[1].steps
    for step in steps:
      stages[0].done(*step.rows)
    # The rows of a step may come back one by one, and in any order.
    stages[1].done(steps[0].rows[1], token=10)
    await settle()
    assert not any(task.done() for task in tasks)
    stages[1].done(steps[0].rows[0], token=12)
    stages[1].done(*steps[1].rows, token=11)
    await settle()
    assert [task.done() for task in tasks] == [True, True, False]
    assert [output.tokens.tolist() for output in tasks[0].result()] == [[12], [10]]
    assert [output.tokens.tolist() for output in tasks[1].result()] == [[11]]
    # A sequence goes on while the step of another is under way.
    again = given(pipeline, 1, start=1)
    await settle()
    assert [row.index for row in stages[0].steps[3].rows] == [1]
    stages[1].done(*steps[2].rows, token=13)
    stages[0].done(*stages[0].steps[3].rows)
    stages[1].done(*stages[0].steps[3].rows, token=21)
    assert [output.tokens.tolist() for output in await again] == [[21]]
    assert (await tasks[2])[0].tokens.tolist() == [13]

  play(monkeypatch, 2, 4, script)


def test_a_row_that_fails_does_not_hurt_the_others(monkeypatch):
  async def script(pipeline: Flights, stages: Stages) -> None:
    task, behind = given(pipeline, 0, 1, 2), given(pipeline, 3)
    await settle()
    bad, lying, good = stages[0].steps[0].rows
    stages[0].failed(bad)
    stages[0].done(lying, good)
    stages[1].done(lying, token=99)
    stages[1].done(good, token=7)
    outputs = await task
    assert isinstance(outputs[0].error, StageFailed) and "stage-0: no number" in str(
      outputs[0].error
    )
    assert isinstance(outputs[1].error, ProtocolError) and "token 99" in str(outputs[1].error)
    assert outputs[2].error is None and outputs[2].tokens.tolist() == [7]
    # What has failed is not sent any more, and says so at once.
    later = await given(pipeline, 0, start=1)
    assert later[0].error is outputs[0].error and len(stages[0].steps) == 2
    assert not behind.done()
    stages[1].failed(stages[0].steps[1].rows[0], kind="lost")
    assert isinstance((await behind)[0].error, StageFailed), "no stage comes after the last"
    await pipeline.close(0)
    await pipeline.close(0)
    for stage in stages:
      assert [f.close.sequence for f in stage.sent if f.HasField("close")] == [bad.sequence]

  play(monkeypatch, 2, 4, script)


def test_a_lost_stage_ends_all_that_is_under_way(monkeypatch):
  async def script(pipeline: Flights, stages: Stages) -> None:
    tasks = [given(pipeline, 0), given(pipeline, 1)]
    await settle()
    # The stage before says so first: only of the sequence whose step it had.
    stages[0].failed(stages[0].steps[0].rows[0], kind="lost")
    [output] = await tasks[0]
    assert isinstance(output.error, StageLost) and "stage-1: no number, says stage-0" in str(
      output.error
    )
    stages[1].lost = "gone"
    pipeline.on_lost(stages[1])
    with pytest.raises(StageLost, match="stage-1: gone"):
      await tasks[1]
    assert isinstance((await given(pipeline, 2))[0].error, StageLost)

  play(monkeypatch, 2, 3, script)


@pytest.mark.parametrize("silent", [None, 1])
def test_the_first_stage_behind_is_blamed_and_what_waits_behind_others_is_not(monkeypatch, silent):
  async def script(pipeline: Flights, stages: Stages) -> None:
    began_s = asyncio.get_running_loop().time()
    first, second = given(pipeline, 0, 1, 2), given(pipeline, 3)
    await settle()
    asked = [row for step in stages[0].steps for row in step.rows]
    for row in asked[:3]:
      # As long as a stage gets on with a step, those behind it have time.
      await asyncio.sleep(0.9 * STEP_S)
      stages[0].done(row)
    await asyncio.sleep(0.9 * STEP_S)
    stages[0].done(asked[3])
    assert not first.done() and not second.done()
    if silent is not None:
      stages[silent].is_healthy = False
    for task in (first, second):
      with pytest.raises(StageTimeout, match=r"stage-1: did not finish step 0 within 10 s"):
        await task
    took_s = asyncio.get_running_loop().time() - began_s
    # The last stage's step began to wait when the third row was done; the fourth is not part of it.
    assert took_s == pytest.approx((3 * 0.9 + 1) * STEP_S)

  play(monkeypatch, 3, 4, script)


def test_times_are_added_up_over_steps_of_answers(monkeypatch):
  async def script(pipeline: Flights, stages: Stages) -> None:
    prompt = Row(slot=1, start=0, tokens=np.array([1, 2], np.int32), draws=1)
    task = asyncio.ensure_future(pipeline.step([prompt]))
    await settle()
    [step] = stages[0].steps
    stages[0].done(*step.rows)
    stages[1].done(*step.rows, token=1)
    await task
    assert [stage.timing.steps for stage in stages] == [0, 0]
    task = given(pipeline, 0, 1)
    await settle()
    step = stages[0].steps[-1]
    stages[1].done(*step.rows, token=1)
    await task
    # The first stage may tell of it after the sequence has been closed.
    await pipeline.close(0)
    await pipeline.close(1)
    stages[0].done(*step.rows)
    assert [(s.timing.steps, s.timing.compute_s) for s in stages] == [(1, 1.0)] * 2
    assert pipeline.marks.returned.steps == 1

  play(monkeypatch, 2, 2, script)
