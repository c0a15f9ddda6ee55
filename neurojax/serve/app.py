"""The routes of the server, and what every request passes on its way to them."""

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from neurojax.engine.api import EngineError
from neurojax.serve import chat, completions, responses, small
from neurojax.serve.errors import ApiError, as_api_error
from neurojax.serve.reply import Receive, Reply, Scope, Send, send_error
from neurojax.serve.requests import Chat, Completion, Detokenize, Tokenize, read
from neurojax.serve.responses import Responses
from neurojax.serve.served import Served

_LOG = logging.getLogger(__name__)
T = TypeVar("T", bound=msgspec.Struct)
_OURS = (ValueError, EngineError, NotImplementedError, Exception)
PATHS = frozenset(
  {
    "/v1/responses", "/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/detokenize",
    "/tokenizer_info", "/health", "/version", "/metrics",
  }
)  # fmt: skip
LONG_BODY = 1 << 15
"""Bytes of a body whose text is cut into tokens in a thread of its own."""
NOT_SERVED = (
  "/v1/embeddings", "/v1/audio/transcriptions", "/v1/images/generations",
  "/v1/moderations", "/v1/files", "/v1/batches",
)  # fmt: skip
"""Endpoints of OpenAI's that are refused by name."""
OPEN_PATHS = ("/health",)
"""Paths that need no key: whatever watches the server asks them."""


class Door:
  """What every request passes: it is counted, named, timed, and refused without a key or while draining.

  Args:
    keys: Keys of which every request has to bring one; none lets all in.
    count: Called with the path and the status of every request.

  Attributes:
    under_way: Requests that are being answered.
    is_draining: Whether nothing new is taken.
  """

  def __init__(
    self,
    inner: Any,
    *,
    keys: Sequence[str] = (),
    count: Callable[[str, int], None] = lambda path, status: None,
  ):
    self._inner, self._count = inner, count
    self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]
    self.under_way = 0
    self.is_draining = False
    self._idle = asyncio.Event()
    self._idle.set()

  async def idle(self) -> None:
    """Wait until nothing is under way."""
    await self._idle.wait()

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1000})
      return
    headers = dict(scope["headers"])
    name = _request_id(headers.get(b"x-request-id"))
    scope.setdefault("state", {})["request_id"] = name
    began_s, status = time.perf_counter(), 0

    async def named(message: Any) -> None:
      nonlocal status
      if message["type"] == "http.response.start":
        status = message["status"]
        message["headers"] = [*message.get("headers", ()), (b"x-request-id", name.encode())]
      await send(message)

    self.under_way += 1
    self._idle.clear()
    try:
      if (error := self._refusal(scope, headers)) is not None:
        await send_error(named, error)
        return
      await self._inner(scope, receive, named)
    except Exception as error:
      _LOG.exception("a request failed")
      if not status:
        await send_error(named, as_api_error(error))
    finally:
      self.under_way -= 1
      if not self.under_way:
        self._idle.set()
      status = scope["state"].get("status", status)
      self._count(_path(scope["path"]), status)
      _log(scope, name, status, time.perf_counter() - began_s)

  def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> ApiError | None:
    if self.is_draining:
      message = "the server is ending: ask another one, or a little later"
      return ApiError(503, message, code="draining", headers={"retry-after": "1"})
    # A browser asks beforehand what it may send, and has no key then.
    if not self._keys or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
      return None
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    given = hashlib.sha256(key.strip()).digest()
    # Every key is compared, so that the time tells nothing.
    matches = [hmac.compare_digest(given, known) for known in self._keys]
    if scheme.lower() == b"bearer" and any(matches):
      return None
    message = "the API key is missing or wrong: send `Authorization: Bearer KEY`"
    headers_ = {"www-authenticate": "Bearer"}
    return ApiError(401, message, code="invalid_api_key", headers=headers_)


def _path(path: str) -> str:
  """A path as a label: of few values, whatever is asked for."""
  if path.startswith("/v1/models/"):
    return "/v1/models/{id}"
  return path if path in PATHS else "other"


def _request_id(given: bytes | None) -> str:
  text = (given or b"").decode("latin-1")
  return text if re.fullmatch(r"[\w.:/-]{1,128}", text) else uuid.uuid4().hex


def _log(scope: Scope, name: str, status: int, took_s: float) -> None:
  """One line of JSON for a request: never what was asked or answered."""
  if _LOG.isEnabledFor(logging.INFO):
    line = {
      "request": name,
      "method": scope["method"],
      "path": scope["path"][:200],
      "status": status,
      "seconds": round(took_s, 6),
      **scope["state"].get("facts", {}),
    }
    _LOG.info("%s", json.dumps(line))


