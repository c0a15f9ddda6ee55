import itertools

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from neurojax.config import Span, from_toml, to_toml
from neurojax.count.serving import stage_bytes
from neurojax.plan import best, predict
from neurojax.plan.fleet import Fleet, Host, Link
from neurojax.plan.plan import Plan
from neurojax.plan.problem import Problem, problem
from neurojax.plan.simulate import Failure, simulate
from neurojax.plan.solve import replicas
from tests.plan.fleets import LOAD, config, device, fleets


def check(made: Plan, model, fleet: Fleet) -> None:
  """Every place once, within its memory; shares that add up to whole sequences at every layer."""
  places = {place.label: place for place in fleet.places()}
  labels = [stage.label for stage in made.stages]
  assert len(labels) == len(set(labels))
  for stage in made.stages:
    span = Span(
      first_layer=stage.first_layer, last_layer=stage.last_layer, num_layers=model.num_layers
    )
    assert stage.memory_bytes == stage_bytes(model, span, LOAD)
    assert stage.memory_bytes <= stage.free_bytes == places[stage.label].free_bytes
    cost = predict.stage_step_s(model, span, LOAD, places[stage.label].device, context=made.context)
    assert stage.step_s == pytest.approx(cost.total)
    into = sum(hop.share for hop in made.hops if hop.b == stage.label)
    out = sum(hop.share for hop in made.hops if hop.a == stage.label)
    assert into == pytest.approx(stage.share, rel=1e-5) == out
  by_label = {stage.label: stage for stage in made.stages}
  for number in range(made.pipelines):
    for layer in range(model.num_layers):
      holding = [
        stage.share
        for stage in made.stages
        if stage.pipeline == number and stage.first_layer <= layer <= stage.last_layer
      ]
      assert sum(holding) == pytest.approx(1, rel=1e-5)
  for hop in made.hops:
    assert (
      by_label[hop.b].first_layer == by_label[hop.a].last_layer + 1 if hop.a and hop.b else True
    )
    if not hop.a:
      assert by_label[hop.b].first_layer == 0
    if not hop.b:
      assert by_label[hop.a].last_layer == model.num_layers - 1
  assert made.throughput == predict.pipeline_throughput(made)
  assert made.latency_s == predict.pipeline_latency_s(made)
  assert made.throughput <= made.bound * (1 + 1e-9)


def brute(known: Problem) -> float:
  """Passes a second of the best of all ways to give each place a range of layers or none, links aside.

  By the cuts: what flows through a line of layers is the least that any set of boundaries lets across.
  """
  total = known.num_layers
  ranges = [(a, b) for a in range(total) for b in range(a + 1, total + 1)]
  sides = np.array([(1, *rest, 0) for rest in itertools.product((0, 1), repeat=total - 1)])
  crosses_CR = np.array([[side[a] > side[b] for a, b in ranges] for side in sides], float)
  options = []
  for p in range(len(known.places)):
    rates = [(r, 1 / known.step_s(p, a, b)) for r, (a, b) in enumerate(ranges)]
    cuts = [crosses_CR[:, r] * rate for r, rate in rates if rate > 0]
    options.append([np.zeros(len(sides)), *cuts])
  sums = options[0]
  for more in options[1:]:
    sums = np.unique(
      (np.array(sums)[:, None] + np.array(more)[None]).reshape(-1, len(sides)), axis=0
    )
  return float(np.array(sums).min(axis=1).max())


@given(fleets(most_hosts=3, most_places=3, linked=False), st.integers(1, 5), st.booleans())
@settings(max_examples=120, deadline=None)
def test_shared_layers_equal_the_best_of_all_placements_of_ranges(fleet, layers, tied):
  model = config(layers, tied)
  known = problem(model, fleet, LOAD, context=LOAD.capacity)
  least = brute(known)
  assert replicas.rate_bound(known) >= least * (1 - 1e-9)
  try:
    made = best.best(model, fleet, LOAD, objective="throughput", replicas=None)
  except ValueError:
    assert least == 0
    reject()
  check(made, model, fleet)
  # HiGHS ends within 1e-6 of its bound, by its own arithmetic.
  assert made.throughput == pytest.approx(least, rel=1e-6) and made.gap < 1e-5


