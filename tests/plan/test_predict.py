import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurojax import count
from neurojax.config import ModelConfig, Serving, Span
from neurojax.count.serving import Load
from neurojax.plan import best, predict
from neurojax.plan.assemble import assemble
from neurojax.plan.fleet import DecodeRates, Device, Fleet, Host, Link
from neurojax.plan.plan import Plan
from neurojax.plan.problem import problem
from tests.plan.fleets import LOAD, config, device

GPU = Device(
  kind="cuda",
  memory_bytes=10**10,
  read_bytes_per_s=1e9,
  flops_per_s=1e10,
  layer_overhead_s=1e-5,
  step_overhead_s=1e-4,
  sample_s_per_entry=1e-7,
  handover_s=3e-4,
)


def test_a_step_by_hand():
  model = config(4, tied=False)
  span = Span(first_layer=2, last_layer=3, num_layers=4)
  cost = predict.stage_step_s(model, span, LOAD, GPU, context=100)
  layer = count.layer_bytes(model, dtype="float32", weights="dense")
  keys_and_values = 2 * 2 * 16 * 100 * 4
  read_bytes = 2 * (layer + keys_and_values) + 512 * 64 * 4
  assert cost.read_s == pytest.approx(read_bytes / 1e9)
  matrices = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128
  flops = 2 * (2 * matrices + 4 * 64 * 100) + 2 * 64 * 512
  assert cost.compute_s == pytest.approx(flops / 1e10)
  assert cost.overhead_s == pytest.approx(2e-5 + 1e-4 + 512e-7)
  assert cost.total == pytest.approx(max(cost.read_s, cost.compute_s) + cost.overhead_s)
  assert cost.limit == max(
    ("reading", cost.read_s), ("multiplying", cost.compute_s), ("overhead", cost.overhead_s),
    key=lambda pair: pair[1],
  )[0]  # fmt: skip


@given(st.integers(1, 300), st.integers(1, 20), st.sampled_from(["decode", "prefill"]))
def test_the_stages_multiply_what_the_model_does(context: int, layers: int, mode: str):
  model = config(layers)
  tokens = 1 if mode == "decode" else context
  work = predict.work(model, LOAD, context=context, tokens=tokens)
  flops = count.flops_per_token(model, context=context, mode=mode)
  head = 0 if mode == "decode" else work.head_flops
  assert layers * work.layer_flops + work.head_flops == tokens * flops + head


@given(st.integers(1, 12), st.integers(1, 3), st.integers(1, 200), st.data())
def test_a_cut_costs_each_part_its_overhead_and_nothing_else(layers, batch, context, data):
  model = config(layers + 1, tied=False)
  cut = data.draw(st.integers(0, layers - 1))
  parts = [
    Span(first_layer=0, last_layer=cut, num_layers=layers + 1),
    Span(first_layer=cut + 1, last_layer=layers, num_layers=layers + 1),
  ]

  def cost(span: Span) -> predict.StepCost:
    return predict.stage_step_s(model, span, LOAD, GPU, batch=batch, context=context)

  whole, halves = cost(Span.whole(model)), [cost(part) for part in parts]
  assert sum(half.read_s for half in halves) == pytest.approx(whole.read_s)
  assert sum(half.compute_s for half in halves) == pytest.approx(whole.compute_s)
  assert sum(half.overhead_s for half in halves) == pytest.approx(
    whole.overhead_s + GPU.step_overhead_s + GPU.handover_s
  )


def test_rates_are_those_of_the_weights_form_and_unknown_ones_are_asked_for():
  model = config(2)
  fast = dataclasses.replace(GPU, decode_bytes_per_s=DecodeRates(dense=5e8))
  span = Span.whole(model)
  slow_s = predict.stage_step_s(model, span, LOAD, fast, context=1).read_s
  assert slow_s == pytest.approx(2 * predict.stage_step_s(model, span, LOAD, GPU, context=1).read_s)
  with pytest.raises(ValueError, match=r"read_bytes_per_s of cpu is not known.*neurojax probe"):
    predict.stage_step_s(model, span, LOAD, Device(kind="cpu", memory_bytes=1), context=1)
  unknown = dataclasses.replace(GPU, flops_per_s=None)
  assert predict.stage_step_s(model, span, LOAD, unknown, context=1).compute_s == 0
  for changes in ({"batch": 0}, {"context": 0}, {"tokens": 0}, {"tokens": 9, "context": 8}):
    with pytest.raises(ValueError, match="="):
      predict.stage_step_s(model, span, LOAD, GPU, **{"context": 8, **changes})


