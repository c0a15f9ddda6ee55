"""What no well-meaning peer sends is refused by name; and the next request is served."""

import asyncio
import contextlib
import re
import socket
import struct
import time
from pathlib import Path

import grpc
import numpy as np
import pytest

from neurojax.config import Sampling, Serving
from neurojax.pipeline import messages, rows
from neurojax.pipeline import pipeline_pb2 as pb
from neurojax.pipeline import pipeline_pb2_grpc as rpc
from neurojax.pipeline.coordinator import PipelineEngine, PipelineOptions
from neurojax.pipeline.errors import HandshakeError, ProtocolError, StageFailed
from neurojax.pipeline.server import SERVICE
from neurojax.plan.fleet import Fleet, Host
from neurojax.stage.step import Row, RowOutput
from neurojax.wire import tensor
from neurojax.wire.identity import PACKAGE
from tests import tinymodel
from tests.pipeline.servers import PROMPT, Cluster, collect, request, run, serves

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

  def __init__(self, lie, *, block: int = 64):
    self.lie, self.block = lie, block

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
        yield pb.Frame(hello=pb.Hello(name="liar", block=self.block))
      elif kind == "open":
        yield pb.Frame(opened=pb.Opened(sequence=frame.open.sequence))
      elif kind == "step":
        [row] = frame.step.rows
        output = RowOutput(tokens=np.array([1], np.int32), logprobs=np.array([-1], np.float32))
        for answer in self.lie(rows.outcome(row.sequence, row.index, output)):
          yield answer


def _but(outcome: pb.RowOutcome, **changes: object) -> pb.Frame:
  for name, value in changes.items():
    if isinstance(value, np.ndarray):
      getattr(outcome, name).CopyFrom(tensor.encode(value))
    elif value is None:
      outcome.ClearField(name)
    else:
      setattr(outcome, name, value)
  return pb.Frame(outcome=pb.Outcome(rows=[outcome]))


def _ids(*ids: int) -> np.ndarray:
  return np.array(ids, np.int32)


LIES = {
  "a later step": (lambda o: [_but(o, index=o.index + 1)], "answered step 1 where step 0 is due"),
  "a much later step": (lambda o: [_but(o, index=2**32 - 1)], "answered step 4294967295 where"),
  "a step twice": (lambda o: [_but(o), _but(o)], "answered step 0 where (none|step 1) is due"),
  "opened twice": (lambda o: [pb.Frame(opened=pb.Opened(sequence=o.sequence))], "opened .* twice"),
  "nothing drawn": (lambda o: [_but(o, tokens=None)], "something that was not asked"),
  "scores": (lambda o: [_but(o, scores=np.ones(1, np.float32))], "something that was not asked"),
  "two tokens": (lambda o: [_but(o, tokens=_ids(1, 2))], "2 tokens where 1 were asked for"),
  "a foreign token": (lambda o: [_but(o, tokens=_ids(1 << 20))], "answered token 1048576"),
  "a negative token": (lambda o: [_but(o, tokens=_ids(-1))], "answered token -1"),
  "no number": (lambda o: [_but(o, logprobs=np.full(1, np.nan, np.float32))], "log-probability nan"),
}  # fmt: skip


async def _believe(liar: Liar) -> None:
  """Generate with a liar as the only stage."""
  server = grpc.aio.server()
  rpc.add_StageServicer_to_server(liar, server)
  port = server.add_insecure_port("127.0.0.1:0")
  await server.start()
  fleet = Fleet(hosts=(Host(address=f"127.0.0.1:{port}"),))
  serving = Serving(context=64, sequences=1, weights="dense")
  options = PipelineOptions(serving=serving, step_s=10.0)
  try:
    engine = await PipelineEngine.connect(tinymodel.CONFIG, "a" * 64, fleet, options)
    try:
      await collect(engine, request(max_tokens=3))
    finally:
      await engine.close()
  finally:
    await server.stop(0)


@pytest.mark.parametrize("block", [0, 257])
def test_blocks_that_no_stage_has_are_refused(block: int):
  with pytest.raises(HandshakeError, match=f"liar .*blocks of {block}: 1 to 256"):
    run(_believe(Liar(None, block=block)))


@pytest.mark.parametrize("lie", LIES)
def test_answers_that_the_protocol_does_not_allow_are_named(lie: str):
  answer, named = LIES[lie]

  async def work():
    with pytest.raises(ProtocolError, match=rf"liar at 127.*layers 0\.\.5.*{named}"):
      await _believe(Liar(answer))

  run(work())