@given(
  fleets(most_hosts=6, most_places=7), st.integers(1, 9), st.sampled_from(["program", "orders"])
)
@settings(max_examples=30, deadline=None)
def test_they_are_valid_and_never_slower_than_pipelines_of_one_stage_each(fleet, layers, way):
  model = config(layers)
  with pytest.MonkeyPatch.context() as patch:
    if way == "orders":
      patch.setattr(replicas, "MAX_VARIABLES", 0)
    try:
      one = best.best(model, fleet, LOAD, objective="throughput")
    except ValueError:
      with pytest.raises(ValueError, match="too small"):
        best.best(model, fleet, LOAD, objective="throughput", replicas=None)
      reject()
    made = best.best(model, fleet, LOAD, objective="throughput", replicas=None)
    check(made, model, fleet)
    assert made.throughput >= one.throughput * (1 - 1e-9)
    for number in range(2, len(fleet.hosts) + 1):
      try:
        side = best.best(model, fleet, LOAD, objective="throughput", replicas=number)
      except ValueError:
        continue
      assert made.throughput >= side.throughput * (1 - 1e-9)


@given(fleets(most_hosts=4, most_places=4, pinned=True), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_pins_are_kept(fleet, layers):
  model = config(layers)
  try:
    best.best(model, fleet, LOAD, objective="throughput")
  except ValueError:
    reject()
  made = best.best(model, fleet, LOAD, objective="throughput", replicas=None)
  check(made, model, fleet)
  for host in fleet.hosts:
    held = sum(stage.layers for stage in made.stages if stage.host == host.label)
    assert host.layers is None or held == host.layers


def test_the_pin_of_a_host_holds_over_all_its_places():
  devices = (device(700_000, 1e8),) * 3
  hosts = (
    Host(name="h0", devices=devices, layers=1),
    Host(name="h1", devices=(device(700_000, 1e9),)),
  )
  fleet = Fleet(hosts=hosts)
  made = best.best(config(2), fleet, LOAD, objective="throughput", replicas=None)
  check(made, config(2), fleet)
  assert sum(stage.layers for stage in made.stages if stage.host == "h0") == 1
  with pytest.raises(ValueError, match="replicas = 4: h0 would be in several pipelines"):
    best.best(config(2), fleet, LOAD, objective="throughput", replicas=4)


def row(*sizes: tuple[int, float], **changes) -> Fleet:
  hosts = tuple(
    Host(name=f"h{i}", devices=(device(size, rate),)) for i, (size, rate) in enumerate(sizes)
  )
  return Fleet(hosts=hosts, **changes)


def pair() -> tuple[Plan, Fleet]:
  """A fast host for two layers, and three slow ones that share the last."""
  fleet = row((700_000, 4e9), (500_000, 1e9), (500_000, 1e9), (500_000, 1e9))
  made = best.best(config(3), fleet, LOAD, objective="throughput", replicas=None)
  assert any(stage.share < 1 for stage in made.stages), made.stages
  return made, fleet


def test_a_stage_on_several_hosts_says_so():
  made, fleet = pair()
  check(made, config(3), fleet)
  alone = best.best(config(3), fleet, LOAD, objective="throughput")
  assert made.throughput > 1.1 * alone.throughput
  shared = next(stage for stage in made.stages if stage.share < 1)
  why = next(reason.why for reason in made.reasons if reason.host == shared.label)
  assert "of the sequences" in why
  assert from_toml(Plan, to_toml(made)) == made


def test_a_link_that_is_too_narrow_counts():
  made, fleet = pair()
  a, b = next((hop.a, hop.b) for hop in made.hops if hop.a and hop.b)
  narrow = Link(hosts=(a, b), latency_s=1e-5, bytes_per_s=1e3)
  slow = Fleet(hosts=fleet.hosts, links=(narrow,))
  other = best.best(config(3), slow, LOAD, objective="throughput", replicas=None)
  check(other, config(3), slow)
  assert other.throughput <= made.throughput * (1 + 1e-9)
  # Three ways lead to the last layer: what the narrow one cannot carry the others do.
  assert other.throughput > made.throughput / 2


def test_the_simulation_reaches_what_is_predicted():
  made, _ = pair()
  result = simulate(
    made, requests=3 * made.batches, concurrency=3 * made.batches, prompt=1, answer=300
  )
  assert result.steady_tokens_per_s == pytest.approx(made.throughput, rel=0.03)


def test_a_replica_that_fails_takes_only_its_own_sequences():
  made, _ = pair()
  shared = next(stage.host for stage in made.stages if stage.share < 1)
  result = simulate(
    made, requests=12, concurrency=12, prompt=1, answer=60,
    failures=[Failure(host=shared, at_s=5 / made.throughput)], repair_s=1e6,
  )  # fmt: skip
  # Nobody waits for the repair: the others hold the same layers.
  assert result.failed == 0 and 0 < result.restarts < 12 and result.duration_s < 1e3
