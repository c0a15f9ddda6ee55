"""Throughput of so many sequences as are in flight: the best plan for them, by trying all."""

import itertools
import math

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from neurojax.config import Serving, from_toml, to_toml
from neurojax.plan import best, predict
from neurojax.plan.assemble import assemble
from neurojax.plan.fleet import Fleet, Host
from neurojax.plan.in_flight import planned
from neurojax.plan.plan import Plan
from neurojax.plan.problem import problem
from neurojax.plan.simulate import simulate
from neurojax.plan.solve import chain, exact
from tests.plan.fleets import LOAD, config, device, every_chain, fleets


@given(
  fleets(most_hosts=4, most_places=4, pinned=True),
  st.integers(1, 7),
  st.integers(1, 5),
  st.sampled_from(["exact", "search"]),
)
@settings(max_examples=250, deadline=None)
def test_a_plan_equals_the_best_of_all_or_is_within_its_gap(fleet, layers, in_flight, way):
  model = config(layers)
  try:
    known = problem(model, fleet, LOAD, context=LOAD.capacity, in_flight=in_flight)
  except ValueError as error:
    assert "pin" in str(error)
    reject()
  all_of_them = [
    assemble(known, [chain], objective="throughput", method="all") for chain in every_chain(known)
  ]
  most = max((made.throughput for made in all_of_them), default=0.0)
  with pytest.MonkeyPatch.context() as patch:
    if way == "search":
      patch.setattr(exact, "MAX_OPERATIONS", 0)
    try:
      made = best.best(model, fleet, LOAD, objective="throughput", in_flight=in_flight)
    except ValueError:
      assert not most or (way == "search" and fleet.links and any(h.layers for h in fleet.hosts))
      reject()
  assert made.in_flight == in_flight and made.batches <= in_flight
  assert made.throughput == predict.pipeline_throughput(made, micro_batches=in_flight)
  assert made.throughput * (1 - 1e-9) <= most <= made.bound * (1 + 1e-9)
  assert made.bound / made.throughput == pytest.approx(1 + made.gap)
  if made.method == chain.SEARCHED and made.gap:
    return
  assert made.throughput == pytest.approx(most, rel=1e-9)
  quickest = min(m.latency_s for m in all_of_them if m.throughput >= most * (1 - 1e-9))
  assert made.latency_s == pytest.approx(quickest, rel=1e-6) or made.method == chain.SEARCHED


@given(fleets(most_hosts=8, most_places=9), st.integers(1, 16), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_more_in_flight_never_give_less_and_unlimited_ones_most(fleet, layers, in_flight):
  rates = []
  for batches in (in_flight, in_flight + 1, None):
    try:
      made = best.best(config(layers), fleet, LOAD, objective="throughput", in_flight=batches)
    except ValueError:
      assert not rates
      reject()
    rates.append((made.throughput, made.bound))
    # The one for unlimited sequences is one of those that this one was chosen from.
    if batches is None:
      assert predict.pipeline_throughput(made, micro_batches=in_flight) <= rates[0][1] * (1 + 1e-9)
  for few, more in itertools.pairwise(rates):
    assert few[0] <= more[1] * (1 + 1e-9)


def test_few_in_flight_take_a_shorter_way_and_say_so():
  # Two fast hosts, and eight slow ones that only a long queue of sequences can keep busy.
  hosts = [Host(name=f"fast{i}", devices=(device(20_000_000, 3e9),)) for i in range(2)]
  hosts += [Host(name=f"slow{i}", devices=(device(20_000_000, 3e8),)) for i in range(8)]
  fleet, model = Fleet(hosts=tuple(hosts)), config(40)
  few, many = (
    best.best(model, fleet, LOAD, objective="throughput", in_flight=batches)
    for batches in (2, None)
  )
  assert len(few.stages) < len(many.stages)
  assert few.throughput > predict.pipeline_throughput(many, micro_batches=2)
  assert predict.pipeline_throughput(few) < many.throughput
  assert from_toml(Plan, to_toml(few)) == few
  alone = best.best(model, fleet, LOAD, objective="throughput", in_flight=1)
  assert alone.throughput == pytest.approx(1 / best.best(model, fleet, LOAD).latency_s)
  assert any("round trip sets the pace, with 1 in flight" in limit for limit in alone.limits)
  with pytest.raises(ValueError, match="in_flight = 0"):
    best.best(model, fleet, LOAD, objective="throughput", in_flight=0)


@given(fleets(most_hosts=6, most_places=8), st.integers(1, 8), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_with_replicas_it_is_no_worse_than_without(fleet, layers, in_flight):
  model = config(layers)
  try:
    one = best.best(model, fleet, LOAD, objective="throughput", in_flight=in_flight)
  except ValueError:
    reject()
  made = best.best(model, fleet, LOAD, objective="throughput", in_flight=in_flight, replicas=None)
  assert made.throughput >= one.throughput * (1 - 1e-9)
  assert made.throughput <= made.bound * (1 + 1e-9)
  assert made.throughput == predict.pipeline_throughput(made, micro_batches=in_flight)
  assert math.isfinite(made.latency_s)


def test_planned_resolves_the_serving_and_may_choose_the_sequences():
  model, serving = config(12), Serving(weights="auto", sequences=2)
  hosts = tuple(Host(name=f"h{i}", devices=(device(20_000_000, 1e8),)) for i in range(8))
  fleet = Fleet(hosts=hosts)
  few = planned(model, fleet, serving, objective="throughput")
  many = planned(model, fleet, serving, objective="throughput", choose_sequences=True)
  assert few.sequences == few.in_flight == 2 < many.sequences
  assert few.context == many.context == model.context_length
  assert many.throughput > few.throughput
  with pytest.raises(ValueError, match="batch = 3 and sequences = 2"):
    planned(model, fleet, serving, batch=3)


def test_a_notebook_shows_a_plan_with_its_texts_escaped():
  fast = Host(name="<b>h</b>", devices=(device(20_000_000),))
  hosts = (fast, Host(name="slow", devices=(device(20_000_000, 1e6),)))
  plan = planned(config(4), Fleet(hosts=hosts), Serving(weights="dense", context=256))
  shown = plan._repr_html_()
  assert "&lt;b&gt;h&lt;/b&gt;" in shown and "<b>" not in shown
  assert plan.summary() in shown and "slow" in shown and shown.count("<tr>") == 3
  result = simulate(plan, requests=3, concurrency=2, prompt=4, answer=4, within_plan=True)
  assert "12 tokens of 3 answers" in result._repr_html_() and "<b>" not in result._repr_html_()
  with pytest.raises(ValueError, match=r"concurrency = 5: .* caches of 4 sequences"):
    simulate(plan, requests=9, concurrency=5, prompt=4, answer=4, within_plan=True)
  with pytest.raises(ValueError, match="the plan is for 256 positions"):
    simulate(plan, requests=1, concurrency=1, prompt=200, answer=57, within_plan=True)
