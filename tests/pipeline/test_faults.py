"""What goes wrong ends in an error that names the stage, in time; and the next request is served."""

import asyncio
import contextlib
import itertools
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from neurojax.config import Sampling, Serving, Span
from neurojax.engine.api import EngineError
from neurojax.files.open import open_model
from neurojax.pipeline import messages
from neurojax.pipeline import pipeline_pb2 as pb
from neurojax.pipeline import pipeline_pb2_grpc as rpc
from neurojax.pipeline.coordinator import PipelineEngine, PipelineOptions
from neurojax.pipeline.errors import (
  HandshakeError,
  ProtocolError,
  StageFailed,
  StageLost,
  StageTimeout,
)
from neurojax.pipeline.server import SERVICE
from neurojax.plan.fleet import Fleet, Host
from neurojax.stage.step import StepInput
from neurojax.wire.identity import PACKAGE
from tests import tinymodel
from tests.pipeline.servers import PROMPT, Cluster, Server, cluster, collect, request, run


async def serves(three: Cluster, *indices: int) -> None:
  """A fresh coordinator gets a whole answer, and nothing of it stays behind."""
  engine = await three.connect(*indices)
  assert len(await collect(engine, request(max_tokens=4))) == 4
  for index in indices or range(3):
    assert await open_sequences(three.addresses[index]) == 0
  await engine.close()


async def open_sequences(address: str) -> int:
  async with grpc.aio.insecure_channel(address) as channel:
    for _ in range(50):
      description = await rpc.StageStub(channel).Describe(pb.DescribeRequest(), timeout=5)
      if description.open_sequences == 0:
        break
      await asyncio.sleep(0.1)
  return description.open_sequences


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


# ---- bytes that no client sends


def test_garbage_bytes_on_the_socket(three: Cluster):
  rng = np.random.default_rng(0)
  for size in (1, 100, 100_000):
    raw = socket.create_connection(_pair(three.addresses[1]), timeout=2)
    with raw, contextlib.suppress(ConnectionError, TimeoutError):
      raw.sendall(rng.bytes(size))
      while raw.recv(4096):
        pass
  run(serves(three))


def test_a_length_prefix_of_one_gib_is_refused_without_memory_for_it(three: Cluster):
  server = three.servers[1]
  before = server.resident_bytes()
  with socket.create_connection(_pair(three.addresses[1]), timeout=10) as raw:
    raw.sendall(_http2_call(f"/{SERVICE}/Link") + _http2_data(b"\0" + struct.pack(">I", 1 << 30)))
    raw.settimeout(10)
    received = b""
    while b"grpc-status" not in received:
      part = raw.recv(65536)
      assert part, f"closed without a status: {received!r}"
      received += part
  assert b"larger than max" in received
  assert server.resident_bytes() - before < 1 << 27
  run(serves(three))


@pytest.mark.parametrize(
  "junk", [b"\xff" * 64, b"", b"\x0a\xff\xff\xff\xff\x0f", bytes(range(256))], ids=len
)
def test_messages_that_are_no_frames(three: Cluster, junk: bytes):
  async def work():
    async with grpc.aio.insecure_channel(three.addresses[0]) as channel:
      call = channel.stream_stream(f"/{SERVICE}/Link")(timeout=10)
      await call.write(junk)
      with pytest.raises(grpc.aio.AioRpcError) as caught:
        assert await call.read() is not grpc.aio.EOF
        await call.read()
        raise AssertionError("it was taken")
      assert caught.value.code() in (
        grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INVALID_ARGUMENT,
      )  # fmt: skip
      load = channel.unary_unary(f"/{SERVICE}/Load")
      with pytest.raises(grpc.aio.AioRpcError):
        await load(junk, timeout=10)
    await serves(three)

  run(work())


# ---- peers that do not fit


def _hello(engine: PipelineEngine, index: int, **changes: object) -> pb.Hello:
  span = engine.placements[index].span
  hello = pb.Hello(
    identity=engine.stages.identity,
    name="test",
    your_first_layer=span.first_layer,
    your_last_layer=span.last_layer,
  )
  for name, value in changes.items():
    setattr(hello.identity if hasattr(hello.identity, name) else hello, name, value)
  return hello


