"""The same tokens and bits: local or distributed, streamed or collected, alone or beside others."""

import asyncio
import functools
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from neurojax import count
from neurojax.config import ModelConfig, Sampling, Serving
from neurojax.count.serving import Load, layer_bytes, stage_working
from neurojax.engine.api import Scores, Token
from neurojax.engine.local import LocalEngine
from neurojax.files.dummy import write_dummy
from neurojax.files.load import load_span, ternary_matrices
from neurojax.files.open import open_model
from neurojax.plan.fleet import Fleet, Host
from neurojax.stage.compile import CompiledStage
from tests import tinymodel
from tests.pipeline.servers import (
  PROMPT,
  Cluster,
  cluster,
  collect,
  open_sequences,
  request,
  run,
)

pytestmark = pytest.mark.optimized

REQUESTS = {
  "greedy": request(),
  "sampled": request(sampling=Sampling(temperature=1.0, seed=11)),
  "filtered": request(
    sampling=Sampling(temperature=0.9, top_k=40, top_p=0.9, min_p=0.01, seed=2**40)
  ),
  "penalized": request(
    sampling=Sampling(repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.2)
  ),
  "long": request(
    prompt=(PROMPT * 12)[:150], sampling=Sampling(temperature=1.0, seed=3), top_logprobs=2
  ),
}


def local(
  path: Path, weights: str = "dense", dtype: str = "float32", *, context: int = 256
) -> LocalEngine:
  with open_model(path) as file:
    model = load_span(file, weights=weights, dtype=jnp.dtype(dtype))
  return LocalEngine(CompiledStage(model, context_length=context, slots=4))


@functools.cache
def answers(path: Path, **form: str) -> dict[str, list[Token]]:
  """What one process gives: it is the same for every cut that is compared with it."""

  async def work() -> dict[str, list[Token]]:
    engine = local(path, **form)
    return {name: await collect(engine, wanted) for name, wanted in REQUESTS.items()}

  return run(work())


@pytest.fixture(scope="module")
def alone(tiny_path: Path) -> dict[str, list[Token]]:
  """What one process gives."""
  found = answers(tiny_path, weights="dense")
  assert len({tuple(t.id for t in tokens) for tokens in found.values()}) == len(found), "all differ"
  return found


