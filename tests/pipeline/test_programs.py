"""Stages that run the fused programs, alone and beside hosts that cannot."""

import asyncio
import contextlib
import logging
from pathlib import Path

import jax.numpy as jnp
import pytest

from neurojax.config import ModelConfig, Sampling, Serving
from neurojax.engine.api import Token
from neurojax.engine.local import LocalEngine
from neurojax.files.dummy import write_dummy
from neurojax.files.load import load_span, ternary_matrices
from neurojax.files.open import open_model
from neurojax.model.neurollm import NeuroLLM
from neurojax.pipeline.coordinator import PipelineEngine, PipelineOptions
from neurojax.pipeline.errors import HandshakeError
from neurojax.pipeline.loading import Loader
from neurojax.pipeline.server import StageServer
from neurojax.plan.fleet import Fleet, Host
from neurojax.stage.compile import CompiledStage
from neurojax.stage.kernels import REFERENCE
from tests.pipeline.servers import collect, request, run

pytestmark = pytest.mark.optimized

CONFIG = ModelConfig(
  vocab_size=300, model_dim=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32,
  ffn_dim=384, context_length=128, qk_norm=True,
)  # fmt: skip
CONTEXT = 64
REQUEST = request(max_tokens=6, sampling=Sampling(temperature=1.0, seed=5))


class FusingLoader(Loader):
  def why_not_fused(self, dtype: str) -> None:
    return None

  def compile(self, model: NeuroLLM, serving: Serving, programs: str) -> CompiledStage:
    return compiled(model, "fused" if programs == "auto" else programs)


class Fusing(StageServer):
  """Its device runs fused programs, by reference kernels."""

  loader_type = FusingLoader


def compiled(model: NeuroLLM, programs: str) -> CompiledStage:
  kernels = REFERENCE if programs == "fused" else None
  return CompiledStage(model, context_length=CONTEXT, programs=programs, kernels=kernels)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
  path = tmp_path_factory.mktemp("ternary") / "tiny.gguf"
  write_dummy(path, CONFIG, "Q2_0 (group 64)")
  return path


@contextlib.asynccontextmanager
async def fleet(path: Path, *kinds: type[StageServer]):
  """Servers of these kinds in this process."""
  stop, hosts, serving = asyncio.Event(), [], []
  with open_model(path) as file:
    for index, kind in enumerate(kinds):
      address = asyncio.get_running_loop().create_future()
      server = kind(file, name=f"stage-{index}", share=2 * len(kinds))
      serve = server.serve("127.0.0.1:0", started=address.set_result, stop=stop)
      serving.append(asyncio.create_task(serve))
      hosts.append(Host(name=f"stage-{index}", address=await address))
    try:
      yield Fleet(hosts=tuple(hosts))
    finally:
      stop.set()
      await asyncio.gather(*serving)


async def connect(path: Path, hosts: Fleet, programs: str = "auto") -> PipelineEngine:
  with open_model(path) as file:
    options = PipelineOptions(
      serving=Serving(
        dtype="bfloat16", weights="w2a8", programs=programs, context=CONTEXT, sequences=1
      ),
      forms=ternary_matrices(file),
    )  # fmt: skip
    return await PipelineEngine.connect(file.config, file.sha256(), hosts, options)


async def alone(path: Path, programs: str) -> list[Token]:
  with open_model(path) as file:
    model = load_span(file, weights="w2a8", dtype=jnp.dtype("bfloat16"))
  engine = LocalEngine(compiled(model, programs))
  tokens = await collect(engine, REQUEST)
  await engine.close()
  return tokens


@pytest.mark.parametrize(
  "kinds", [(Fusing, Fusing), (StageServer, Fusing)], ids=["alike", "unlike"]
)
def test_stages_run_the_same_programs_and_give_the_local_bits(path: Path, kinds, caplog):
  programs = "fused" if kinds[0] is Fusing else "model"

  async def work():
    async with fleet(path, *kinds) as hosts:
      engine = await connect(path, hosts)
      assert [stage.description.identity.programs for stage in engine.stages] == [programs] * 2
      found = await collect(engine, REQUEST)
      await engine.close()
    return found, await alone(path, programs)

  caplog.set_level(logging.WARNING, "neurojax.pipeline")
  found, wanted = run(work())
  assert found == wanted
  warned = [r.getMessage() for r in caplog.records if "so none does" in r.getMessage()]
  if programs == "fused":
    assert warned == []
  else:
    assert len(warned) == 1 and "stage-0" in warned[0] and "layers 1..1 of 2): fused" in warned[0]


@pytest.mark.parametrize(
  "kinds,first",
  [((StageServer, Fusing), "auto"), ((StageServer, StageServer), "model")],
  ids=["unlike", "alike"],
)
def test_who_asks_next_shares_the_load(path: Path, kinds, first: str):
  async def work():
    async with fleet(path, *kinds) as hosts:
      one = await connect(path, hosts, first)
      tokens = one.generate(REQUEST)
      begun = await anext(tokens)
      # A stage with an open sequence refuses to load anything else.
      other = await connect(path, hosts, "auto")
      rest = [token async for token in tokens]
      await other.close()
      await one.close()
    return [begun, *rest]

  assert run(work()) == run(alone(path, "model"))


def test_a_stage_that_cannot_do_what_is_insisted_on_is_named(path: Path):
  async def work():
    async with fleet(path, Fusing, StageServer) as hosts:
      with pytest.raises(HandshakeError, match=r"stage-1.*fused programs cannot run.*is a cpu"):
        await connect(path, hosts, "fused")

  run(work())
