"""What goes wrong ends in an error that names the stage, in time; and the next request is served."""

import asyncio
import contextlib
import itertools
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from neurojax.config import Serving, Span
from neurojax.engine.api import EngineError, Request, Token
from neurojax.files.open import open_model
from neurojax.pipeline import messages
from neurojax.pipeline import pipeline_pb2 as pb
from neurojax.pipeline import pipeline_pb2_grpc as rpc
from neurojax.pipeline.coordinator import PipelineEngine, PipelineOptions
from neurojax.pipeline.errors import HandshakeError, StageFailed, StageLost, StageTimeout
from neurojax.pipeline.server import SERVICE
from neurojax.plan.fleet import Fleet, Host
from tests import tinymodel
from tests.pipeline.servers import (
  Cluster,
  Server,
  cluster,
  collect,
  open_sequences,
  request,
  run,
  serves,
)


async def break_off(engine: PipelineEngine, at: int, what) -> tuple[int, Exception, float]:
  """Generate, do `what` after token `at`, and say how many tokens came, the error, and its seconds."""
  tokens, began_s = 0, time.monotonic()
  try:
    async for _ in engine.generate(request(max_tokens=200)):
      tokens += 1
      if tokens == at:
        began_s = time.monotonic()
        what()
  except EngineError as error:
    return tokens, error, time.monotonic() - began_s
  raise AssertionError(f"{tokens} tokens came and no error")


# ---- stages that die or hang


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_stage_is_named_and_a_new_one_in_its_place_serves(three: Cluster, victim: int):
  async def work():
    engine = await three.connect()
    tokens, error, seconds = await break_off(
      engine, 5, lambda: three.servers[victim].signal(signal.SIGKILL)
    )
    assert isinstance(error, StageLost), error
    assert f"stage-{victim}" in str(error) and "layers" in str(error), error
    assert 5 <= tokens < 200 and seconds < 10
    with pytest.raises(EngineError, match=f"stage-{victim}"):
      await collect(engine, request())
    survivors = [index for index in range(3) if index != victim]
    await serves(three, *survivors)
    await asyncio.to_thread(three.replace, victim)
    await serves(three)
    # The first coordinator finds its way back too, past those that loaded other layers meanwhile.
    assert len(await collect(engine, request(max_tokens=4))) == 4
    await engine.close()

  run(work())


def test_the_same_coordinator_meets_a_restarted_stage_again(three: Cluster):
  async def work():
    engine = await three.connect()
    whole = await collect(engine, request())
    _, error, _ = await break_off(engine, 3, lambda: three.servers[1].signal(signal.SIGKILL))
    assert "stage-1" in str(error)
    await asyncio.to_thread(three.replace, 1)
    assert await collect(engine, request()) == whole
    await engine.close()

  run(work())


@pytest.mark.parametrize("victim", [0, 2])
def test_a_stage_that_hangs_is_named_within_the_deadline_and_serves_again_later(
  three: Cluster, victim: int
):
  async def work():
    engine = await three.connect(step_s=2.0)
    whole = await collect(engine, request())
    tokens, error, seconds = await break_off(
      engine, 4, lambda: three.servers[victim].signal(signal.SIGSTOP)
    )
    assert isinstance(error, StageTimeout), error
    assert f"stage-{victim}" in str(error) and tokens < 200
    assert seconds < 8, "the deadline of 2 s, and a health check of 2 s"
    three.servers[victim].signal(signal.SIGCONT)
    assert await collect(engine, request()) == whole
    await engine.close()

  try:
    run(work())
  finally:
    three.servers[victim].signal(signal.SIGCONT)


def test_a_stage_that_cannot_be_reached_is_named():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"

  async def work():
    fleet = Fleet(hosts=(Host(address=address, name="nobody"),))
    with pytest.raises(StageLost, match=f"nobody at {address}.*cannot be reached"):
      await PipelineEngine.connect(
        tinymodel.CONFIG, "0" * 64, fleet, PipelineOptions(serving=Serving(context=64))
      )

  run(work())


def test_a_stage_that_computes_nan_says_so(tmp_path: Path):
  bad = tinymodel.write(tmp_path / "bad.gguf", blow_up=4)

  async def work(servers: Cluster):
    engine = await servers.connect()
    with pytest.raises(StageFailed, match=r"stage-1.*NaN or infinite") as caught:
      await collect(engine, request())
    assert "layers 3..5" in str(caught.value)
    await engine.close()

  with cluster(bad, 2) as servers:
    run(work(servers))


async def patient(engine: PipelineEngine, wanted: Request) -> list[Token]:
  """Ask again while all places are taken: those of an answer that has ended are freed by and by."""
  for _ in range(100):
    with contextlib.suppress(StageFailed):
      return await collect(engine, wanted)
    await asyncio.sleep(0.05)
  raise AssertionError("no place came free")


