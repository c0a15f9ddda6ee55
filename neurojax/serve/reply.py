"""Replies that are computed while the client is watched: one that goes away ends its work."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, MutableMapping
from typing import Any

import msgspec

from neurojax.serve.errors import ApiError, as_api_error

_LOG = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Work = Coroutine[Any, Any, bytes] | AsyncGenerator[bytes, None]

_EVENTS = [
  (b"content-type", b"text/event-stream; charset=utf-8"),
  (b"cache-control", b"no-cache"),
  (b"x-accel-buffering", b"no"),
]
DONE = b"data: [DONE]\n\n"


class Reply:
  """An ASGI answer: a JSON body, or server-sent events as an asynchronous generator yields them.

  What goes wrong before the first bytes is an error with its status; later it is an event with the
  error, and the stream is ended with `[DONE]` all the same.

  Args:
    most_s: Seconds that it may take.

  Attributes:
    status: What was answered; 499 if the client went away.
  """

  def __init__(self, work: Work, *, most_s: float):
    self._work, self._most_s = work, most_s
    self.status = 499
    self._has_begun = False

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    watch = asyncio.create_task(_gone(receive))
    work = asyncio.create_task(self._answer(send))
    try:
      await asyncio.wait({watch, work}, return_when=asyncio.FIRST_COMPLETED)
    finally:
      for task in (watch, work):
        task.cancel()
      await asyncio.wait({watch, work})
    scope.setdefault("state", {})["status"] = self.status
    if not work.cancelled() and (error := work.exception()) is not None:
      raise error

  async def _answer(self, send: Send) -> None:
    try:
      async with asyncio.timeout(self._most_s):
        if isinstance(self._work, AsyncGenerator):
          await self._stream(self._work, send)
        else:
          await _send_body(send, 200, await self._work)
          self.status = 200
    except TimeoutError:
      message = f"the answer took longer than {self._most_s:g} s, as long as one may"
      headers = {"x-should-retry": "false"}
      await self._fail(ApiError(504, message, code="timeout", headers=headers), send)
    except OSError:
      raise asyncio.CancelledError from None
    except Exception as error:
      failure = as_api_error(error)
      if failure.code == "internal_error":
        _LOG.exception("a request failed")
      await self._fail(failure, send)

  async def _stream(self, work: AsyncGenerator[bytes, None], send: Send) -> None:
    async with contextlib.aclosing(work):
      async for part in work:
        if not part:
          continue
        if not self._has_begun:
          self._has_begun, self.status = True, 200
          await send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})

  async def _fail(self, error: ApiError, send: Send) -> None:
    self.status = error.status
    if not self._has_begun:
      await send_error(send, error)
      return
    event = b"data: " + error.body() + b"\n\n" + DONE
    await send({"type": "http.response.body", "body": event, "more_body": False})


async def send_error(send: Send, error: ApiError) -> None:
  """Send an error as the whole answer."""
  headers = [(k.encode(), v.encode()) for k, v in error.headers.items()]
  await _send_body(send, error.status, error.body(), headers)


async def _send_body(
  send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
  head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
  await send({"type": "http.response.start", "status": status, "headers": head + (headers or [])})
  await send({"type": "http.response.body", "body": body, "more_body": False})


async def _gone(receive: Receive) -> None:
  """Wait until the client goes away."""
  while (await receive())["type"] != "http.disconnect":
    pass


def event(table: object) -> bytes:
  """A server-sent event."""
  return b"data: " + msgspec.json.encode(table) + b"\n\n"


COMMENT = b": waiting\n\n"
"""Keeps a connection open while nothing comes; clients skip it."""