@given(st.integers(1, 40), st.booleans())
def test_tables_hold_what_single_stages_cost(layers: int, tied: bool):
  model = config(layers, tied)
  fleet = Fleet(hosts=tuple(Host(name=n, devices=(GPU,)) for n in "ab"))
  tables = problem(model, fleet, LOAD, context=64).step_PRL[0]
  for first in range(min(3, layers)):
    for last in range(first, layers):
      span = Span(first_layer=first, last_layer=last, num_layers=layers)
      role = span.is_first + 2 * span.is_last
      assert tables[role, len(span)] == pytest.approx(
        predict.stage_step_s(model, span, LOAD, GPU, context=64).total
      )


def test_latency_and_throughput_by_hand():
  model = config(4)
  fleet = Fleet(
    hosts=(
      Host(name="a", devices=(device(10**8, 1e9),)),
      Host(name="b", devices=(device(10**8, 2e9),)),
    ),
    links=(Link(hosts=("a", "b"), latency_s=0.01, bytes_per_s=1e6),),
    latency_s=0.002,
    coordinator="b",
  )
  given_ = problem(model, fleet, LOAD, context=256, batch=2)
  made = assemble(given_, [[(0, 1), (1, 3)]], objective="latency", method="by hand")
  a, b = made.stages
  between_s = 2 * 64 * 4 / 1e6
  ends_s = (0.01 + 32 / 1e6) + (fleet.local_latency_s + 32 / fleet.local_bytes_per_s)
  assert made.latency_s == pytest.approx(a.step_s + b.step_s + 0.01 + between_s + ends_s)
  assert made.throughput == pytest.approx(2 / max(a.step_s, b.step_s, between_s))
  assert predict.pipeline_throughput(made, micro_batches=1) == pytest.approx(2 / made.latency_s)
  assert made.batches == -(-made.latency_s // max(a.step_s, b.step_s, between_s))
  assert predict.pipeline_throughput(made, micro_batches=made.batches) == pytest.approx(
    made.throughput
  )


def test_a_place_that_a_placement_comes_back_to_is_busy_for_all_of_its_visits():
  fleet = Fleet(hosts=tuple(Host(name=n, devices=(device(10**8),)) for n in "ab"))
  made = best.compared(config(6), fleet, LOAD)["greedy"]
  assert isinstance(made, Plan)
  assert [stage.label for stage in made.stages] == ["b", "a", "b", "a", "b", "a"] or len(
    made.stages
  ) >= 5
  busy = {
    label: sum(stage.step_s for stage in made.stages if stage.label == label) for label in "ab"
  }
  assert made.throughput == pytest.approx(1 / max(busy.values()))


def test_a_model_of_billions_reads_at_the_memorys_pace():
  model = ModelConfig.named("llama-8b")
  load = Load(
    serving=Serving(dtype="bfloat16", weights="dense", context=2048, sequences=1), working=False
  )
  gpu = Device(kind="cuda", memory_bytes=80 * 10**9, read_bytes_per_s=3.35e12, flops_per_s=9.9e14)
  cost = predict.stage_step_s(model, Span.whole(model), load, gpu, context=1)
  assert cost.limit == "reading"
  # 16 GB of weights but the embedding, 1 GB of it.
  assert cost.total == pytest.approx(15e9 / 3.35e12, rel=0.02)


def test_a_measured_decode_has_its_products_in_it_and_other_passes_have_not():
  # Products of floats would be slower than what int8 weights were measured to reach.
  slow = dataclasses.replace(GPU, flops_per_s=1e6)
  measured = dataclasses.replace(slow, decode_bytes_per_s=DecodeRates(dense=5e8))
  model, span = config(4), Span(first_layer=0, last_layer=3, num_layers=4)
  one = predict.stage_step_s(model, span, LOAD, measured, context=100)
  assert one.compute_s == 0 and one.limit == "reading"
  assert predict.stage_step_s(model, span, LOAD, slow, context=100).compute_s > one.total
  other = LOAD.serve(weights="int8")
  assert predict.stage_step_s(model, span, other, measured, context=100).compute_s > 0
  for more in ({"batch": 2}, {"tokens": 2}):
    cost = predict.stage_step_s(model, span, LOAD, measured, context=100, **more)
    assert cost.compute_s > 0 and cost.total > one.total
