"""Predicted and simulated against real stage servers, with artificial delays between them."""

import asyncio
import contextlib
import time
from pathlib import Path

import pytest

from neurojax.config import Sampling, Serving
from neurojax.count.serving import Load
from neurojax.engine.api import Request
from neurojax.files.open import open_model
from neurojax.pipeline.coordinator import PipelineEngine, PipelineOptions
from neurojax.plan import best, predict
from neurojax.plan.fleet import Device, Fleet, Host, Link
from neurojax.plan.plan import Hop, Plan, Stage
from neurojax.plan.simulate import simulate
from tests import tinymodel
from tests.pipeline.servers import cluster
from tests.plan.proxy import delayed

DELAYS_S = (0.02, 0.03, 0.04)
TOKENS, AT_ONCE = 24, 3
PROMPT = [1, 260, 262, 261]


async def decode(engine: PipelineEngine, tokens: int) -> list[float]:
  """When each token of an answer came."""
  request = Request(prompt=PROMPT, max_tokens=tokens, sampling=Sampling())
  return [time.monotonic() async for _ in engine.generate(request)]


async def measured(model: Path, addresses: list[str]) -> tuple[list[float], float, float]:
  """Seconds of each stage's step, seconds per token alone, tokens per second of several at once."""
  async with contextlib.AsyncExitStack() as stack:
    hosts = []
    for number, (address, delay_s) in enumerate(zip(addresses, DELAYS_S, strict=True)):
      through = await stack.enter_async_context(delayed(address, delay_s))
      hosts.append(Host(name=f"stage-{number}", address=through))
    with open_model(model) as file:
      engine = await PipelineEngine.connect(
        file.config,
        file.sha256(),
        Fleet(hosts=tuple(hosts)),
        PipelineOptions(serving=Serving(context=256)),
      )
    stack.push_async_callback(engine.close)
    await decode(engine, 2)
    alone = await decode(engine, TOKENS)
    steps = [report.step_s for report in await engine.reports()]
    many = await asyncio.gather(*(decode(engine, TOKENS) for _ in range(AT_ONCE)))
    times = sorted(moment for moments in many for moment in moments)
    # Without the first fifth and the last, as the simulation reports it.
    low, high = len(times) // 5, len(times) - 1 - len(times) // 5
    rate = (high - low) / (times[high] - times[low])
    return steps, (alone[-1] - alone[0]) / (TOKENS - 1), rate


def timed(steps: list[float]) -> Plan:
  """A plan with measured stages and the delays. A message to a stage passes the proxy before it, and
  what the last stage answers passes its own back."""
  labels = [f"stage-{number}" for number in range(len(steps))]
  stages = [
    Stage(
      host=label,
      label=label,
      first_layer=2 * number,
      last_layer=2 * number + 1,
      memory_bytes=1,
      free_bytes=1,
      step_s=step_s,
      prefill_s=step_s,
    )
    for number, (label, step_s) in enumerate(zip(labels, steps, strict=True))
  ]
  ends = zip(["", *labels], [*labels, ""], [*DELAYS_S, DELAYS_S[-1]], strict=True)
  hops = [Hop(a=a, b=b, latency_s=d, transfer_s=0.0, prefill_s=0.0) for a, b, d in ends]
  return Plan(
    objective="latency",
    method="measured",
    stages=tuple(stages),
    hops=tuple(hops),
    batch=1,
    context=256,
    prefill_tokens=256,
  )


def test_a_real_pipeline_takes_the_predicted_time(tmp_path: Path):
  model = tinymodel.write(tmp_path / "tiny.gguf")
  with cluster(model, len(DELAYS_S)) as servers:
    work = measured(model, servers.addresses)
    steps, token_s, rate = asyncio.run(asyncio.wait_for(work, 120))
  made = timed(steps)
  assert token_s == pytest.approx(predict.pipeline_latency_s(made), rel=0.25)
  one = simulate(made, requests=1, concurrency=1, prompt=len(PROMPT), answer=TOKENS)
  assert token_s == pytest.approx(one.token_s.p50_s, rel=0.25)
  several = simulate(made, requests=AT_ONCE, concurrency=AT_ONCE, prompt=len(PROMPT), answer=TOKENS)
  assert rate == pytest.approx(several.steady_tokens_per_s, rel=0.25)
  # The delays are what is tested: without them it would be another number by far.
  assert sum(DELAYS_S) + DELAYS_S[-1] > 0.5 * predict.pipeline_latency_s(made)


def test_the_planner_reads_the_same_delays_from_a_fleet():
  fleet = Fleet(
    hosts=(
      Host(name="here", memory_bytes=1 << 30, layers=0, devices=_slow(1)),
      *(Host(name=f"stage-{i}", layers=2, devices=_slow(i)) for i in range(3)),
    ),
    links=(
      *(
        Link(hosts=("here", f"stage-{i}"), latency_s=d, bytes_per_s=1e9)
        for i, d in enumerate(DELAYS_S)
      ),
      Link(hosts=("stage-0", "stage-1"), latency_s=DELAYS_S[1], bytes_per_s=1e9),
      Link(hosts=("stage-1", "stage-2"), latency_s=DELAYS_S[2], bytes_per_s=1e9),
      Link(hosts=("stage-0", "stage-2"), latency_s=1.0, bytes_per_s=1e9),
    ),
    coordinator="here",
  )
  load = Load(serving=Serving(weights="dense", context=256, sequences=4), working=False)
  made = best.best(tinymodel.CONFIG, fleet, load)
  # Either direction is as long: the way out by the one end is the way in by the other.
  assert [stage.host for stage in made.stages] in (
    ["stage-0", "stage-1", "stage-2"],
    ["stage-2", "stage-1", "stage-0"],
  )
  hops_s = sum(hop.latency_s for hop in made.hops)
  assert hops_s == pytest.approx(DELAYS_S[0] + DELAYS_S[1] + 2 * DELAYS_S[2])


def _slow(number: int) -> tuple[Device, ...]:
  return (Device(kind="cpu", memory_bytes=1 << 30, read_bytes_per_s=1e9 + number),)
