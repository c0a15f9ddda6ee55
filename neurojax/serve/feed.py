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

  Example: `async with Feed(streams) as feed: while (items := await feed.next()) is not None: ...`
  """

  def __init__(self, streams: Sequence[AsyncGenerator[T, None]]):
    self._streams = streams
    self._items: list[tuple[int, T]] = []
    self._error: BaseException | None = None
    self._left = len(streams)
    self._came = asyncio.Event()
    self._tasks: list[asyncio.Task[None]] = []

  async def __aenter__(self) -> Self:
    self._tasks = [
      asyncio.create_task(self._pump(number, stream)) for number, stream in enumerate(self._streams)
    ]
    return self

  async def __aexit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    for task in self._tasks:
      task.cancel()
    if self._tasks:
      await asyncio.wait(self._tasks)

  async def next(self, timeout_s: float | None = None) -> list[tuple[int, T]] | None:
    """All items that came since the last call, each with the number of its stream.

    Returns: None at the end of all streams; an empty list if nothing came in time.
    Raises: what a stream raised, after the items before it.
    """
    while not self._items:
      if self._error is not None:
        raise self._error
      if not self._left:
        return None
      self._came.clear()
      try:
        async with asyncio.timeout(timeout_s):
          await self._came.wait()
      except TimeoutError:
        return []
    items, self._items = self._items, []
    return items

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
