"""One event loop in a thread of its own, so that blocking calls work beside a running loop too."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")


class Runner:
  """Runs coroutines on its own loop for callers in any thread, with or without a loop of their own."""

  def __init__(self) -> None:
    self._loop = asyncio.new_event_loop()
    self._is_open, self._lock = True, threading.Lock()
    self._dropped: list[asyncio.Task[None]] = []
    self._tasks: list[asyncio.Task[None]] = []
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

  def iterate(self, stream: AsyncGenerator[T, None]) -> "Items[T]":
    """The items of an asynchronous generator; the iterator's `close` ends it early."""
    return Items(self, stream)

  async def follow(self, stream: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """The same from another loop."""
    loop = asyncio.get_running_loop()
    items: asyncio.Queue[_Item[T] | None] = asyncio.Queue()

    def put(item: _Item[T] | None) -> None:
      # The caller's loop may have ended in the meantime.
      with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(items.put_nowait, item)

    pump = await self.wait(self._spawn(stream, put))
    try:
      while (item := await items.get()) is not None:
        yield item.get()
    finally:
      with contextlib.suppress(ValueError):
        await asyncio.shield(self.wait(_end(pump)))

  async def _spawn(
    self, stream: AsyncGenerator[T, None], put: "Callable[[_Item[T] | None], object]"
  ) -> asyncio.Task[None]:
    # Streams that were dropped first give back their places.
    if ending := [pump for pump in self._dropped if not pump.done()]:
      await asyncio.wait(ending)
    self._dropped.clear()
    return asyncio.create_task(_pump(stream, put))

  def drop(self, pump: asyncio.Task[None]) -> None:
    """End a stream without waiting: for finalizers, which run in any thread, at any moment."""

    def cancel() -> None:
      self._dropped.append(pump)
      pump.cancel()

    self._soon(cancel)

  def abandon(self, stack: contextlib.AsyncExitStack, file: "Closable") -> None:
    """Free what was opened, and end the loop, without waiting: for finalizers."""

    async def shut() -> None:
      try:
        await stack.aclose()
      finally:
        file.close()
        self._is_open = False
        self._loop.stop()

    self._soon(lambda: self._tasks.append(self._loop.create_task(shut())))

  def _soon(self, work: Callable[[], object]) -> None:
    # The loop may be closed by now; no lock is taken.
    with contextlib.suppress(RuntimeError):
      self._loop.call_soon_threadsafe(work)

  def stop(self) -> None:
    """End the loop. What still runs on it is cancelled."""
    with self._lock:
      if not self._is_open:
        return
      self._is_open = False
      self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join(5.0)


class Closable(Protocol):
  def close(self) -> None: ...


class Items(Iterator[T]):
  """An iterator over what an asynchronous generator on the runner's loop gives."""

  def __init__(self, runner: Runner, stream: AsyncGenerator[T, None]):
    self._runner, self._stream = runner, stream
    self._items: queue.SimpleQueue[_Item[T] | None] = queue.SimpleQueue()
    self._pump: asyncio.Task[None] | None = None
    self._is_over = False

  def __next__(self) -> T:
    if self._is_over:
      raise StopIteration
    if self._pump is None:
      self._pump = self._runner.call(self._runner._spawn(self._stream, self._items.put))
    # The caller's thread does nothing but wait, so that Ctrl-C hits nothing else.
    item = self._items.get()
    if item is None:
      self._is_over = True
      raise StopIteration
    self._is_over = item.error is not None
    return item.get()

  def close(self) -> None:
    """End the generator, and wait until it has cleaned up."""
    if self._pump is not None and not self._is_over:
      self._is_over = True
      with contextlib.suppress(ValueError):
        self._runner.call(_end(self._pump))
    self._is_over = True

  def __del__(self) -> None:
    if self._pump is not None and not self._is_over:
      self._runner.drop(self._pump)


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