async def _link(
  address: str, hello: pb.Hello
) -> tuple[grpc.aio.Channel, grpc.aio.StreamStreamCall]:
  channel = grpc.aio.insecure_channel(address)
  call = rpc.StageStub(channel).Link(timeout=30)
  await call.write(pb.Frame(hello=hello))
  return channel, call


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"protocol": 99}, f"protocol is {messages.PROTOCOL} here and 99 there"),
    ({"package": "0.0.0"}, f"package is {PACKAGE} here and 0.0.0 there"),
    ({"model_sha256": "f" * 64}, "model sha256 is .* here and ffffffffffff there"),
    ({"dtype": "bfloat16"}, "dtype is float32 here and bfloat16 there"),
    ({"context_length": 7}, "context length is 256 here and 7 there"),
    ({"programs": "fused"}, "programs is model here and fused there"),
    ({"your_first_layer": 1}, r"layers are 2\.\.3 here, the sender expects 1\.\.3"),
    ({"has_layers": True, "last_layer": 4}, "do not follow"),
  ],
  ids=lambda value: str(value)[:24],
)
def test_a_hello_that_does_not_fit_is_refused_with_both_sides_named(
  three: Cluster, changes: dict, named: str
):
  async def work():
    engine = await three.connect()
    channel, call = await _link(three.addresses[1], _hello(engine, 1, **changes))
    with pytest.raises(grpc.aio.AioRpcError, match=named) as caught:
      await call.read()
      await call.read()
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "stage-1 refuses test" in (caught.value.details() or "")
    await channel.close()
    await engine.close()
    await serves(three)

  run(work())


