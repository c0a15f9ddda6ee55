"""One event loop in a thread of its own, so that blocking calls work beside a running loop too."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Runner:
  """Runs coroutines on its own loop for callers in any thread, with or without a loop of their own."""

  def __init__(self) -> None:
    self._loop = asyncio.new_event_loop()
    self._is_open, self._lock = True, threading.Lock()
    self._thread = threading.Thread(target=self._run, name="neurojax-face", daemon=True)
    self._thread.start()

  def _run(self) -> None:
    asyncio.set_event_loop(self._loop)
    self._loop.run_forever()
    # Nothing new comes in any more; what came in before is cancelled and ends in order.
    while tasks := self._loop.run_until_complete(_others()):
      for task in tasks:
        task.cancel()
      self._loop.run_until_complete(asyncio.wait(tasks))
    self._loop.run_until_complete(self._loop.shutdown_asyncgens())
    self._loop.close()

  def _submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
    with self._lock:
      if self._is_open:
        return asyncio.run_coroutine_threadsafe(work, self._loop)
    work.close()
    raise _closed()

  def call(self, work: Coroutine[Any, Any, T]) -> T:
    """Wait for a coroutine. An interrupt (Ctrl-C) cancels it."""
    future = self._submit(work)
    try:
      return future.result()
    except concurrent.futures.CancelledError:
      raise _closed() from None
    except BaseException:
      if not future.done():
        future.cancel()
      raise

  async def wait(self, work: Coroutine[Any, Any, T]) -> T:
    """Await a coroutine from another loop; cancelling the caller cancels it."""
    future = self._submit(work)
    try:
      return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
      if future.cancelled() and not self._is_open:
        raise _closed() from None
      raise

  def iterate(self, stream: AsyncGenerator[T, None]) -> Iterator[T]:
    """The items of an asynchronous generator; leaving early closes it."""
    items: queue.SimpleQueue[_Item[T] | None] = queue.SimpleQueue()
    pump = self.call(_spawn(stream, items.put))
    try:
      # The caller's thread does nothing but wait, so that Ctrl-C hits nothing else.
      while (item := items.get()) is not None:
        yield item.get()
    finally:
      with contextlib.suppress(ValueError):
        self.call(_end(pump))

  async def follow(self, stream: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """The same from another loop."""
    loop = asyncio.get_running_loop()
    items: asyncio.Queue[_Item[T] | None] = asyncio.Queue()

    def put(item: _Item[T] | None) -> None:
      # The caller's loop may have ended in the meantime.
      with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(items.put_nowait, item)

    pump = await self.wait(_spawn(stream, put))
    try:
      while (item := await items.get()) is not None:
        yield item.get()
    finally:
      with contextlib.suppress(ValueError):
        await asyncio.shield(self.wait(_end(pump)))

  def stop(self) -> None:
    """End the loop. What still runs on it is cancelled."""
    with self._lock:
      if not self._is_open:
        return
      self._is_open = False
      self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join(5.0)


def _closed() -> ValueError:
  return ValueError("the model is closed: load it again")


async def _others() -> set[asyncio.Task[Any]]:
  """Tasks of this loop beside the one that asks, after what was scheduled has begun."""
  await asyncio.sleep(0)
  return asyncio.all_tasks() - {asyncio.current_task()}  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class _Item(Generic[T]):
  """An item of a stream, or the error that ended it."""

  value: T | None
  error: BaseException | None = None

  def get(self) -> T:
    if self.error is not None:
      raise self.error
    return self.value  # type: ignore[return-value]


async def _spawn(
  stream: AsyncGenerator[T, None], put: Callable[[_Item[T] | None], object]
) -> asyncio.Task[None]:
  return asyncio.create_task(_pump(stream, put))


async def _pump(stream: AsyncGenerator[T, None], put: Callable[[_Item[T] | None], object]) -> None:
  """Hand over the items of a stream as they come, and None at its end; nobody is waited for."""
  try:
    async with contextlib.aclosing(stream):
      async for item in stream:
        put(_Item(item))
    put(None)
  except asyncio.CancelledError:
    put(_Item(None, _closed()))
    raise
  except Exception as error:
    put(_Item(None, error))


async def _end(pump: asyncio.Task[None]) -> None:
  """Cancel a stream, and wait until it has cleaned up."""
  pump.cancel()
  await asyncio.wait([pump])