def test_text_of_a_stage_is_printed_without_its_control_characters():
  def fail(outcome: pb.RowOutcome):
    message = "\x1b[2Jgone\nstage-0: all is well"
    yield pb.Frame(failure=pb.Failure(sequence=outcome.sequence, kind="invalid", message=message))

  async def work():
    with pytest.raises(StageFailed) as caught:
      await _believe(Liar(fail))
    assert str(caught.value).isprintable() and r"\x1b[2Jgone\nstage-0" in str(caught.value)

  run(work())


def test_stages_with_another_model_file_are_refused(three: Cluster, tmp_path: Path):
  other = tinymodel.write(tmp_path / "other.gguf", seed=5)

  async def work():
    with pytest.raises(HandshakeError, match="model sha256 is"):
      await three.connect(model=other)
    await serves(three)

  run(work())


# ---- steps that do not fit


def _row(sequence: str, given: Row, index: int = 0, **changes: object) -> pb.Row:
  message = rows.row(sequence, index, given)
  for name, value in changes.items():
    if value is None:
      message.ClearField(name)
    elif "__" in name:
      outer, inner = name.split("__")
      target = getattr(message, outer)
      if inner == "shape":
        del target.shape[:]
        target.shape.extend(value)
      else:
        setattr(target, inner, value)
    else:
      setattr(message, name, value)
  return message


def _step(*given: pb.Row) -> pb.Frame:
  return pb.Frame(step=pb.Step(rows=given))


def _given(**changes: object) -> Row:
  return Row(**{"slot": 0, "start": 0, "tokens": TOKENS, "hidden": HIDDEN, **changes})