@pytest.mark.parametrize("stages", [2, 3])
def test_any_number_of_stages_gives_the_local_tokens(three: Cluster, alone, stages: int):
  async def work():
    engine = await three.connect(*range(stages))
    assert [len(p.span) for p in engine.placements] == [6 // stages] * stages
    found = {name: await collect(engine, wanted) for name, wanted in REQUESTS.items()}
    await engine.close()
    return found

  # Equal as dataclasses: ids, indices, reasons, and log-probabilities to the last bit.
  assert run(work()) == alone


@pytest.mark.parametrize("form", [{"weights": "int8"}, {"dtype": "bfloat16"}], ids=str)
def test_so_do_other_forms_of_weights_and_activations(three: Cluster, tiny_path: Path, form: dict):
  async def work():
    engine = await three.connect(**form)
    found = {name: await collect(engine, wanted) for name, wanted in REQUESTS.items()}
    await engine.close()
    return found

  assert run(work()) == answers(tiny_path, **form)


@pytest.fixture(scope="module")
def uneven(tiny_path: Path) -> Iterator[Cluster]:
  with cluster(tiny_path, 3) as servers:
    yield servers


@pytest.mark.parametrize("form", [{"weights": "int8"}, {"weights": "dense"}], ids=str)
def test_a_stage_of_a_single_layer_gives_the_same_bits(
  uneven: Cluster, tiny_path: Path, form: dict
):
  """A loop of one round is easily compiled into what surrounds it, with other roundings."""

  async def work(servers: Cluster):
    engine = await servers.connect(**form)
    assert [len(p.span) for p in engine.placements] == [1, 4, 1]
    found = {name: await collect(engine, wanted) for name, wanted in REQUESTS.items()}
    await engine.close()
    return found

  # Room for 10, 40 and 10 layers, beside what programs work in, the embedding and, at the other
  # end, norm and head.
  load = Load(serving=Serving(context=256, **form))
  layer = layer_bytes(tinymodel.CONFIG, load)
  working = stage_working(tinymodel.CONFIG, load)
  table = count.embedding_bytes(tinymodel.CONFIG, **load.form)
  end = table + 4 * tinymodel.CONFIG.model_dim + working.last
  room = {0: table + 10 * layer, 1: 40 * layer, 2: end + 10 * layer}
  room = {i: space + working.base for i, space in room.items()}
  uneven.fleet = lambda *_: Fleet(
    hosts=tuple(
      Host(address=uneven.addresses[i], memory_bytes=space, name=f"stage-{i}")
      for i, space in room.items()
    )
  )
  assert run(work(uneven)) == answers(tiny_path, **form)


@pytest.fixture(scope="module")
def ternary_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
  config = ModelConfig(
    vocab_size=300, model_dim=256, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=64,
    ffn_dim=512, context_length=512, rope_base=1e6, qk_norm=True,
  )  # fmt: skip
  path = tmp_path_factory.mktemp("ternary") / "tiny.gguf"
  write_dummy(path, config, "Q2_0 (group 128)")
  return path


@pytest.fixture(scope="module")
def ternary_servers(ternary_path: Path) -> Iterator[Cluster]:
  with cluster(ternary_path, 3) as servers:
    yield servers


@pytest.mark.parametrize("weights", ["w2a8", "w2a16"])
def test_packed_ternary_weights_give_the_same_bits_in_any_cut(
  ternary_servers: Cluster, ternary_path: Path, weights: str
):
  async def work(servers: Cluster) -> list[dict[str, list[Token]]]:
    found = []
    for stages in (2, 3):
      with open_model(ternary_path) as file:
        ternary = ternary_matrices(file)
      engine = await servers.connect(*range(stages), weights=weights, forms=ternary)
      found.append({name: await collect(engine, wanted) for name, wanted in REQUESTS.items()})
      await engine.close()
    return found

  found = run(work(ternary_servers))
  alone = answers(ternary_path, weights=weights)
  assert len({tuple(t.id for t in tokens) for tokens in alone.values()}) == len(alone), "all differ"
  assert found == [alone, alone]


BESIDE = [
  request(prompt=(PROMPT * 31)[:300], max_tokens=9, top_logprobs=3),
  request(sampling=Sampling(temperature=1.0, seed=11, min_tokens=5), stop_ids=frozenset(range(32))),
  REQUESTS["penalized"],
  request(
    prompt=(PROMPT * 31)[3:300],
    n=3,
    sampling=Sampling(temperature=0.8, top_p=0.9, seed=5, repetition_penalty=1.2),
    prompt_logprobs=1,
  ),
  request(max_tokens=30, sampling=Sampling(logit_bias={260: 4.0, 261: float("-inf")})),
]
SCORED = (PROMPT[::-1] * 31)[:300]


@pytest.fixture(scope="module")
def one_by_one(tiny_path: Path) -> tuple[list[list[Token]], Scores]:
  """What one process gives to each alone."""

  async def work() -> tuple[list[list[Token]], Scores]:
    engine = local(tiny_path, context=400)
    found = [await collect(engine, wanted) for wanted in BESIDE]
    scores = await engine.score(SCORED, first=7, top=4)
    await engine.close()
    return [by_answer(tokens) for tokens in found], scores

  return run(work())


def by_answer(tokens: list[Token]) -> list[Token]:
  return sorted(tokens, key=lambda token: (token.answer, token.index))


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_requests_beside_each_other_get_the_local_bits(three: Cluster, one_by_one, stages: int):
  """Greedy and seeded, with penalties, biases, several answers of one long prompt and a text to score: more
  than there are slots. One that is given up leaves its slot on every stage."""

  async def work():
    engine = await three.connect(*range(stages), context=400)
    given_up = engine.generate(request(prompt=PROMPT * 3, max_tokens=200))
    await anext(given_up)

    async def leave() -> None:
      for _ in range(3):
        await anext(given_up)
      await given_up.aclose()

    *found, scores, _ = await asyncio.gather(
      *(collect(engine, wanted) for wanted in BESIDE),
      engine.score(SCORED, first=7, top=4),
      leave(),
    )
    for address in three.addresses[:stages]:
      assert await open_sequences(address) == 0
    load = engine.load()
    await engine.close()
    return [by_answer(tokens) for tokens in found], scores, load

  found, scores, load = run(work())
  alone, local_scores = one_by_one
  assert found == alone
  assert [t.prompt_scores is None for t in found[3]] == [t.prompt_scores is None for t in alone[3]]
  _same_scores(found[3][0].prompt_scores, alone[3][0].prompt_scores)
  _same_scores(scores, local_scores)
  assert load.running == load.queued == 0 and load.refused == 0


def _same_scores(found: Scores, wanted: Scores) -> None:
  np.testing.assert_array_equal(found.logprobs, wanted.logprobs)
  np.testing.assert_array_equal(found.tops.ids, wanted.tops.ids)
  np.testing.assert_array_equal(found.tops.logprobs, wanted.tops.logprobs)


def test_scores_equal_the_local_ones_and_the_answers_own_logprobs(
  three: Cluster, tiny_path: Path, alone
):
  tokens = [*REQUESTS["long"].prompt, *(t.id for t in alone["long"])]
  first = len(REQUESTS["long"].prompt)

  async def work():
    engine = await three.connect()
    far = await engine.score(tokens, first=first)
    every = await engine.score(tokens)
    await engine.close()
    near = await local(tiny_path).score(tokens, first=first)
    return far, every, near

  far, every, near = run(work())
  far, every, near = (scores.logprobs for scores in (far, every, near))
  assert (far == near).all() and (every[first - 1 :] == far).all()
  assert len(every) == len(tokens) - 1
  np.testing.assert_allclose(far, [t.logprob for t in alone["long"]], atol=2e-5)


def test_stop_ids_and_lengths(three: Cluster, alone):
  greedy = alone["greedy"]
  stop = greedy[5].id
  first = next(i for i, token in enumerate(greedy) if token.id == stop)

  async def work():
    engine = await three.connect(0, 1)
    stopped = await collect(engine, request(stop_ids=frozenset([stop])))
    one = await collect(engine, request(max_tokens=1))
    await engine.close()
    return stopped, one

  stopped, one = run(work())
  assert [t.id for t in stopped] == [t.id for t in greedy[: first + 1]]
  assert stopped[-1].finish_reason == "stop" and {t.finish_reason for t in stopped[:-1]} <= {None}
  assert [(t.id, t.finish_reason) for t in one] == [(greedy[0].id, "length")]


def test_reports_name_every_stage(three: Cluster):
  async def work():
    engine = await three.connect()
    await collect(engine, request())
    reports = await engine.reports()
    back_s = engine.return_s
    await engine.close()
    return reports, back_s

  reports, back_s = run(work())
  assert [(r.first_layer, r.last_layer) for r in reports] == [(0, 1), (2, 3), (4, 5)]
  assert [r.host for r in reports] == ["stage-0", "stage-1", "stage-2"]
  assert all(r.decode_steps == 23 and r.step_s > 0 and r.wire_s is not None for r in reports)
  assert back_s is not None and all(r.weight_bytes > 0 and r.cache_bytes > 0 for r in reports)
