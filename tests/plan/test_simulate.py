import dataclasses
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from neurojax.plan import best, predict
from neurojax.plan.fleet import Fleet, Host
from neurojax.plan.plan import Objective
from neurojax.plan.simulate import Failure, simulate
from tests.plan.fleets import LOAD, config, device, fleets


def made(fleet: Fleet, layers: int, objective: Objective = "throughput", batch: int = 1):
  try:
    return best.best(config(layers), fleet, LOAD, objective=objective, batch=batch)
  except ValueError:
    return None


def alike(hosts: int, **changes: float) -> Fleet:
  made = tuple(Host(name=f"h{i}", devices=(device(3_000_000),)) for i in range(hosts))
  return Fleet(hosts=made, **changes)


@given(fleets(), st.integers(1, 12), st.sampled_from([1, 2]), st.integers(2, 9))
@settings(max_examples=60, deadline=None)
def test_one_request_alone_takes_the_predicted_time(fleet, layers, batch, answer):
  p = made(fleet, layers, batch=batch)
  assume(p is not None)
  result = simulate(p, requests=batch, concurrency=batch, prompt=1, answer=answer)
  assert result.token_s.p50_s == pytest.approx(p.latency_s)
  assert result.token_s.max_s == pytest.approx(p.latency_s)
  assert result.tokens == batch * answer and result.failed == 0


@given(fleets(), st.integers(1, 12), st.sampled_from([1, 2]))
@settings(max_examples=60, deadline=None)
def test_with_enough_in_flight_the_slowest_sets_the_pace_and_each_token_is_computed_once(
  fleet, layers, batch
):
  p = made(fleet, layers, batch=batch)
  assume(p is not None and p.batches <= 40)
  groups = p.batches + 1
  result = simulate(
    p, requests=groups * batch, concurrency=groups * batch, prompt=1, answer=max(40, 4 * groups)
  )
  # The middle of the run: a few tokens more or less than whole intervals.
  assert result.steady_tokens_per_s == pytest.approx(p.throughput, rel=0.1)
  computed = groups * batch * max(40, 4 * groups)
  assert {use.tokens for use in result.stages} == {computed}
  assert max(use.busy for use in (*result.stages, *result.links)) <= 1 + 1e-9


@given(fleets(), st.integers(1, 12), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_with_fewer_in_flight_the_round_trip_sets_it(fleet, layers, concurrency):
  p = made(fleet, layers)
  assume(p is not None)
  answer = 30 + 4 * concurrency
  result = simulate(p, requests=concurrency, concurrency=concurrency, prompt=1, answer=answer)
  expected = predict.pipeline_throughput(p, micro_batches=concurrency)
  assert result.steady_tokens_per_s == pytest.approx(expected, rel=0.15)


def test_prompts_go_through_in_parts_that_overlap():
  p = made(alike(3), 12)
  p = dataclasses.replace(p, prefill_tokens=16)
  result = simulate(p, requests=1, concurrency=1, prompt=40, answer=1)
  stage_s = max(stage.prefill_s for stage in p.stages)
  whole_s = sum(stage.prefill_s for stage in p.stages) + sum(
    h.latency_s + h.prefill_s for h in p.hops
  )
  # Two parts of 16 and one of 8: the ways of the last one, and at most two parts before it.
  assert stage_s < result.first_token_s.p50_s <= whole_s + 2 * stage_s
  assert {use.tokens for use in result.stages} == {40}


def test_the_same_seed_gives_the_same_and_another_seed_another():
  p = made(alike(4), 12)
  work = {"requests": 40, "concurrency": 4, "prompt": 5, "answer": 10, "failures_per_hour": 3600.0}
  first = simulate(p, **work, repair_s=0.01, seed=1)
  assert first == simulate(p, **work, repair_s=0.01, seed=1)
  assert first != simulate(p, **work, repair_s=0.01, seed=2)


@given(st.integers(0, 1000), st.booleans(), st.sampled_from([1, 2]))
@settings(max_examples=60, deadline=None)
def test_failures_lose_work_but_no_request(seed: int, retry: bool, batch: int):
  p = made(alike(4), 12, batch=batch)
  result = simulate(
    p,
    requests=20,
    concurrency=4,
    prompt=3,
    answer=8,
    failures_per_hour=3600 * 2,
    repair_s=0.005,
    retry=retry,
    seed=seed,
  )
  answered = result.tokens // 8
  assert answered + result.failed == 20
  assert (result.failed == 0) or not retry
  useful = answered * (3 + 8 - 1) * len(p.stages)
  assert sum(use.tokens for use in result.stages) == useful + result.lost_tokens
  assert (result.restarts == 0) <= (result.lost_tokens == 0)
  assert all(use.busy <= 1 + 1e-9 for use in (*result.stages, *result.links))


def test_what_is_down_does_not_fail_again_and_what_is_never_whole_ends():
  p = made(alike(1), 2)
  work = {"requests": 2, "concurrency": 1, "prompt": 1, "answer": 10}
  calm = simulate(p, **work)
  often = 3 * 3600 / calm.duration_s
  result = simulate(p, **work, failures_per_hour=often, repair_s=1000 * calm.duration_s)
  assert 0 < result.failures == result.restarts < 200
  several = made(alike(4), 12)
  assert len({stage.host for stage in several.stages}) > 2
  with pytest.raises(ValueError, match="failures in a row"):
    simulate(several, **work, failures_per_hour=1e6, repair_s=3600.0)


def test_a_failure_takes_the_repair_and_what_was_done_before_it():
  p = made(alike(3), 12)
  calm = simulate(p, requests=1, concurrency=1, prompt=1, answer=10)
  at_s = calm.duration_s / 2
  failed = simulate(
    p,
    requests=1,
    concurrency=1,
    prompt=1,
    answer=10,
    failures=[Failure(host=p.stages[1].host, at_s=at_s)],
    repair_s=7.0,
  )
  assert failed.duration_s == pytest.approx(at_s + 7.0 + calm.duration_s)
  assert (failed.failures, failed.restarts, failed.failed, failed.tokens) == (1, 1, 0, 10)
  with pytest.raises(ValueError, match="'nobody' fails"):
    simulate(
      p, requests=1, concurrency=1, prompt=1, answer=1, failures=[Failure(host="nobody", at_s=1)]
    )


def test_the_other_pipeline_takes_over():
  fleet = Fleet(hosts=tuple(Host(name=f"h{i}", devices=(device(10**8),)) for i in range(4)))
  p = best.best(config(4), fleet, LOAD, objective="throughput", replicas=2)
  assert p.pipelines == 2
  work = {"requests": 8, "concurrency": 4, "prompt": 1, "answer": 10}
  calm = simulate(p, **work)
  host = p.stages[0].host
  result = simulate(
    p, **work, failures=[Failure(host=host, at_s=calm.duration_s / 3)], repair_s=1e6
  )
  assert result.tokens == 80 and result.failed == 0
  assert result.duration_s < 10 * calm.duration_s


def test_work_that_makes_no_sense_is_refused():
  p = made(alike(2), 8, batch=2)
  base = {"requests": 4, "concurrency": 2, "prompt": 1, "answer": 1}
  for changes in (
    {"requests": 0},
    {"answer": 0},
    {"prompt": 0},
    {"concurrency": 1},
    {"repair_s": math.inf},
    {"failures_per_hour": -1.0},
  ):
    with pytest.raises(ValueError, match=next(iter(changes))):
      simulate(p, **{**base, **changes})
