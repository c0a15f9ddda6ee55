"""Random small fleets and models for the planner's tests, and every plan there is of the smallest."""

import itertools
import math
from collections.abc import Iterator

from hypothesis import strategies as st

from neurojax.config import ModelConfig, Serving
from neurojax.count.serving import Load, stage_bytes
from neurojax.plan.assemble import assemble
from neurojax.plan.fleet import Device, Fleet, Host, Link
from neurojax.plan.plan import Objective
from neurojax.plan.problem import Problem

LOAD = Load(serving=Serving(weights="dense", context=256, sequences=2), working=False)


def config(num_layers: int, tied: bool = True) -> ModelConfig:
  return ModelConfig(
    vocab_size=512,
    model_dim=64,
    num_layers=num_layers,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_dim=128,
    tied_embedding=tied,
  )


def device(memory_bytes: int, read: float = 1e9, overhead_s: float = 0.0) -> Device:
  return Device(
    kind="cuda",
    memory_bytes=memory_bytes,
    read_bytes_per_s=read,
    flops_per_s=1e12,
    step_overhead_s=overhead_s,
  )


@st.composite
def fleets(
  draw: st.DrawFn,
  *,
  most_hosts: int = 6,
  most_places: int = 8,
  pinned: bool = False,
  linked: bool = True,
) -> Fleet:
  hosts: list[Host] = []
  left = most_places
  for index in range(draw(st.integers(1, most_hosts))):
    if not left:
      break
    number = draw(st.integers(1, min(3, left))) if draw(st.integers(0, 3)) == 0 else 1
    left -= number
    devices = [
      device(
        draw(st.sampled_from([300_000, 700_000, 1_500_000, 3_000_000, 20_000_000])),
        draw(st.sampled_from([1e8, 1e9, 3e9])),
        draw(st.sampled_from([0.0, 1e-4])),
      )
      for _ in range(number)
    ]
    pin = draw(st.sampled_from([None, None, 0, 1, 2])) if pinned else None
    hosts.append(Host(name=f"h{index}", devices=tuple(devices), layers=pin))
  names = [host.label for host in hosts]
  pairs = list(itertools.combinations(names, 2))
  chosen = (
    draw(st.lists(st.sampled_from(pairs), unique=True, max_size=6)) if pairs and linked else []
  )
  links = [
    Link(
      hosts=pair,
      latency_s=draw(st.sampled_from([1e-5, 2e-4, 1e-3])),
      bytes_per_s=draw(st.sampled_from([1e5, 1e6, 1e9])),
    )
    for pair in chosen
  ]
  return Fleet(
    hosts=tuple(hosts),
    links=tuple(links),
    latency_s=draw(st.sampled_from([5e-5, 3e-4])),
    coordinator=draw(st.sampled_from([None, *names])),
  )


def every_chain(given: Problem) -> Iterator[list[tuple[int, int]]]:
  """All orders of all subsets of the places, with all divisions of the layers, that fit and keep the pins."""
  total = given.num_layers
  for number in range(1, min(total, len(given.places)) + 1):
    for cuts in itertools.combinations(range(1, total), number - 1):
      counts = [b - a for a, b in zip((0, *cuts), (*cuts, total), strict=True)]
      for places in itertools.permutations(range(len(given.places)), number):
        chain = list(zip(places, counts, strict=True))
        if _is_valid(given, chain):
          yield chain


def _is_valid(given: Problem, chain: list[tuple[int, int]]) -> bool:
  held: dict[str, int] = {}
  first = 0
  for number, layers in chain:
    place = given.places[number]
    if stage_bytes(given.config, given.span(first, layers), given.load) > place.free_bytes:
      return False
    for label in {place.label, place.host.label}:
      held[label] = held.get(label, 0) + layers
    first += layers
  return all(held.get(label, 0) == layers for label, layers in given.pins.items())


def brute(given: Problem, objective: Objective) -> float:
  """Seconds per token, alone or in a stream, of the best of all plans; infinite without any."""
  best = math.inf
  for chain in every_chain(given):
    made = assemble(given, [chain], objective=objective, method="all")
    best = min(best, made.latency_s if objective == "latency" else given.batch / made.throughput)
  return best
