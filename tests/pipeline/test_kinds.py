"""Layers that keep a state which cannot be read again from an earlier position, over stage servers: beside
other sequences, after cancelled ones, and in chunks."""

import asyncio
from pathlib import Path

import pytest

from neurojax.config import Sampling
from neurojax.engine.api import Request, Token
from neurojax.engine.local import LocalEngine
from neurojax.files.load import load_span
from neurojax.files.open import open_model
from neurojax.stage.compile import CompiledStage
from tests.golden.families import recipe
from tests.pipeline.servers import cluster, collect, run

pytestmark = pytest.mark.optimized

PROMPT = recipe.tokens(96).tolist()
REQUESTS = [
  Request(prompt=PROMPT[:5], max_tokens=12, sampling=Sampling()),
  Request(prompt=PROMPT[3:100], max_tokens=9, sampling=Sampling(temperature=1.0, seed=4)),
  Request(prompt=PROMPT[50:51], max_tokens=12, sampling=Sampling(temperature=0.7, seed=5)),
]


def test_short_convolutions_over_servers_give_the_local_tokens(tmp_path: Path):
  path = recipe.write_folder(tmp_path / "lfm2", "lfm2")

  async def local() -> list[list[Token]]:
    with open_model(path) as file:
      engine = LocalEngine(CompiledStage(load_span(file), context_length=128, slots=4))
    return [await collect(engine, wanted) for wanted in REQUESTS]

  async def distributed() -> list[list[Token]]:
    engine = await servers.connect(context=128)
    # One that ends in the middle of its answer leaves nothing behind.
    stream = engine.generate(Request(prompt=PROMPT[:40], max_tokens=50, sampling=Sampling()))
    for _ in range(3):
      await anext(stream)
    await stream.aclose()
    found = await asyncio.gather(*(collect(engine, wanted) for wanted in REQUESTS))
    await engine.close()
    return list(found)

  alone = run(local())
  assert len({tuple(token.id for token in tokens) for tokens in alone}) == len(REQUESTS)
  with cluster(path, 2) as servers:
    # Equal as dataclasses: ids and log-probabilities to the last bit.
    assert run(distributed()) == alone
