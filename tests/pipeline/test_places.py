"""Blocks of earlier prompts are kept on every stage, for one coordinator at a time."""

import asyncio
import signal

import grpc
import numpy as np
import pytest

from neurojax.config import Sampling
from neurojax.engine.api import Request
from neurojax.pipeline import messages, rows
from neurojax.pipeline import pipeline_pb2 as pb
from neurojax.pipeline import pipeline_pb2_grpc as rpc
from neurojax.pipeline.coordinator import PipelineEngine
from neurojax.pipeline.places import Places
from neurojax.stage.step import Row
from tests.pipeline.servers import PROMPT, Cluster, collect, run

# What is computed and what is kept is compared bit for bit.
pytestmark = pytest.mark.optimized

LONG = (PROMPT * 40)[:480]
REQUEST = Request(
  prompt=LONG, max_tokens=6, sampling=Sampling(temperature=1.0, seed=2, repetition_penalty=1.3)
)
FORM = {"context": 512, "prefix": 1024}
"""Four places of 256 positions."""


def cached(tokens: list) -> int:
  return tokens[-1].usage.cached_tokens


async def lost(engine: PipelineEngine, index: int) -> None:
  for _ in range(1000):
    if engine.stages[index].lost is not None:
      return
    await asyncio.sleep(0.01)
  raise AssertionError("the link still stands")


def test_a_prompt_that_is_known_is_not_computed_again_and_gives_the_same_bits(three: Cluster):
  async def work():
    engine = await three.connect(0, 1, **FORM)
    cold = await collect(engine, REQUEST)
    warm = await collect(engine, REQUEST)
    blocks = engine.load().blocks
    other = await three.connect(0, 1, **FORM)
    theirs = [await collect(other, REQUEST) for _ in range(2)]
    places = engine.load().places, other.load().places
    await engine.close()
    again = await three.connect(0, 1, **FORM)
    places = *places, again.load().places
    fresh = await collect(again, REQUEST)
    await other.close()
    await again.close()
    return cold, warm, theirs, fresh, blocks, places

  cold, warm, theirs, fresh, blocks, places = run(work())
  assert cold == warm == fresh and theirs == [cold, cold]
  assert (cached(cold), cached(warm), blocks) == (0, 256, 1)
  # All places are the first coordinator's until it goes; what it kept is nobody's then.
  assert places == (4, 0, 4)
  assert [cached(tokens) for tokens in theirs] == [0, 0] and cached(fresh) == 0


def test_blocks_that_a_stage_has_lost_are_computed_again(three: Cluster):
  async def work():
    engine = await three.connect(0, 1, **FORM)
    cold = await collect(engine, REQUEST)
    three.servers[1].signal(signal.SIGKILL)
    await asyncio.to_thread(three.replace, 1)
    await lost(engine, 1)
    # The first stage still has the blocks, the other one has none: nothing is made of them.
    after, warm = [await collect(engine, REQUEST) for _ in range(2)]
    await engine.close()
    return cold, after, warm

  cold, after, warm = run(work())
  assert cold == after == warm
  assert (cached(after), cached(warm)) == (0, 256)


def test_a_stage_that_grants_no_places_any_more_is_served_without(three: Cluster):
  """The link to one stage breaks, and another coordinator asks for its places first."""

  async def work():
    engine = await three.connect(0, 1, **FORM)
    cold = await collect(engine, REQUEST)
    await engine.stages[1].channel.close()
    await lost(engine, 1)
    greedy = await three.connect(0, 1, **FORM)
    held = [stage.places for stage in greedy.stages]
    found = [await collect(engine, REQUEST) for _ in range(2)]
    await engine.close()
    await greedy.close()
    return cold, held, found

  cold, held, found = run(work())
  assert held == [0, 4]
  assert found == [cold, cold] and [cached(tokens) for tokens in found] == [0, 0]


def test_places_that_are_not_granted_or_hold_nothing_are_refused_by_name(three: Cluster):
  async def work():
    engine = await three.connect(0, **FORM)
    hello = pb.Hello(identity=engine.stages.identity, your_first_layer=0, your_last_layer=5)
    await engine.close()
    row = Row(slot=0, start=0, tokens=np.array(LONG[:256], np.int32), keep=(1,))
    async with grpc.aio.insecure_channel(three.addresses[0]) as channel:

      async def link(places: int) -> tuple[grpc.aio.StreamStreamCall, int]:
        call = rpc.StageStub(channel).Link(timeout=30)
        hello.places = places
        await call.write(pb.Frame(hello=hello))
        return call, (await call.read()).hello.places

      async def said(call: grpc.aio.StreamStreamCall, **body: object) -> pb.Frame:
        await call.write(pb.Frame(**body))
        return await asyncio.wait_for(call.read(), 20)

      def opens(name: str, *restore: int) -> pb.Open:
        sampling = messages.sampling(Sampling())
        return pb.Open(sequence=name, sampling=sampling, restore=restore)

      (shy, none), (owner, all_places), (late, too_late) = [await link(n) for n in (0, 1, 4)]
      assert (none, all_places, too_late) == (0, 4, 0)
      for call in (shy, late):
        assert "place 1 is not granted" in (await said(call, open=opens("a", 1))).failure.message
        assert (await said(call, open=opens("a"))).opened.sequence == "a"
        step = pb.Step(rows=[rows.row("a", 0, row)])
        assert "place 1 is not granted" in (await said(call, step=step)).failure.message
      assert "place 1 holds no block" in (await said(owner, open=opens("b", 1))).failure.message
      assert (await said(owner, open=opens("b"))).opened.sequence == "b"
      assert (await said(owner, step=pb.Step(rows=[rows.row("b", 0, row)]))).outcome.rows
      assert (await said(owner, open=opens("c", 1))).opened.sequence == "c"
      far = Row(slot=0, start=0, tokens=row.tokens, keep=(4,))
      assert (await said(owner, open=opens("d"))).opened.sequence == "d"
      refused = await said(owner, step=pb.Step(rows=[rows.row("d", 0, far)]))
      assert "place 4: this stage has 4 places" in refused.failure.message

  run(work())


def test_a_block_that_was_being_replaced_is_not_there():
  first, second, places = object(), object(), Places()
  assert places.ask(first, 0) == 0 and places.ask(second, 3) == 3 and places.ask(first, 3) == 0
  places.written(second, (0, 2))
  places.written(first, (1,))
  places.check_restore(second, (0, 2))
  places.writing((2,))
  for missing in (1, 2):
    with pytest.raises(ValueError, match=f"place {missing} holds no block"):
      places.check_restore(second, (0, missing))
  places.leave(first)
  places.check_restore(second, (0,))
  places.leave(second)
  assert places.ask(first, 3) == 3
  with pytest.raises(ValueError, match="place 0 holds no block"):
    places.check_restore(first, (0,))
