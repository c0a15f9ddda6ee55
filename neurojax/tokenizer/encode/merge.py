"""Byte-pair merging of text without word boundaries, where every merge is tried everywhere."""

import functools
import heapq
import itertools
import operator
from collections.abc import Callable, Iterable

# Longer parts are hardly ever seen twice.
_CACHED_LENGTH = 64


def merge(text: str, rank: Callable[[str, str], float | None]) -> tuple[str, ...]:
  """Joins neighbouring pieces of text, the lowest rank first, the leftmost among equals.

  Args:
    text: The text, whose characters are the first pieces.
    rank: Returns the rank of joining two neighbours, or None where they do not join.
  Returns: The pieces that are left, which make up the text.
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
  """Merges whole texts quickly: it cuts where no merge can reach across, and remembers the parts.

  Args:
    rank: The function that `merge` takes.
    joints: Two-character strings. A merge joins pieces only where the text has one of them.
  """

  def __init__(self, rank: Callable[[str, str], float | None], joints: Iterable[str]):
    self._joints = frozenset(joints)
    self._rank = rank
    self._cached = functools.lru_cache(maxsize=1 << 16)(functools.partial(merge, rank=rank))

  def pieces(self, text: str) -> list[str]:
    """Returns the pieces of `merge(text, rank)`."""
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