def test_requests_wait_for_a_slot_and_coordinators_share_those_of_a_server(three: Cluster):
  async def work():
    engine, other = await three.connect(0, 1, sequences=2), await three.connect(0, 1, sequences=2)
    first, second = (engine.generate(request(max_tokens=100)) for _ in range(2))
    await anext(first)
    await anext(second)
    assert engine.load().running == 2
    waiting = asyncio.create_task(collect(engine, request(max_tokens=3)))
    with pytest.raises(StageFailed, match="all 2 sequence places are taken"):
      await collect(other, request())
    assert engine.load().queued == 1 and not waiting.done()
    await first.aclose()
    assert len(await waiting) == 3
    assert len(await patient(other, request(max_tokens=3))) == 3
    await second.aclose()
    await engine.close()
    await other.close()

  run(work())


def test_a_coordinator_that_vanishes_leaves_nothing_behind(three: Cluster):
  async def work():
    engine = await three.connect()
    stream = engine.generate(request(max_tokens=100))
    await anext(stream)
    for stage in engine.stages:
      await stage.channel.close()
    for address in three.addresses:
      assert await open_sequences(address) == 0
    with pytest.raises(EngineError):
      await anext(stream)
    await serves(three)

  run(work())


@pytest.mark.parametrize("seed", [0, 1])
def test_cancelled_requests_leave_nothing_and_harm_no_other(three: Cluster, seed: int):
  """Cancelled wherever they happen to wait; the clients beside them get their whole answers."""
  rng = np.random.default_rng(seed)

  async def steady(engine: PipelineEngine, whole: list, number: int) -> None:
    for _ in range(number):
      assert await collect(engine, request(max_tokens=8)) == whole

  async def churn(engine: PipelineEngine, number: int) -> None:
    for _ in range(number):
      task = asyncio.ensure_future(collect(engine, request(max_tokens=100)))
      await asyncio.sleep(float(rng.uniform(0, 0.08)))
      task.cancel()
      with contextlib.suppress(asyncio.CancelledError):
        await task

  async def work():
    engine = await three.connect(sequences=8, step_s=10.0)
    whole = await collect(engine, request(max_tokens=8))
    await asyncio.gather(steady(engine, whole, 25), churn(engine, 25), churn(engine, 25))
    for address in three.addresses:
      assert await open_sequences(address) == 0
    await engine.close()

  run(work())


def test_a_request_that_waits_when_its_engine_is_closed_is_told(three: Cluster):
  async def work():
    engine = await three.connect()
    stream = engine.generate(request(max_tokens=200))
    await anext(stream)
    waiting = asyncio.ensure_future(collect(engine, request(max_tokens=200)))
    await asyncio.sleep(0.05)
    began_s = time.monotonic()
    await engine.close()
    with pytest.raises(EngineError):
      await waiting
    with pytest.raises(EngineError):
      # What had come may still be read.
      while True:
        await anext(stream)
    assert time.monotonic() - began_s < 5
    with pytest.raises(EngineError, match="closed"):
      await collect(engine, request())
    await serves(three)

  run(work())


def test_a_model_file_that_was_replaced_is_not_vouched_for(tmp_path: Path):
  path = tinymodel.write(tmp_path / "model.gguf")
  server = Server(path, "old")
  try:
    address = server.address()
    path.unlink()
    tinymodel.write(path, seed=3)

    async def work():
      with open_model(path) as file:
        fleet = Fleet(hosts=(Host(address=address),))
        options = PipelineOptions(serving=Serving(context=64))
        with pytest.raises(EngineError, match="replaced, changed or removed"):
          await PipelineEngine.connect(file.config, file.sha256(), fleet, options)

    run(work())
  finally:
    server.end()


def test_a_model_file_overwritten_in_place_after_its_digest_is_not_loaded(tmp_path: Path):
  path = tinymodel.write(tmp_path / "model.gguf")
  other = tinymodel.write(tmp_path / "other.gguf", seed=3).read_bytes()
  server = Server(path, "old")
  try:
    address = server.address()

    async def work():
      with open_model(path) as file:
        sha256 = file.sha256()
        async with grpc.aio.insecure_channel(address) as channel:
          met = await rpc.StageStub(channel).Describe(pb.DescribeRequest(), timeout=10)
        assert met.identity.model_sha256 == sha256
        with path.open("r+b") as same:
          same.write(other)
        fleet = Fleet(hosts=(Host(address=address),))
        with pytest.raises(EngineError, match="replaced, changed or removed"):
          await PipelineEngine.connect(
            file.config, sha256, fleet, PipelineOptions(serving=Serving(context=64))
          )

    run(work())
  finally:
    server.end()


