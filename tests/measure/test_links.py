import asyncio
import contextlib
import dataclasses
import json
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest

from neurojax.cli import main
from neurojax.cli.probe import _print
from neurojax.config import to_toml
from neurojax.files.open import open_model
from neurojax.measure.machine import links
from neurojax.pipeline import pipeline_pb2 as pb
from neurojax.pipeline import pipeline_pb2_grpc as rpc
from neurojax.pipeline.errors import StageLost
from neurojax.pipeline.server import StageServer
from neurojax.plan.fleet import DecodeRates, Device, Fleet, Host, read_fleet
from neurojax.wire.channel import open_channel
from tests.pipeline.servers import run


@contextlib.asynccontextmanager
async def serving(path: Path) -> AsyncIterator[str]:
  stop, address = asyncio.Event(), asyncio.get_running_loop().create_future()
  with open_model(path) as file:
    server = StageServer(file, name="peer")
    work = server.serve("127.0.0.1:0", started=address.set_result, stop=stop)
    task = asyncio.create_task(work)
    try:
      yield await address
    finally:
      stop.set()
      await task


@pytest.fixture(scope="module")
def peer(tiny_path: Path) -> Iterator[str]:
  """Address of a stage server in a thread of this process."""
  started, ended = threading.Event(), threading.Event()
  found = []

  async def serve() -> None:
    async with serving(tiny_path) as address:
      found.append(address)
      started.set()
      await asyncio.to_thread(ended.wait)

  thread = threading.Thread(target=lambda: asyncio.run(serve()))
  thread.start()
  assert started.wait(60)
  yield found[0]
  ended.set()
  thread.join()


def test_a_stage_server_is_met(tiny_path: Path):
  async def work() -> links.Peer:
    async with serving(tiny_path) as address:
      met = await links.meet(address, seconds=0.1)
      assert met.address == address
      return met

  met = run(work())
  assert met.name == "peer" and met.device and met.memory_bytes > 1 << 20
  assert 1e-6 < met.link.latency_s < 1 and 1e5 < met.link.bytes_per_s < 1e12


def test_loopback_is_measured_with_another_process():
  local = run(links.loopback(seconds=0.1))
  assert 1e-6 < local.latency_s < 1 and 1e5 < local.bytes_per_s < 1e12


def test_echo_gives_back_what_it_gets_and_refuses_more_than_its_limit(tiny_path: Path):
  async def work() -> None:
    async with serving(tiny_path) as address, open_channel(address, limit=1 << 20) as channel:
      stub = rpc.StageStub(channel)
      for payload in (b"", b"abc", bytes(range(256)) * 256):
        assert (await stub.Echo(pb.EchoRequest(payload=payload))).payload == payload
      with pytest.raises(grpc.aio.AioRpcError, match="65536 at most"):
        await stub.Echo(pb.EchoRequest(payload=bytes(links.PAYLOAD + 1)))
      with pytest.raises(grpc.aio.AioRpcError, match=r"(?i)larger than max"):
        await stub.Echo(pb.EchoRequest(payload=bytes(1 << 19)))

  run(work())


def test_who_does_not_answer_is_named():
  with pytest.raises(StageLost, match=r"127.0.0.1:1: cannot be reached .*is `neurojax stage`"):
    run(links.meet("127.0.0.1:1"))
  with pytest.raises(ValueError, match="write host:port"):
    run(links.meet("nowhere"))


def test_a_server_without_echo_is_too_old():
  async def work() -> None:
    server = grpc.aio.server()
    rpc.add_StageServicer_to_server(rpc.StageServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
      with pytest.raises(StageLost, match="does not answer Echo"):
        await links.meet(f"127.0.0.1:{port}")
    finally:
      await server.stop(None)

  run(work())


def test_probe_writes_a_fleet_that_reads_back(capsys, tmp_path: Path, peer: str):
  theirs = Host(name="peer", devices=(Device(kind="cuda", memory_bytes=1 << 33),))
  other, out = tmp_path / "other.toml", tmp_path / "fleet.toml"
  other.write_text(to_toml(Fleet(hosts=(theirs,))))
  arguments = ("--name", "here", "--quick", "--peers", peer, "--add", str(other), "--json")
  assert main(["probe", *arguments, "--out", str(out)]) == 0
  out_text, err_text = capsys.readouterr()
  printed = json.loads(out_text)
  for said in (f"link to {peer}: ", "CPUs: reading memory", "CPUs: decoding: round 1 of at most 1"):
    assert said in err_text
  fleet = read_fleet(str(out))
  assert out.read_text().startswith("# neurojax probe")
  assert [host.label for host in fleet.hosts] == ["here", "peer"] and fleet.coordinator == "here"
  assert printed["hosts"][1]["address"] == fleet.hosts[1].address == peer
  assert fleet.hosts[1].devices == theirs.devices and fleet.hosts[1].memory_bytes is None
  [device] = fleet.hosts[0].devices
  assert device.kind == "cpu" and (device.decode_rate("w2a8") or 0) > 0
  [between] = fleet.links
  assert between.hosts == ("here", "peer") and between.latency_s > 0
  assert fleet.local_latency_s > 0
  assert [place.label for place in fleet.places()] == ["here", "peer"]


def test_probe_shows_every_form_that_it_measures(capsys):
  rates = DecodeRates(dense=1e9, int8=2e9, w2a16=3e9, w2a8=4e9)
  device = Device(kind="cpu", memory_bytes=1 << 33, used_bytes=0, decode_bytes_per_s=rates)
  _print(Fleet(hosts=(Host(name="here", devices=(device,)),)))
  printed = capsys.readouterr().out
  for field in dataclasses.fields(DecodeRates):
    line = next(line for line in printed.splitlines() if f"decode {field.name}, GB/s" in line)
    assert f"{getattr(rates, field.name) / 1e9:.1f}" in line


def test_probe_refuses_before_it_measures(capsys, tmp_path: Path):
  for arguments, wanted in (
    (["--peers", "nowhere"], "write host:port"),
    (["--listen-address", "x"], "write host:port"),
    (["--out", str(tmp_path / "fleet.txt")], "ends in .toml"),
    (["--add", str(tmp_path / "none.toml")], "none.toml"),
  ):
    assert main(["probe", *arguments]) == 2
    assert wanted in capsys.readouterr().err
  assert main(["probe", "--peers", "127.0.0.1:1"]) == 3
  assert "cannot be reached" in capsys.readouterr().err


def test_probe_has_help_with_an_example(capsys):
  with pytest.raises(SystemExit):
    main(["probe", "--help"])
  assert "Example: neurojax probe" in " ".join(capsys.readouterr().out.split())
