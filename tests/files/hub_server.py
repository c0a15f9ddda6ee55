"""A hub on 127.0.0.1 that speaks the protocol of huggingface.co, as far as models are read, and fails on demand.

Small files come from the hub itself, large ones by redirection from another port, as from a delivery network:
another origin, which must not see the token.
"""

import dataclasses
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE_BYTES = 1000
COMMIT = "c0ffee" + "0" * 34


def sha256(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()


def git_sha1(data: bytes) -> str:
  return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclasses.dataclass
class Repository:
  files: dict[str, bytes]
  commit: str = COMMIT
  branches: tuple[str, ...] = ("main",)
  is_gated: bool = False
  is_private: bool = False

  def listing(self) -> list[dict]:
    return [
      {"rfilename": name, "size": len(data), "blobId": git_sha1(data)}
      | (
        {"lfs": {"sha256": sha256(data), "size": len(data), "pointerSize": 134}}
        if len(data) >= LARGE_BYTES
        else {}
      )
      for name, data in self.files.items()
    ]


@dataclasses.dataclass(frozen=True)
class Asked:
  method: str
  path: str
  range: str | None
  token: str | None


class Server:
  """Attributes:
  repositories: By "org/name".
  token: The one that opens private and gated models.
  cuts: After how many bytes of a body the next downloads of large files break, one after the other.
  send: What a large file's bytes are replaced by, by name.
  answers: What the next requests for a listing get instead: a status, or a body.
  knows_ranges: Whether parts of a file can be asked for.
  stall: If set, a body stops at `cuts` until this is set.
  asked: Every request.
  """

  def __init__(self) -> None:
    self.repositories: dict[str, Repository] = {}
    self.token = "hf_right"
    self.cuts: list[int] = []
    self.send: dict[str, bytes] = {}
    self.answers: list[int | bytes] = []
    self.knows_ranges = True
    self.stall: threading.Event | None = None
    self.stalled = threading.Event()
    self.asked: list[Asked] = []
    self.url = self.delivery = ""

  def bodies(self) -> list[Asked]:
    """The downloads, listings aside."""
    return [one for one in self.asked if one.method == "GET" and "/api/" not in one.path]


@contextmanager
def serving() -> Iterator[Server]:
  state = Server()

  class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
      _answer(self, state)

    def do_GET(self) -> None:
      _answer(self, state)

    def log_message(self, *_: object) -> None:
      pass

  servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
  for server in servers:
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
  state.url, state.delivery = (f"http://127.0.0.1:{s.server_address[1]}" for s in servers)
  try:
    yield state
  finally:
    if state.stall is not None:
      state.stall.set()
    for server in servers:
      server.shutdown()
      server.server_close()


def _answer(request: BaseHTTPRequestHandler, state: Server) -> None:
  token = (request.headers.get("Authorization") or "").removeprefix("Bearer ") or None
  state.asked.append(Asked(request.command, request.path, request.headers.get("Range"), token))
  url = urlsplit(request.path)
  parts = [unquote(part) for part in url.path.strip("/").split("/")]
  if parts[0] == "delivery":
    return _body(request, state, *_large(state, parts[1]))
  if parts[:2] == ["api", "models"]:
    if state.answers:
      answer = state.answers.pop(0)
      if isinstance(answer, int):
        return _send(request, answer)
      return _send(request, 200, answer, {"Content-Type": "application/json"})
    name, revision = "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
    repository = _allowed(request, state, name, token, revision)
    if repository is None:
      return None
    assert parse_qs(url.query).get("blobs"), "sizes and digests come only if asked for"
    listing = {"id": name, "sha": repository.commit, "siblings": repository.listing()}
    return _send(request, 200, json.dumps(listing).encode(), {"Content-Type": "application/json"})
  name, (verb, revision), file = "/".join(parts[:2]), parts[2:4], "/".join(parts[4:])
  assert verb == "resolve"
  repository = _allowed(request, state, name, token, revision)
  if repository is None:
    return None
  if repository.is_gated and token != state.token:
    return _send(request, 403 if token else 401, error="GatedRepo")
  commit = {"X-Repo-Commit": repository.commit}
  if file not in repository.files:
    return _send(request, 404, headers=commit, error="EntryNotFound")
  data = repository.files[file]
  if len(data) < LARGE_BYTES:
    return _body(request, state, file, data, {**commit, "ETag": f'"{git_sha1(data)}"'})
  linked = {
    "X-Linked-ETag": f'"{sha256(data)}"',
    "X-Linked-Size": str(len(data)),
    "Location": f"{state.delivery}/delivery/{sha256(data)}",
  }
  return _send(request, 302, headers={**commit, **linked})


def _allowed(
  request: BaseHTTPRequestHandler, state: Server, name: str, token: str | None, revision: str
) -> Repository | None:
  if token is not None and not token.startswith("hf_"):
    message = {"X-Error-Message": "Invalid credentials in Authorization header"}
    _send(request, 401, headers=message)
    return None
  repository = state.repositories.get(name)
  if repository is None or (repository.is_private and token != state.token):
    _send(request, 404 if token else 401, error="RepoNotFound")
    return None
  if revision not in (*repository.branches, repository.commit):
    _send(request, 404, error="RevisionNotFound")
    return None
  return repository


def _large(state: Server, digest: str) -> tuple[str, bytes]:
  return next(
    (name, data)
    for repository in state.repositories.values()
    for name, data in repository.files.items()
    if sha256(data) == digest
  )


def _body(
  request: BaseHTTPRequestHandler,
  state: Server,
  name: str,
  data: bytes,
  headers: dict | None = None,
) -> None:
  data = state.send.get(name, data)
  begin, status, headers = 0, 200, dict(headers or {})
  asked = request.headers.get("Range")
  if asked and state.knows_ranges:
    begin, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
    headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
  data = data[begin:]
  if request.command == "GET" and len(data) >= LARGE_BYTES // 2 and state.cuts:
    cut = state.cuts.pop(0)
    _send(request, status, headers={**headers, "Content-Length": str(len(data))})
    request.wfile.write(data[:cut])
    request.wfile.flush()
    if state.stall is not None:
      state.stalled.set()
      state.stall.wait(60)
    request.close_connection = True
    return
  _send(request, status, data, headers)


def _send(
  request: BaseHTTPRequestHandler,
  status: int,
  data: bytes = b"",
  headers: dict | None = None,
  error: str | None = None,
) -> None:
  request.send_response(status)
  headers = {"Content-Length": str(len(data)), **(headers or {})}
  if error is not None:
    headers["X-Error-Code"] = error
  for key, value in headers.items():
    request.send_header(key, value)
  request.end_headers()
  if request.command != "HEAD":
    request.wfile.write(data)
