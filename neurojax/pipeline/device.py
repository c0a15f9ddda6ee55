"""The thread of a stage server that computes."""

import asyncio
import concurrent.futures
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class DeviceThread:
  """One thread, the only one that touches the device: work that comes later waits its turn.

  Attributes:
    busy_since_s: When the work under way began, on the monotonic clock; None if none is, or if it may
      take as long as it likes.
  """

  def __init__(self):
    self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="neurojax-stage")
    self.busy_since_s: float | None = None

  async def do(self, work: Callable[[], T], *, timed: bool = True) -> T:
    """Run `work` there and wait for its result."""

    def run() -> T:
      self.busy_since_s = time.monotonic() if timed else None
      try:
        return work()
      finally:
        self.busy_since_s = None

    return await asyncio.get_running_loop().run_in_executor(self._pool, run)

  def end(self) -> None:
    """Start no work any more."""
    self._pool.shutdown(wait=False, cancel_futures=True)