TOKENS = np.array(PROMPT[:3], np.int32)
HIDDEN = np.ones((3, 32), np.float32)
FLOATS = np.zeros(3, np.float32)
BAD_ROWS = {
  "nan": (_given(hidden=np.full_like(HIDDEN, np.nan)), {}, "NaN or infinite"),
  "infinite": (_given(hidden=HIDDEN * np.float32(np.inf)), {}, "NaN or infinite"),
  "wrong width": (_given(hidden=HIDDEN[:, :31]), {}, r"expected float32\[3, 32\]"),
  "wrong rows": (_given(hidden=HIDDEN[:2]), {}, "expected float32"),
  "wrong dtype": (_given(hidden=HIDDEN.astype(np.float16)), {}, "expected float32"),
  "no activations": (_given(hidden=None), {}, "no activations"),
  "no tokens": (_given(), {"tokens": None}, "without tokens"),
  "wrong start": (_given(start=5), {}, "stands at position 0"),
  "far start": (_given(), {"start": 2**32 - 1}, "stands at position 0"),
  "wrong index": (_given(), {"index": 3}, "step 3 came where step 0"),
  "foreign token": (_given(tokens=TOKENS + 9999), {}, "outside the vocabulary"),
  "negative token": (_given(tokens=-TOKENS), {}, "outside the vocabulary"),
  "shape lies": (_given(), {"hidden__shape": [1 << 31, 1 << 31]}, "takes"),
  "dtype lies": (_given(), {"hidden__dtype": "object"}, "unknown dtype"),
  "flipped bit": (_given(), {"hidden__crc32": 1}, "checksum"),
  "empty": (_given(tokens=TOKENS[:0], hidden=HIDDEN[:0]), {}, r"n > 0"),
  "no such role": (_given(), {"role": 7}, "role = 7"),
  "two draws": (_given(draws=2), {}, "draws = 2"),
  "many draws": (_given(), {"draws": 2**32 - 1}, "draws = 4294967295"),
  "many named": (_given(draws=1, top=21), {}, "top = 21: at most 20"),
  "targets": (_given(targets=FLOATS), {}, "targets: float32, expected int32"),
  "few targets": (_given(targets=TOKENS[:2]), {}, "2 targets for 3 tokens"),
  "seen": (_given(seen=TOKENS), {}, "3 tokens seen before position 0"),
  "a short mask": (_given(draws=1, allowed=np.zeros(1, np.uint32)), {}, "a bit for each token"),
  "a place": (_given(keep=(0,)), {}, "place 0 is not granted"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_fails_its_sequence_and_nothing_else(three: Cluster, case: str):
  """A stage before that lies: the last stage tells the owner of the sequence, by name. A good row in the
  same step is answered."""
  given, changes, named = BAD_ROWS[case]

  async def work():
    engine = await three.connect()
    owner_channel, owner = await _owner(three, engine, "bad", "good")
    liar_hello = _hello(engine, 2, has_layers=True, first_layer=2, last_layer=3)
    liar_channel, liar = await _link(three.addresses[2], liar_hello)
    assert (await liar.read()).WhichOneof("body") == "hello"
    await liar.write(_step(_row("bad", given, **changes), _row("good", _given(draws=1))))
    failure = (await asyncio.wait_for(owner.read(), 10)).failure
    assert failure.sequence == "bad" and failure.stage == "stage-2"
    assert failure.kind in ("invalid", "numeric")
    assert re.search(named, failure.message), failure.message
    [outcome] = (await asyncio.wait_for(owner.read(), 10)).outcome.rows
    assert (
      outcome.sequence == "good" and tensor.decode(outcome.tokens, what="", max_dims=1).size == 1
    )
    # A row for a sequence that is gone is refused on the link that brought it.
    await liar.write(_step(_row("bad", given)))
    assert "not open" in (await asyncio.wait_for(liar.read(), 10)).failure.message
    await liar_channel.close()
    await owner_channel.close()
    await engine.close()
    await serves(three)

  run(work())


async def _owner(
  three: Cluster, engine: PipelineEngine, *names: str, index: int = 2
) -> tuple[grpc.aio.Channel, grpc.aio.StreamStreamCall]:
  """A coordinator's link to a stage, on which sequences are open."""
  channel, call = await _link(three.addresses[index], _hello(engine, index))
  assert (await call.read()).WhichOneof("body") == "hello"
  for name in names:
    await call.write(pb.Frame(open=_open(engine, name, index)))
    assert (await call.read()).opened.sequence == name
  return channel, call


def _open(engine: PipelineEngine, name: str, index: int, **more: object) -> pb.Open:
  message = pb.Open(sequence=name, sampling=messages.sampling(Sampling()), **more)
  if index < 2:
    after = engine.stages[index + 1]
    message.next_address = after.host.address
    message.next_first_layer, message.next_last_layer = (
      after.span.first_layer,
      after.span.last_layer,
    )
  return message


def test_a_step_has_one_row_for_a_sequence_and_no_more_rows_than_sequences(three: Cluster):
  async def work():
    engine = await three.connect(sequences=3)
    owner_channel, owner = await _owner(three, engine, "a", "b")
    hello = _hello(engine, 2, has_layers=True, first_layer=2, last_layer=3)
    channel, call = await _link(three.addresses[2], hello)
    assert (await call.read()).WhichOneof("body") == "hello"
    twice = [_row("a", _given(draws=1)), _row("a", _given(draws=1), index=1)]
    await call.write(_step(*twice, _row("b", _given(draws=1))))
    assert "two rows" in (await owner.read()).failure.message
    assert [row.sequence for row in (await owner.read()).outcome.rows] == ["b"]
    await call.write(_step(*(_row(f"none-{i}", _given()) for i in range(4))))
    with pytest.raises(grpc.aio.AioRpcError, match="a step of 4 rows: 3 sequences have room"):
      while await call.read():
        pass
    await owner_channel.close()
    await channel.close()
    await engine.close()
    await serves(three)

  run(work())


def test_a_coordinator_cannot_touch_the_sequences_of_another(three: Cluster):
  """It knows the name, and yet can neither step, close nor copy what is not its own."""

  async def work():
    engine = await three.connect()
    channel, mine = await _owner(three, engine, "mine", index=0)
    other_channel, other = await _owner(three, engine, "other", index=0)
    row = _row("mine", _given(hidden=None))

    def opens(name: str, **more: object) -> pb.Frame:
      return pb.Frame(open=_open(engine, name, 0, **more))

    for frame, named in [
      (_step(row), "the sequence is not open here"),
      (opens("mine"), "'mine' is open already"),
      (opens("copy", copy_sequence="mine"), "to copy is not open here"),
      (opens("copy", copy_sequence="copy"), "to copy is not open here"),
    ]:
      await other.write(frame)
      assert named in (await asyncio.wait_for(other.read(), 10)).failure.message
    await other.write(pb.Frame(close=pb.Close(sequence="mine")))
    await other.write(_step(row))
    assert "not open" in (await asyncio.wait_for(other.read(), 10)).failure.message
    await mine.write(_step(row))
    assert [row.sequence for row in (await mine.read()).outcome.rows] == ["mine"]
    await channel.close()
    await other_channel.close()
    await engine.close()
    await serves(three)

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
