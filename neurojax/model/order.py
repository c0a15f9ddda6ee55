"""Orders the layers of several stacks into as few loops as possible."""

import dataclasses
import itertools

from neurojax.config import ModelConfig, Span
from neurojax.model import params


@dataclasses.dataclass(frozen=True)
class Run:
  """Consecutive layers of one stack.

  Attributes:
    stack: Name of the stack.
    first: Index in the stack of the run's first layer, in the first round.
    count: Number of layers.
    stride: What is added to `first` from one round to the next.
  """

  stack: str
  first: int
  count: int
  stride: int = 0


@dataclasses.dataclass(frozen=True)
class Rounds:
  """A sequence of runs that is repeated.

  Attributes:
    runs: The runs of one round.
    count: Number of rounds.
  """

  runs: tuple[Run, ...]
  count: int = 1


def rounds(config: ModelConfig, span: Span) -> list[Rounds]:
  """Groups the layers of a span, in their order, into repeated runs.

  What repeats is one entry: a program then holds each of its runs once, whatever the number of layers.
  """
  owner = {layer: stack.name for stack in params.stacks(config, span) for layer in stack.layers}
  names = [owner[layer] for layer in range(span.first_layer, span.last_layer + 1)]
  runs = [(name, len(list(group))) for name, group in itertools.groupby(names)]
  done = dict.fromkeys(names, 0)
  found = []
  while runs:
    unit, count = _best_repeat(runs)
    stride = {name: sum(n for other, n in runs[:unit] if other == name) for name in done}
    members = []
    place = dict(done)
    for name, n in runs[:unit]:
      members.append(Run(name, place[name], n, stride[name] if count > 1 else 0))
      place[name] += n
    found.append(Rounds(tuple(members), count))
    done = {name: done[name] + count * stride[name] for name in done}
    runs = runs[unit * count :]
  return found


def _best_repeat(runs: list[tuple[str, int]]) -> tuple[int, int]:
  """Length and number of the repeats at the beginning that cover most runs; (1, 1): nothing repeats."""
  best = (1, 1)
  for unit in range(2, len(runs) // 2 + 1):
    count = 1
    while runs[count * unit : (count + 1) * unit] == runs[:unit]:
      count += 1
    if count > 1 and unit * count > best[0] * best[1]:
      best = (unit, count)
  return best