def test_a_coordinator_refuses_a_stage_of_another_version(tiny_path: Path):
  class Old(rpc.StageServicer):
    async def Describe(self, request, context):
      identity = pb.Identity(
        protocol=messages.PROTOCOL, package="0.0.9", model_sha256="a" * 64, num_layers=6
      )
      return pb.Description(
        name="old", identity=identity, memory_bytes=1 << 30, clock_s=time.time()
      )

  async def work():
    server = grpc.aio.server()
    rpc.add_StageServicer_to_server(Old(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    fleet = Fleet(hosts=(Host(address=f"127.0.0.1:{port}"),))
    with pytest.raises(HandshakeError, match=rf"old.*package is {PACKAGE} here and 0\.0\.9 there"):
      await PipelineEngine.connect(
        tinymodel.CONFIG, "a" * 64, fleet, PipelineOptions(serving=Serving(context=64))
      )
    await server.stop(0)

  run(work())


class Liar(rpc.StageServicer):
  """A stage that holds all layers and answers each step with what `lie` makes of the true outcome."""

  def __init__(self, lie):
    self.lie = lie

  async def Describe(self, request, context):
    identity = messages.identity(
      tinymodel.CONFIG, sha256="a" * 64, dtype="float32", context_length=64, programs="model"
    )
    return pb.Description(
      name="liar", identity=identity, memory_bytes=1 << 40, clock_s=time.time(), device="cpu"
    )

  async def Load(self, request, context):
    return await self.Describe(None, context)

  async def Link(self, frames, context):
    async for frame in frames:
      kind = frame.WhichOneof("body")
      if kind == "hello":
        yield pb.Frame(hello=pb.Hello(name="liar"))
      elif kind == "open":
        yield pb.Frame(opened=pb.Opened(sequence=frame.open.sequence))
      elif kind == "step":
        name, index = frame.step.sequence, frame.step.index
        outcome = pb.Outcome(sequence=name, index=index, sampled=True, token=1, logprob=-1.0)
        for answer in self.lie(outcome):
          yield answer


def _but(outcome: pb.Outcome, **changes: object) -> pb.Frame:
  for name, value in changes.items():
    setattr(outcome, name, value)
  return pb.Frame(outcome=outcome)


LIES = {
  "a later step": (lambda o: [_but(o, index=o.index + 1)], "answered step 1 where step 0 is due"),
  "a much later step": (lambda o: [_but(o, index=2**32 - 1)], "answered step 4294967295 where"),
  "a step twice": (lambda o: [_but(o), _but(o)], "answered step 0 where (none|step 1) is due"),
  "opened twice": (lambda o: [pb.Frame(opened=pb.Opened(sequence=o.sequence))], "opened .* twice"),
  "nothing drawn": (lambda o: [_but(o, sampled=False)], "something that was not asked"),
  "a foreign token": (lambda o: [_but(o, token=1 << 20)], "answered token 1048576"),
  "no number": (lambda o: [_but(o, logprob=float("nan"))], "log-probability nan"),
}


@pytest.mark.parametrize("lie", LIES)
def test_answers_that_the_protocol_does_not_allow_are_named(lie: str):
  answer, named = LIES[lie]

  async def work():
    server = grpc.aio.server()
    rpc.add_StageServicer_to_server(Liar(answer), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    fleet = Fleet(hosts=(Host(address=f"127.0.0.1:{port}"),))
    options = PipelineOptions(
      serving=Serving(context=64, sequences=1, weights="dense"), step_s=10.0
    )
    engine = await PipelineEngine.connect(tinymodel.CONFIG, "a" * 64, fleet, options)
    with pytest.raises(ProtocolError, match=rf"liar at 127.*layers 0\.\.5.*{named}"):
      await collect(engine, request(max_tokens=3))
    await engine.close()
    await server.stop(0)

  run(work())


def test_text_of_a_stage_is_printed_without_its_control_characters():
  def fail(outcome: pb.Outcome):
    message = "\x1b[2Jgone\nstage-0: all is well"
    yield pb.Frame(failure=pb.Failure(sequence=outcome.sequence, kind="invalid", message=message))

  async def work():
    server = grpc.aio.server()
    rpc.add_StageServicer_to_server(Liar(fail), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    fleet = Fleet(hosts=(Host(address=f"127.0.0.1:{port}"),))
    options = PipelineOptions(serving=Serving(context=64, sequences=1, weights="dense"))
    engine = await PipelineEngine.connect(tinymodel.CONFIG, "a" * 64, fleet, options)
    with pytest.raises(StageFailed) as caught:
      await collect(engine, request(max_tokens=3))
    assert str(caught.value).isprintable() and r"\x1b[2Jgone\nstage-0" in str(caught.value)
    await engine.close()
    await server.stop(0)

  run(work())


def test_stages_with_another_model_file_are_refused(three: Cluster, tmp_path: Path):
  other = tinymodel.write(tmp_path / "other.gguf", seed=5)

  async def work():
    with pytest.raises(HandshakeError, match="model sha256 is"):
      await three.connect(model=other)
    await serves(three)

  run(work())


# ---- steps that do not fit


def _step(sequence: str, given: StepInput, index: int = 0, **changes: object) -> pb.Frame:
  message = messages.step(sequence, index, given)
  for name, value in changes.items():
    if "__" in name:
      outer, inner = name.split("__")
      target = getattr(message, outer)
      if inner == "shape":
        del target.shape[:]
        target.shape.extend(value)
      else:
        setattr(target, inner, value)
    else:
      setattr(message, name, value)
  return pb.Frame(step=message)


TOKENS = np.array(PROMPT[:3], np.int32)
HIDDEN = np.ones((3, 32), np.float32)
BAD_STEPS = {
  "nan": (StepInput(start=0, tokens=TOKENS, hidden=np.full_like(HIDDEN, np.nan)), {}, "NaN or infinite"),
  "infinite": (StepInput(start=0, tokens=TOKENS, hidden=HIDDEN * np.float32(np.inf)), {}, "NaN or infinite"),
  "wrong width": (StepInput(start=0, tokens=TOKENS, hidden=HIDDEN[:, :31]), {}, r"expected float32\[3, 32\]"),
  "wrong rows": (StepInput(start=0, tokens=TOKENS, hidden=HIDDEN[:2]), {}, "expected float32"),
  "wrong dtype": (StepInput(start=0, tokens=TOKENS, hidden=HIDDEN.astype(np.float16)), {}, "expected float32"),
  "no activations": (StepInput(start=0, tokens=TOKENS), {}, "no activations"),
  "wrong start": (StepInput(start=5, tokens=TOKENS, hidden=HIDDEN), {}, "stands at position 0"),
  "wrong index": (StepInput(start=0, tokens=TOKENS, hidden=HIDDEN), {"index": 3}, "step 3 came where step 0"),
  "foreign token": (StepInput(start=0, tokens=TOKENS + 9999, hidden=HIDDEN), {}, "outside the vocabulary"),
  "negative token": (StepInput(start=0, tokens=-TOKENS, hidden=HIDDEN), {}, "outside the vocabulary"),
  "shape lies": (StepInput(start=0, tokens=TOKENS, hidden=HIDDEN), {"hidden__shape": [1 << 31, 1 << 31]}, "takes"),
  "dtype lies": (StepInput(start=0, tokens=TOKENS, hidden=HIDDEN), {"hidden__dtype": "object"}, "unknown dtype"),
  "flipped bit": (StepInput(start=0, tokens=TOKENS, hidden=HIDDEN), {"hidden__crc32": 1}, "checksum"),
  "empty": (StepInput(start=0, tokens=TOKENS[:0], hidden=HIDDEN[:0]), {}, r"n > 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_STEPS)
def test_a_bad_step_fails_its_sequence_and_nothing_else(three: Cluster, case: str):
  """A stage before that lies: the last stage tells the owner of the sequence, by name."""
  given, changes, named = BAD_STEPS[case]

  async def work():
    engine = await three.connect()
    owner_channel, owner = await _link(three.addresses[2], _hello(engine, 2))
    assert (await owner.read()).WhichOneof("body") == "hello"
    await owner.write(pb.Frame(open=pb.Open(sequence="s", sampling=messages.sampling(Sampling()))))
    assert (await owner.read()).opened.sequence == "s"
    liar_hello = _hello(engine, 2, has_layers=True, first_layer=2, last_layer=3)
    liar_channel, liar = await _link(three.addresses[2], liar_hello)
    assert (await liar.read()).WhichOneof("body") == "hello"
    await liar.write(_step("s", given, **changes))
    failure = (await asyncio.wait_for(owner.read(), 10)).failure
    assert failure.sequence == "s" and failure.stage == "stage-2"
    assert failure.kind in ("invalid", "numeric")
    import re

    assert re.search(named, failure.message), failure.message
    # A step for a sequence that is gone is refused on the link that brought it.
    await liar.write(_step("s", given))
    assert "not open" in (await asyncio.wait_for(liar.read(), 10)).failure.message
    await liar_channel.close()
    await owner_channel.close()
    await engine.close()
    await serves(three)

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


def test_no_more_sequences_than_places(three: Cluster):
  async def work():
    engine = await three.connect(0, 1, sequences=2)
    first, second = (engine.generate(request(max_tokens=100)) for _ in range(2))
    await anext(first)
    await anext(second)
    with pytest.raises(StageFailed, match="all 2 sequence places are taken"):
      await collect(engine, request())
    await first.aclose()
    assert len(await collect(engine, request(max_tokens=3))) == 3
    await second.aclose()
    await engine.close()

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
    stream = engine.generate(request(max_tokens=100))
    await anext(stream)
    waiting = asyncio.ensure_future(collect(engine, request(max_tokens=200)))
    await asyncio.sleep(0.05)
    began_s = time.monotonic()
    await engine.close()
    with pytest.raises(EngineError):
      await waiting
    with pytest.raises(EngineError):
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
    ({"dtype": "float8"}, "choose one of float32"),
    ({"programs": "fast"}, "choose one of auto, model, fused"),
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
      identity=identity, first_layer=0, last_layer=2, weights="dense", max_sequences=1
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


# ---- HTTP/2 by hand


def _pair(address: str) -> tuple[str, int]:
  host, port = address.rsplit(":", 1)
  return host, int(port)


def _http2_frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
  return (
    struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload
  )


def _http2_call(path: str) -> bytes:
  """Preface, empty SETTINGS, and the HEADERS of a gRPC call; literal header fields, RFC 7541 6.2.2."""
  fields = {
    ":method": "POST", ":scheme": "http", ":path": path, ":authority": "test", "te": "trailers",
    "content-type": "application/grpc",
  }  # fmt: skip
  block = b"".join(
    b"\0" + bytes([len(k)]) + k.encode() + bytes([len(v)]) + v.encode() for k, v in fields.items()
  )
  preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
  return preface + _http2_frame(4, 0, 0, b"") + _http2_frame(1, 4, 1, block)


def _http2_data(payload: bytes) -> bytes:
  return _http2_frame(0, 0, 1, payload)
