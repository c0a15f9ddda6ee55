"""Reads plan files, and turns plans into what running stage servers are asked for."""

import math
from collections.abc import Mapping
from pathlib import Path

from neurojax.config import ModelConfig, Span, from_toml
from neurojax.plan.fleet import Fleet, Host, read_text
from neurojax.plan.plan import Plan, Stage


def read_plan(path: str | Path) -> Plan:
  """Read the plan that `neurojax plan --toml` printed.

  Raises: ValueError: the file is no such plan.
  """
  plan = from_toml(Plan, read_text(path, "a plan"), where=str(path))
  try:
    _check(plan)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  return plan


def _check(plan: Plan) -> None:
  """Check a plan that may have been edited by hand. Raises: ValueError: no planner prints it."""
  if not plan.stages:
    raise ValueError("a plan without stages")
  for name in ("batch", "context", "prefill_tokens"):
    if getattr(plan, name) < 1:
      raise ValueError(f"{name} = {getattr(plan, name)}: at least 1")
  if plan.sequences is not None and plan.sequences < plan.batch:
    raise ValueError(f"sequences = {plan.sequences}: at least batch = {plan.batch}")
  parts = sorted({stage.pipeline for stage in plan.stages})
  if parts != list(range(len(parts))):
    raise ValueError(f"stages of pipelines {parts}: they are to be numbered from 0 on")
  where = {(stage.label, stage.pipeline) for stage in plan.stages}
  for part in (*plan.stages, *plan.hops):
    name = part.label if isinstance(part, Stage) else f"{part.a or '-'} to {part.b or '-'}"
    values = {"prefill_s": part.prefill_s}
    if isinstance(part, Stage):
      values["step_s"] = part.step_s
      if not 0 <= part.first_layer <= part.last_layer:
        raise ValueError(f"{name}: layers {part.first_layer}..{part.last_layer} are no range")
    else:
      values |= {"latency_s": part.latency_s, "transfer_s": part.transfer_s}
      for end in {part.a, part.b} - {""}:
        if (end, part.pipeline) not in where:
          raise ValueError(f"hop {name}: pipeline {part.pipeline} has no stage called {end!r}")
    for key, value in values.items():
      if not 0 <= value < math.inf:
        raise ValueError(f"{name}: {key} = {value}: 0 or more seconds, and finite")
    if not 0 < part.share <= 1:
      raise ValueError(f"{name}: share = {part.share}: above 0 and at most 1")
  for label, pipeline in where:
    into = any(hop.b == label and hop.pipeline == pipeline for hop in plan.hops)
    if not into or not any(hop.a == label and hop.pipeline == pipeline for hop in plan.hops):
      raise ValueError(f"{label}: the plan needs a hop to it and one from it, and has not both")
  _check_order(plan)


def _check_order(plan: Plan) -> None:
  layers = {(stage.label, stage.pipeline): stage for stage in plan.stages}
  if len(layers) < len(plan.stages):
    raise ValueError("two stages in one place")
  last = max(stage.last_layer for stage in plan.stages)
  for hop in plan.hops:
    end = layers[hop.a, hop.pipeline].last_layer + 1 if hop.a else 0
    first = layers[hop.b, hop.pipeline].first_layer if hop.b else last + 1
    if end != first:
      a, b = (name or "the coordinator" for name in (hop.a, hop.b))
      raise ValueError(
        f"the hop from {a} to {b} continues with layer {first}, and layer {end} is the next to be placed"
      )


def servers(plan: Plan, config: ModelConfig) -> tuple[Fleet, Mapping[str, Span]]:
  """The hosts of a plan in the order of its stages, and the span of each stage server by address.

  Raises: ValueError: layers that are not the model's, a host without an address or with two stages, or
    layers that several places hold.
  """
  if plan.is_replicated:
    raise ValueError(
      "the plan lets several places hold the same layers, and a running pipeline has each layer once: "
      "plan with --replicas 1"
    )
  stages = sorted(plan.stages, key=lambda stage: stage.first_layer)
  first = 0
  for stage in stages:
    if stage.first_layer != first or stage.last_layer < first:
      raise ValueError(
        f"the plan's stage on {stage.label} holds layers {stage.first_layer}..{stage.last_layer}, and "
        f"layer {first} is the next to be placed: plan again, or correct the file"
      )
    first = stage.last_layer + 1
  if first != config.num_layers:
    raise ValueError(
      f"the plan places {first} layers and the model has {config.num_layers}: it was made for another model, "
      "plan again"
    )
  spans: dict[str, Span] = {}
  hosts = []
  for stage in stages:
    if stage.address is None:
      raise ValueError(
        f"the plan's host {stage.label} has no address: write the host:port of its stage server into "
        "the fleet file and plan again"
      )
    if stage.address in spans:
      raise ValueError(
        f"the plan has two stages on {stage.host}, and the stage server at {stage.address} runs one: "
        "start one for each device, and list each as a host of its own"
      )
    spans[stage.address] = Span(
      first_layer=stage.first_layer, last_layer=stage.last_layer, num_layers=config.num_layers
    )
    hosts.append(Host(name=stage.label, address=stage.address))
  return Fleet(hosts=tuple(hosts)), spans
