"""Explains a plan by the numbers that made it: a reason for every place, and what limits the whole."""

import dataclasses
from collections import Counter

import numpy as np

from neurojax.count.wording import short
from neurojax.plan import predict
from neurojax.plan.plan import Plan, Reason, Stage
from neurojax.plan.problem import FIRST, LAST, MIDDLE, Problem


def explained(given: Problem, plan: Plan) -> Plan:
  """Add to a plan a reason for every place, and the limits of its speed."""
  held = {stage.label: stage for stage in plan.stages}
  paces_s = [
    predict.interval_s(stages, hops, plan.in_flight) for stages, hops in predict.pipelines(plan)
  ]
  layer_s = _layer_s(given)
  index = {place.label: number for number, place in enumerate(given.places)}
  used_s = [layer_s[index[label]] for label in held]
  alike = Counter((stage.first_layer, stage.last_layer, stage.pipeline) for stage in plan.stages)
  fastest_s = float(layer_s.min())
  reasons = []
  for number, place in enumerate(given.places):
    stage = held.get(place.label)
    if stage is None:
      why = _left_out(given, plan, number, float(layer_s[number]), max(used_s))
    else:
      pace_s = paces_s[stage.pipeline]
      others = alike[stage.first_layer, stage.last_layer, stage.pipeline]
      is_fastest = layer_s[number] <= fastest_s * (1 + 1e-9)
      why = _placed(given, plan, number, stage, float(layer_s[number]), pace_s, others, is_fastest)
    reasons.append(Reason(host=place.label, layers=0 if stage is None else stage.layers, why=why))
  return dataclasses.replace(plan, reasons=tuple(reasons), limits=_limits(given, plan, paces_s))


def milliseconds(seconds: float) -> str:
  return f"{short(seconds * 1e3)} ms"


def _layer_s(given: Problem) -> np.ndarray:
  """Seconds that one further layer takes on each place."""
  work = predict.work(given.config, given.load, batch=given.batch, context=given.context)
  seconds = []
  for place in given.places:
    read_s, compute_s, overhead_s = work.cost(
      place.device, given.load, np.array([1, 2]), False, False
    )
    total = np.maximum(read_s, compute_s) + overhead_s
    seconds.append(total[1] - total[0])
  return np.array(seconds)


def _pin(given: Problem, number: int) -> int | None:
  place = given.places[number]
  return given.pins.get(place.label, given.pins.get(place.host.label))


def _placed(
  given: Problem,
  plan: Plan,
  number: int,
  stage: Stage,
  layer_s: float,
  pace_s: float,
  others: int,
  is_fastest: bool,
) -> str:
  layer, _ = given.role_bytes(number)
  is_first = stage.first_layer == 0
  is_last = stage.last_layer == given.num_layers - 1
  ends = {(1, 0): "embedding", (0, 1): "norm and head", (1, 1): "embedding, norm and head"}
  with_ends = f"; with {ends[is_first, is_last]}" if is_first or is_last else ""
  more_s = stage.step_s + layer_s
  if stage.share < 1:
    why = f"computes {stage.share:.0%} of the sequences"
    if others > 1:
      why = f"one of {others} places with these layers, {why}"
    why += f"; {milliseconds(stage.step_s)} for each step"
    if _pin(given, number) is not None:
      why = f"pinned; {why}"
  elif _pin(given, number) is not None:
    why = "pinned"
  elif stage.layers == given.num_layers and plan.pipelines > 1:
    why = f"holds all layers, a pipeline of its own: {short(plan.batch / pace_s)} tokens/s"
  elif stage.layers == given.num_layers:
    why = "holds all layers: moving some elsewhere would cost more for the hop than it saves"
  elif stage.memory_bytes + layer > stage.free_bytes:
    why = (
      f"full: {stage.free_bytes - stage.memory_bytes:,} bytes are left, and a layer takes {layer:,}"
    )
  elif plan.objective == "throughput":
    why = (
      f"{milliseconds(stage.step_s)} for each step, {milliseconds(more_s)} with another layer; the pipeline "
      f"takes a batch every {milliseconds(pace_s)}"
    )
  else:
    why = f"{milliseconds(layer_s)} a layer; gets the layers that did not fit on faster places"
    if is_fastest:
      why = f"{milliseconds(layer_s)} a layer, the fastest; holds all layers that are left"
  return why + with_ends


