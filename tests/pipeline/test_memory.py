"""One process, a coordinator and a stage server give the same verdict on the same free memory."""

import asyncio
from pathlib import Path

import pytest

from neurojax.cli.options import EngineOptions, open_engine
from neurojax.config import Serving, Span
from neurojax.count.serving import Load, stage_bytes, stage_working
from neurojax.files.open import open_model
from neurojax.pipeline import messages
from neurojax.pipeline.coordinator import PipelineEngine, PipelineOptions
from neurojax.pipeline.device import DeviceThread
from neurojax.pipeline.loading import Loader, Refused
from neurojax.pipeline.server import StageServer
from neurojax.plan.fleet import Fleet, Host
from tests.golden.families import recipe
from tests.pipeline.servers import run

SERVING = Serving(dtype="bfloat16", weights="dense", context=64, sequences=2, prefix=600)


def in_one_process(path: Path, free_bytes: int) -> bool:
  async def work() -> None:
    options = EngineOptions(dtype="bfloat16", weights="dense", context=64, sequences=2, prefix=600)
    with open_model(path) as file:
      async with open_engine(file, options):
        pass

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("neurojax.stage.memory.free_memory_bytes", lambda *_: free_bytes)
    try:
      run(work())
    except ValueError as error:
      assert "too small" in str(error)
      return False
  return True


def by_a_coordinator(path: Path, free_bytes: int) -> bool:
  async def work() -> None:
    stop, address = asyncio.Event(), asyncio.get_running_loop().create_future()
    with open_model(path) as file:
      server = StageServer(file, name="one", memory_bytes=free_bytes)
      serving = asyncio.create_task(
        server.serve("127.0.0.1:0", started=address.set_result, stop=stop)
      )
      try:
        hosts = Fleet(hosts=(Host(address=await address),))
        engine = await PipelineEngine.connect(
          file.config, file.sha256(), hosts, PipelineOptions(serving=SERVING)
        )
        await engine.close()
      finally:
        stop.set()
        await serving

  try:
    run(work())
  except ValueError as error:
    assert "too small" in str(error)
    return False
  return True


def by_a_stage_server(path: Path, free_bytes: int) -> bool:
  async def work() -> None:
    with open_model(path) as file:
      thread = DeviceThread()
      loader = Loader(file, thread, name="one", memory_bytes=free_bytes)
      identity = messages.identity(
        file.config, sha256=file.sha256(), dtype="bfloat16", context_length=64
      )
      wish = await loader.check(messages.load_request(identity, Span.whole(file.config), SERVING))
      assert wish is not None
      await loader.load(wish)
      thread.end()

  try:
    run(work())
  except Refused as refusal:
    assert "are free" in str(refusal)
    return False
  return True


@pytest.mark.parametrize("family", ["one kind of layer", "two kinds of layers"])
def test_the_three_doors_agree_to_the_byte(family: str, tiny_path: Path, tmp_path: Path):
  path = tiny_path if family == "one kind of layer" else recipe.write_folder(tmp_path / "m", "lfm2")
  with open_model(path) as file:
    config = file.config
  load = Load(serving=SERVING)
  needed = stage_bytes(config, Span.whole(config), load, "cpu")
  assert stage_working(config, load, "cpu").base > 0
  for door in (in_one_process, by_a_coordinator, by_a_stage_server):
    assert not door(path, needed - 1), door
    assert door(path, needed), door