# ---- loading, planning, health


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"first_layer": 4, "last_layer": 2}, "no range"),
    ({"last_layer": 6}, "no range"),
    ({"weights": "int3"}, "choose one of dense, int8, w2a16, w2a8"),
    ({"max_sequences": 0}, "sequences = 0"),
    ({"cache": "int3"}, "choose one of auto, int8"),
    ({"prefix": (1 << 24) + 1}, "prefix = 16777217"),
    ({"dtype": "float8"}, "choose one of float32"),
    ({"programs": "fast"}, "choose one of auto, model, fused"),
    ({"programs": "quick"}, "choose one of auto, model, fused"),
    ({"programs": "fused"}, "fused programs cannot run this model: .* this is a cpu"),
    ({"context_length": 0}, "context = 0"),
    ({"context_length": 1 << 24, "max_sequences": 4096}, "are free"),
    ({"model_sha256": "0" * 64}, "model sha256"),
    ({"num_layers": 7}, "num layers is 6 here and 7 there"),
  ],
  ids=str,
)
def test_loads_that_cannot_be_are_refused(
  three: Cluster, tiny_path: Path, changes: dict, named: str
):
  async def work():
    with open_model(tiny_path) as file:
      identity = messages.identity(
        file.config, sha256=file.sha256(), dtype="float32", context_length=64
      )
    load = pb.LoadRequest(
      identity=identity, first_layer=0, last_layer=2, weights="dense", max_sequences=1, cache="auto"
    )
    for name, value in changes.items():
      setattr(load.identity if hasattr(load.identity, name) else load, name, value)
    async with grpc.aio.insecure_channel(three.addresses[0]) as channel:
      with pytest.raises(grpc.aio.AioRpcError, match=named) as caught:
        await rpc.StageStub(channel).Load(load, timeout=30)
    assert caught.value.details().startswith("stage-0: ")
    await serves(three)

  run(work())


def test_layers_are_not_replaced_under_an_open_sequence(three: Cluster):
  async def work():
    engine = await three.connect()
    stream = engine.generate(request(max_tokens=100))
    await anext(stream)
    with pytest.raises(HandshakeError, match="1 sequences are open"):
      await three.connect(0, 1)
    await anext(stream)
    await stream.aclose()
    await engine.close()
    await serves(three, 0, 1)

  run(work())


def test_coordinators_with_other_plans_take_turns_and_never_get_each_others_layers(three: Cluster):
  """Each load voids what was agreed on older links: a stale plan must be loaded again, not run."""

  async def work():
    two, all_three = await three.connect(0, 1), await three.connect()
    whole = await collect(all_three, request())
    other_way = await three.connect(1, 0)
    for _ in range(2):
      for engine in (two, all_three, other_way):
        assert await collect(engine, request()) == whole
    for engine in (two, all_three, other_way):
      await engine.close()

  run(work())


def test_a_fleet_that_is_too_small_says_by_how_much(three: Cluster):
  async def work():
    hosts = tuple(Host(address=a, memory_bytes=100_000) for a in three.addresses[:2])
    with open_model(three.model) as file:
      options = PipelineOptions(serving=Serving(context=256))
      with pytest.raises(ValueError, match=r"too small.*[\d,]+ bytes more on 127"):
        await PipelineEngine.connect(file.config, file.sha256(), Fleet(hosts=hosts), options)
    await serves(three)

  run(work())


def test_health_tells_the_truth(tiny_path: Path):
  async def status(address: str, service: str) -> str:
    async with grpc.aio.insecure_channel(address) as channel:
      stub = health_pb2_grpc.HealthStub(channel)
      answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
      return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)

  async def work(servers: Cluster):
    address = servers.addresses[0]
    await asyncio.sleep(0.6)
    assert await status(address, "") == "SERVING"
    assert await status(address, SERVICE) == "NOT_SERVING", "no layers yet"
    engine = await servers.connect()
    await asyncio.sleep(0.6)
    assert await status(address, SERVICE) == "SERVING"
    await engine.close()

  with cluster(tiny_path, 1) as servers:
    run(work(servers))


# ---- processes


def test_a_server_ends_with_the_process_that_started_it(tiny_path: Path):
  server = Server(tiny_path, "child")
  try:
    server.address()
    assert server.process.stdin is not None
    server.process.stdin.close()
    assert server.process.wait(15) == 0
  finally:
    server.end()


def test_an_address_that_is_taken_is_said(three: Cluster):
  command = [sys.executable, "-m", "neurojax", "stage", "--model", three.model]
  done = subprocess.run(
    [*command, "--listen", three.addresses[0]],
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert done.returncode == 2
  assert f"cannot listen on {three.addresses[0]}" in done.stderr
  assert "add_port" not in done.stderr, "a line of gRPC's own"


def test_spans_are_whole_numbers_of_layers_for_any_fleet(three: Cluster):
  async def work():
    engine = await three.connect()
    spans = [placement.span for placement in engine.placements]
    await engine.close()
    assert spans[0].is_first and spans[-1].is_last
    assert all(b.first_layer == a.last_layer + 1 for a, b in itertools.pairwise(spans))
    assert isinstance(spans[0], Span)

  run(work())
