"""One event loop in a thread of its own, so that blocking calls work beside a running loop too."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Runner:
  """Runs coroutines on its own loop for callers in any thread, with or without a loop of their own."""

  def __init__(self) -> None:
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(target=self._run, name="neurojax-face", daemon=True)
    self._thread.start()

  def _run(self) -> None:
    asyncio.set_event_loop(self._loop)
    self._loop.run_forever()
    with contextlib.suppress(RuntimeError):
      self._loop.run_until_complete(self._loop.shutdown_asyncgens())
    self._loop.close()

  def call(self, work: Coroutine[Any, Any, T]) -> T:
    """Wait for a coroutine. An interrupt (Ctrl-C) cancels it, waits until it has cleaned up, and goes on."""
    if not self._thread.is_alive():
      work.close()
      raise ValueError("the model is closed: load it again")
    future = asyncio.run_coroutine_threadsafe(work, self._loop)
    try:
      return future.result()
    except BaseException:
      if not future.done():
        future.cancel()
      raise

  async def wait(self, work: Coroutine[Any, Any, T]) -> T:
    """Await a coroutine from another loop; cancelling the caller cancels it."""
    if not self._thread.is_alive():
      work.close()
      raise ValueError("the model is closed: load it again")
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

  def iterate(self, stream: AsyncGenerator[T, None]) -> Iterator[T]:
    """The items of an asynchronous generator; leaving early closes it."""
    source = _Source(stream)
    try:
      while True:
        try:
          yield self.call(source.next())
        except _End:
          return
    finally:
      if self._thread.is_alive():
        self.call(source.close())

  async def follow(self, stream: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """The same from another loop."""
    source = _Source(stream)
    try:
      while True:
        try:
          yield await self.wait(source.next())
        except _End:
          return
    finally:
      if self._thread.is_alive():
        await asyncio.shield(self.wait(source.close()))

  def stop(self) -> None:
    """End the loop. What still runs on it is cancelled."""
    if self._thread.is_alive():
      self._loop.call_soon_threadsafe(self._cancel)
      self._thread.join(5.0)

  def _cancel(self) -> None:
    for task in asyncio.all_tasks(self._loop):
      task.cancel()
    self._loop.call_soon(self._loop.stop)


class _End(Exception):
  """A stream has no more items. StopAsyncIteration itself cannot leave a coroutine."""


class _Source(Generic[T]):
  """An asynchronous generator whose closing waits until a cancelled step has cleaned up."""

  def __init__(self, stream: AsyncGenerator[T, None]):
    self._stream, self._turn = stream, asyncio.Lock()

  async def next(self) -> T:
    async with self._turn:
      try:
        return await anext(self._stream)
      except StopAsyncIteration:
        raise _End from None

  async def close(self) -> None:
    async with self._turn:
      await self._stream.aclose()
