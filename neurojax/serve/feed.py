"""Merges streams, and hands over all that has come at once."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Feed(Generic[T]):
  """Runs several asynchronous generators at the same time. Leaving it ends them, and waits for that.

  Use as a context manager.

  Args:
    idle_s: Seconds in which nothing comes, up to twice as many, after which `next` says so.

  Example: `async with Feed(streams) as feed: while (items := await feed.next()) is not None: ...`
  """

  def __init__(self, streams: Sequence[AsyncGenerator[T, None]], *, idle_s: float | None = None):
    self._streams, self._idle_s = streams, idle_s
    # One timer that is set anew once in a while: a timer for each item would cost as much as the item.
    self._timer: asyncio.TimerHandle | None = None
    self._has_ticked = False
    self._items: list[tuple[int, T]] = []
    self._error: BaseException | None = None
    self._left = len(streams)
    self._came = asyncio.Event()
    self._tasks: list[asyncio.Task[None]] = []

  async def __aenter__(self) -> Self:
    self._tasks = [
      asyncio.create_task(self._pump(number, stream)) for number, stream in enumerate(self._streams)
    ]
    self._tick()
    self._has_ticked = False
    return self

  async def __aexit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    if self._timer is not None:
      self._timer.cancel()
    for task in self._tasks:
      task.cancel()
    if self._tasks:
      await asyncio.wait(self._tasks)

  async def next(self) -> list[tuple[int, T]] | None:
    """All items that came since the last call, each with the number of its stream.

    Returns: None at the end of all streams; an empty list if nothing came for `idle_s`.
    Raises: what a stream raised, after the items before it.
    """
    self._has_ticked = False
    while not self._items:
      if self._error is not None:
        raise self._error
      if not self._left:
        return None
      if self._has_ticked:
        return []
      self._came.clear()
      await self._came.wait()
    items, self._items = self._items, []
    return items

  def _tick(self) -> None:
    if self._idle_s is not None:
      self._has_ticked = True
      self._came.set()
      self._timer = asyncio.get_running_loop().call_later(self._idle_s, self._tick)

  async def _pump(self, number: int, stream: AsyncGenerator[T, None]) -> None:
    try:
      async with contextlib.aclosing(stream):
        async for item in stream:
          self._items.append((number, item))
          self._came.set()
      self._left -= 1
    except Exception as error:
      self._error = self._error or error
    finally:
      self._came.set()
