"""One request in a batch: its place in the queue, and what came of it."""

import asyncio
from collections import deque
from typing import Generic, TypeVar

from neurojax.engine.api import Scores, Token

S = TypeVar("S")


class Ticket(Generic[S]):
  """One request: what came of it, for whoever waits.

  Attributes:
    sequences: Its answers.
    priority, number: Its place in the queue.
    arrived_s: When it came.
    has_begun: Whether one of its sequences ever had a slot.
    is_over: Whether nothing more comes.
    freed: Set while none of its sequences has a slot.
  """

  def __init__(self, priority: int, number: int, arrived_s: float):
    self.priority, self.number, self.arrived_s = priority, number, arrived_s
    self.sequences: list[S] = []
    self.has_begun = self.is_over = False
    self.held = 0
    self.freed = asyncio.Event()
    self.freed.set()
    self._items: deque[Token | Scores | Exception] = deque()
    self._waiter: asyncio.Future[None] | None = None

  def post(self, item: Token | Scores | Exception) -> None:
    """Hand something to whoever waits; an exception ends the request."""
    self._items.append(item)
    if self._waiter is not None and not self._waiter.done():
      self._waiter.set_result(None)

  async def next(self) -> Token | Scores:
    """The next thing that came. Raises: what ended the request."""
    while not self._items:
      self._waiter = asyncio.get_running_loop().create_future()
      await self._waiter
    item = self._items.popleft()
    if isinstance(item, Exception):
      raise item
    return item

  def hold(self) -> None:
    """A sequence takes a slot."""
    self.held += 1
    self.has_begun = True
    self.freed.clear()

  def let_go(self) -> None:
    """The slot of a sequence is free."""
    self.held -= 1
    if not self.held:
      self.freed.set()
