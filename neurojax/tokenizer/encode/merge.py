"""Byte-pair merging of text without word boundaries, where every merge is tried everywhere."""

import functools
import heapq
import itertools
import operator
from collections.abc import Callable, Iterable

# Longer stretches are hardly ever seen twice.
_CACHED_LENGTH = 64


def merge(text: str, rank: Callable[[str, str], float | None]) -> tuple[str, ...]:
  """Joins neighbouring pieces of text, lowest rank first and leftmost among equals.

  Args:
    text: Its characters are the first pieces.
    rank: The rank of joining two neighbours, or None where they do not join.
  Returns: The pieces that are left; together they are the text.
  Source: Sennrich et al., arXiv:1508.07909; O(n log n) by a queue of candidate pairs.
  """
  size = len(text)
  # Piece i, while alive, is text[i : end[i]]; right[i] is the piece after it, or size.
  end = list(range(1, size + 1))
  right = list(range(1, size + 1))
  left = list(range(-1, size - 1))
  alive = [True] * size
  queue: list[tuple[float, int, int]] = []

  def propose(i: int, j: int):
    value = rank(text[i : end[i]], text[j : end[j]])
    if value is not None:
      heapq.heappush(queue, (value, i, end[j]))

  for i in range(size - 1):
    propose(i, i + 1)
  while queue:
    _, i, stop = heapq.heappop(queue)
    # A pair is stale once either side took part in another merge.
    if not alive[i] or (j := right[i]) >= size or end[j] != stop:
      continue
    alive[j] = False
    end[i] = stop
    right[i] = right[j]
    if right[i] < size:
      left[right[i]] = i
      propose(i, right[i])
    if left[i] >= 0:
      propose(left[i], i)
  return tuple(text[i : end[i]] for i in range(size) if alive[i])


class Merger:
  """Merges whole texts quickly: it cuts where no merge can reach across and remembers the parts.

  Attributes:
    rank: As in `merge`.
    joints: Two-character strings; a merge can only happen across a place in the text that is one.
  """

  def __init__(self, rank: Callable[[str, str], float | None], joints: Iterable[str]):
    self._joints = frozenset(joints)
    self._rank = rank
    self._cached = functools.lru_cache(maxsize=1 << 16)(functools.partial(merge, rank=rank))

  def pieces(self, text: str) -> list[str]:
    """The pieces of `merge(text, rank)`."""
    pairs = map(operator.add, text, itertools.islice(text, 1, None))
    joints = self._joints
    cuts = [i for i, pair in enumerate(pairs, 1) if pair not in joints]
    pieces: list[str] = []
    start = 0
    for stop in itertools.chain(cuts, (len(text),)):
      if stop - start <= 1:
        pieces.append(text[start:stop])
      elif stop - start <= _CACHED_LENGTH:
        pieces.extend(self._cached(text[start:stop]))
      else:
        pieces.extend(merge(text[start:stop], self._rank))
      start = stop
    return [piece for piece in pieces if piece]
