"""The places for kept blocks on a stage server, which belong to one coordinator at a time."""

from collections.abc import Iterable

from neurojax.pipeline.onward import Outlet


class Places:
  """Knows whose the places are, and which hold a block.

  The first link that asks gets all of them until it ends: coordinators number places as they like, and
  what one of them kept would be another prompt to the next.
  """

  def __init__(self):
    self._owner: Outlet | None = None
    self._kept: set[int] = set()

  def ask(self, outlet: Outlet, number: int) -> int:
    """Grant a link so many places, or none if another link has them. Returns: The number."""
    if not number or self._owner not in (None, outlet):
      return 0
    self._owner = outlet
    return number

  def leave(self, outlet: Outlet) -> None:
    """Take back the places of a link that has ended."""
    if self._owner is outlet:
      self.clear()

  def clear(self) -> None:
    """Grant nothing any more, and forget what is kept."""
    self._owner, self._kept = None, set()

  def check_restore(self, outlet: Outlet, places: Iterable[int]) -> None:
    """Raises: ValueError: a place is not the link's own, or holds no block."""
    self.check_granted(outlet, places)
    for place in places:
      if place not in self._kept:
        raise ValueError(f"place {place} holds no block")

  def check_granted(self, outlet: Outlet, places: Iterable[int]) -> None:
    """Raises: ValueError: a place is not the link's own."""
    for place in places:
      if self._owner is not outlet:
        raise ValueError(f"place {place} is not granted to this coordinator")

  def writing(self, places: Iterable[int]) -> None:
    """Take note that blocks are being replaced."""
    self._kept.difference_update(places)

  def written(self, outlet: Outlet, places: Iterable[int]) -> None:
    """Take note that a step of the link's has written blocks."""
    if self._owner is outlet:
      self._kept.update(places)