def _left_out(given: Problem, plan: Plan, number: int, layer_s: float, worst_s: float) -> str:
  place = given.places[number]
  layer, extra_R = given.role_bytes(number)
  if _pin(given, number) == 0:
    return "pinned to no layers"
  least = layer + int(extra_R[MIDDLE])
  if place.free_bytes < least:
    of = " with a stage's working memory" if least > layer else ""
    return f"too small: a layer takes {least:,} bytes{of}, {least - place.free_bytes:,} more than is free"
  if plan.objective == "throughput":
    return (
      "not needed: another place sets the pace, and an extra stage would only delay each token"
      if np.isfinite(given.step_PRL[number, MIDDLE, 1:2]).any()
      else "too small for the first or last stage: these need "
      f"{int(min(extra_R[FIRST], extra_R[LAST])):,} bytes beside a layer"
    )
  others = np.delete(given.hop_PP[number], number)
  hop_s = float(others.min()) if len(others) else 0.0
  more_s = hop_s + place.device.step_overhead_s + place.device.handover_s
  if layer_s > worst_s * (1 + 1e-9):
    return f"slower: {milliseconds(layer_s)} a layer; the places in use take at most {milliseconds(worst_s)}"
  return (
    f"not needed: the layers fit on fewer places, and an extra stage would add {milliseconds(more_s)} of hop "
    f"and overhead to each token ({milliseconds(layer_s)} a layer here)"
  )


def _limits(given: Problem, plan: Plan, paces_s: list[float]) -> tuple[str, ...]:
  found = []
  if plan.objective == "latency":
    parts = {"reading": 0.0, "multiplying": 0.0, "overhead": 0.0}
    work = predict.work(given.config, given.load, batch=given.batch, context=given.context)
    index = {place.label: number for number, place in enumerate(given.places)}
    slowest = [s for s in plan.stages if s.pipeline == _slowest(plan)]
    for stage in slowest:
      read_s, compute_s, overhead_s = work.cost(
        given.places[index[stage.label]].device,
        given.load,
        stage.layers,
        stage.first_layer == 0,
        stage.last_layer == given.num_layers - 1,
      )
      parts["reading" if read_s >= compute_s else "multiplying"] += float(max(read_s, compute_s))
      parts["overhead"] += float(overhead_s)
    parts["hops"] = plan.latency_s - sum(parts.values())
    shares = ", ".join(f"{name} {value / plan.latency_s:.0%}" for name, value in parts.items())
    found.append(f"each token takes {milliseconds(plan.latency_s)}: {shares}")
    full = [
      stage.label
      for stage in slowest
      if stage.memory_bytes + given.role_bytes(index[stage.label])[0] > stage.free_bytes
      and _pin(given, index[stage.label]) is None
    ]
    if full and len(slowest) > 1:
      found.append(
        f"memory: {len(full)} of {len(slowest)} places are full; more memory there would save hops"
      )
  else:
    if len(paces_s) > 1:
      rates = sorted(plan.batch / pace_s for pace_s in paces_s)
      found.append(
        f"{len(rates)} pipelines side by side: {short(rates[0])} to {short(rates[-1])} tokens/s each; the "
        "next lines describe the slowest"
      )
    slowest = max(range(len(paces_s)), key=lambda pipeline: paces_s[pipeline])
    stages, hops = predict.pipelines(plan)[slowest]
    busy = max(stages, key=lambda s: s.share * s.step_s)
    link = max(hops, key=lambda h: h.share * h.transfer_s)
    enough = predict.pipeline_throughput(plan)
    if predict.bottleneck_s(stages, hops) < paces_s[slowest] * (1 - 1e-9):
      found.append(
        f"the round trip sets the pace, with {plan.in_flight} in flight"
        f"{' in each' if len(paces_s) > 1 else ''}: with more in flight these stages would reach "
        f"{short(enough)} tokens/s, and another plan perhaps more"
      )
    elif link.share * link.transfer_s > busy.share * busy.step_s:
      found.append(
        f"the link {link.a or 'coordinator'} - {link.b or 'coordinator'} sets the pace: "
        f"{milliseconds(link.transfer_s)} a batch{_of(link.share)}"
      )
    else:
      layers = next(s.layers for s in plan.stages if s.label == busy.label)
      found.append(
        f"the pace is set by {busy.label}: {milliseconds(busy.step_s)} a batch for {layers} layers"
        f"{_of(busy.share)}"
      )
    sequences = plan.batches * plan.batch
    if sequences > given.load.sequences:
      fewer = max(1, given.load.sequences // plan.batch)
      rate = predict.pipeline_throughput(plan, micro_batches=fewer)
      found.append(
        f"this speed needs {sequences} sequences in flight{' in each' if len(paces_s) > 1 else ''}, and memory is planned for the caches of {given.load.sequences}: "
        f"with these {short(rate)} tokens/s"
      )
  return tuple(found)


def _of(share: float) -> str:
  return "" if share == 1 else f", {share:.0%} of the sequences"


def _slowest(plan: Plan) -> int:
  spans: dict[int, float] = {}
  for part in (*plan.stages, *plan.hops):
    time_s = part.step_s if isinstance(part, Stage) else part.latency_s + part.transfer_s
    spans[part.pipeline] = spans.get(part.pipeline, 0.0) + time_s
  return max(spans, key=lambda pipeline: spans[pipeline])