def make_app(served: Served, *, keys: Sequence[str] = (), origins: Sequence[str] = ()) -> Door:
  """The server as an ASGI application.

  Args:
    keys: API keys; none lets every request in.
    origins: Origins whose pages in a browser may ask ("*": all); none by default.
  """
  app = Starlette(
    routes=_Endpoints(served).routes(),
    exception_handlers={kind: _told for kind in (ApiError, HTTPException, *_OURS)},
  )
  inner: Any = app
  if origins:
    inner = CORSMiddleware(
      app, allow_origins=list(origins), allow_methods=["GET", "POST"], allow_headers=["*"]
    )
  return Door(inner, keys=keys, count=served.metrics.http)


async def _told(request: Request, error: Exception) -> Response:
  if isinstance(error, HTTPException):
    found = {404: "there is no such path", 405: "the path takes another method"}
    message = found.get(error.status_code, error.detail)
    error = ApiError(error.status_code, f"{message}: {request.method} {request.url.path[:200]}")
  failure = as_api_error(error)
  return Response(
    failure.body(), failure.status, media_type="application/json", headers=failure.headers
  )


class _Endpoints:
  def __init__(self, served: Served):
    self._served = served

  def routes(self) -> list[Route]:
    return [
      Route("/v1/chat/completions", self.chat, methods=["POST"]),
      Route("/v1/completions", self.completions, methods=["POST"]),
      Route("/v1/responses", self.responses, methods=["POST"]),
      Route("/v1/models", self.models),
      Route("/v1/models/{name:path}", self.model),
      Route("/tokenize", self.tokenize, methods=["POST"]),
      Route("/detokenize", self.detokenize, methods=["POST"]),
      Route("/tokenizer_info", self.tokenizer_info),
      Route("/health", self.health),
      Route("/version", self.version),
      Route("/metrics", self.metrics),
      *[Route(path, self.refuse, methods=["GET", "POST"]) for path in NOT_SERVED],
    ]

  async def chat(self, request: Request) -> Any:
    asked = await self._read(request, Chat)
    return await self._reply(request, chat, asked)

  async def completions(self, request: Request) -> Any:
    asked = await self._read(request, Completion)
    return await self._reply(request, completions, asked)

  async def responses(self, request: Request) -> Any:
    asked = await self._read(request, Responses)
    return await self._reply(request, responses, asked)

  async def _reply(
    self, request: Request, endpoint: Any, asked: Chat | Completion | Responses
  ) -> Reply:
    fields = ("response_format", "structured_outputs", "tools", "text")
    compiles = any(getattr(asked, field, None) for field in fields)
    if compiles or request.state.size > LONG_BODY:
      # A grammar may take a second to compile, and a long text to cut into tokens: others go on.
      work = await asyncio.to_thread(endpoint.prepare, self._served, asked)
    else:
      work = endpoint.prepare(self._served, asked)

    request.state.facts = {"stream": bool(asked.stream), **work.facts}

    async def whole() -> bytes:
      return msgspec.json.encode(await endpoint.complete(self._served, work))

    made = endpoint.stream(self._served, work) if asked.stream else whole()
    return Reply(made, most_s=self._served.limits.request_s)

  async def models(self, request: Request) -> Response:
    return _json(small.models(self._served))

  async def model(self, request: Request) -> Response:
    return _json(small.model(self._served, request.path_params["name"]))

  async def tokenize(self, request: Request) -> Response:
    return _json(small.tokenize(self._served, await self._read(request, Tokenize)))

  async def detokenize(self, request: Request) -> Response:
    return _json(small.detokenize(self._served, await self._read(request, Detokenize)))

  async def tokenizer_info(self, request: Request) -> Response:
    return _json(small.tokenizer_info(self._served))

  async def health(self, request: Request) -> Response:
    return _json(await small.health(self._served))

  async def version(self, request: Request) -> Response:
    return _json(small.version())

  async def refuse(self, request: Request) -> Response:
    path = request.url.path
    message = f"{path} is not served here: /v1/chat/completions and /v1/completions are"
    raise ApiError(404, message, code="unsupported_endpoint")

  async def metrics(self, request: Request) -> Response:
    return Response(
      await self._served.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
    )

  async def _read(self, request: Request, kind: type[T]) -> T:
    """Read the body of a request. Raises: ApiError: it is too long, or not what is asked for."""
    # A page in a browser may send any other type to any host without being asked.
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
      message = f"the body is {media[:80] or 'of no type'}: send `content-type: application/json`"
      raise ApiError(415, message, code="unsupported_media_type")
    limits, body = self._served.limits, bytearray()
    try:
      async with asyncio.timeout(limits.body_s):
        async for part in request.stream():
          body += part
          if len(body) > limits.body_bytes:
            message = f"the body has more than {limits.body_bytes} bytes, as many as it may"
            raise ApiError(413, message, code="body_too_large")
    except TimeoutError:
      message = f"the body did not come within {limits.body_s:g} s"
      raise ApiError(408, message, code="timeout") from None
    except ClientDisconnect:
      raise ApiError(400, "the body was not sent whole", code="disconnected") from None
    request.state.size = len(body)
    return read(bytes(body), kind)


def _json(table: dict[str, Any]) -> Response:
  return Response(msgspec.json.encode(table), media_type="application/json")
