"""A plan as running stage servers can have it. Imports no JAX."""

from collections.abc import Mapping
from pathlib import Path

from neurojax.config import ModelConfig, Span, from_toml
from neurojax.scaling.fleet import Fleet, Host
from neurojax.scaling.placements import Plan


def read_plan(path: str | Path) -> Plan:
  """What `neurojax plan --toml` printed.

  Raises: ValueError: not such a file. OSError: it cannot be read.
  """
  try:
    text = Path(path).read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from error
  return from_toml(Plan, text, where=str(path))


def servers(plan: Plan, config: ModelConfig) -> tuple[Fleet, Mapping[str, Span]]:
  """The hosts of a plan in the order of its stages, and which layers the server at each address is to hold.

  Raises: ValueError: layers that are not the model's, a host without an address or with two stages, or
    layers that lie more than once.
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
        f"layer {first} is the next to be placed: plan again, or mend the file"
      )
    first = stage.last_layer + 1
  if first != config.num_layers:
    raise ValueError(
      f"the plan places {first} layers and the model has {config.num_layers}: it is of another model"
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
