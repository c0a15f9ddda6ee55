"""In which order the layers of several stacks run, in as few loops as may be."""

import dataclasses
import itertools

from neurojax.config import ModelConfig, Span
from neurojax.model import params


@dataclasses.dataclass(frozen=True)
class Run:
  """Layers of one stack, one after the other.

  Attributes:
    first: Place in its stack of the first, in the first round.
    stride: By how much that moves from one round to the next.
  """

  stack: str
  first: int
  count: int
  stride: int = 0


@dataclasses.dataclass(frozen=True)
class Rounds:
  """Runs that come in turn, and then over again."""

  runs: tuple[Run, ...]
  count: int = 1


def rounds(config: ModelConfig, span: Span) -> list[Rounds]:
  """The layers of a span in their order.

  What repeats is one entry: a program then holds each of its runs once, however many layers there
  are.
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
  """Length and number of the repeats at the beginning that cover most; (1, 1) if nothing repeats."""
  best = (1, 1)
  for unit in range(2, len(runs) // 2 + 1):
    count = 1
    while runs[count * unit : (count + 1) * unit] == runs[:unit]:
      count += 1
    if count > 1 and unit * count > best[0] * best[1]:
      best = (unit, count)
  return best
