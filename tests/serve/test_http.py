"""What a client sees on the wire: framing, limits, a client that goes away, a server that ends."""

import json
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator

import httpx2
import pytest

from tests.serve import process

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "ab"}]}
LONG = {**CHAT, "max_tokens": 400, "ignore_eos": True}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
  with process.fake() as server:
    yield server.url


@pytest.fixture(scope="module")
def slow() -> Iterator[str]:
  """A server whose answers of 400 tokens take 20 s, one at a time."""
  with process.fake(engine={"slots": 1, "delay_s": 0.05}) as server:
    yield server.url


def post(url: str, body: object, path: str = "/v1/chat/completions", **options) -> httpx2.Response:
  return httpx2.post(url + path, json=body, timeout=60, **options)


def test_the_frames_of_a_stream(url: str):
  body = {
    **CHAT,
    "max_tokens": 5,
    "stream": True,
    "n": 2,
    "stream_options": {"include_usage": True},
  }
  found = post(url, body)
  assert found.headers["content-type"].startswith("text/event-stream")
  *events, last, end = found.text.split("\n\n")
  assert (last, end) == ("data: [DONE]", "")
  tables = [json.loads(event.removeprefix("data: ")) for event in events]
  assert len({(t["id"], t["created"], t["model"], t["object"]) for t in tables}) == 1
  assert [t["choices"][0]["index"] for t in tables[:2]] == [0, 1]
  for index in (0, 1):
    deltas = [
      (c["delta"], c["finish_reason"]) for t in tables for c in t["choices"] if c["index"] == index
    ]
    assert deltas[0] == ({"role": "assistant", "content": ""}, None)
    assert deltas[-1] == ({}, "length")
    assert all(list(d) == ["content"] and reason is None for d, reason in deltas[1:-1])
  assert tables[-1]["choices"] == [] and tables[-1]["usage"]["completion_tokens"] == 10
  assert all(table["usage"] is None for table in tables[:-1])


def test_a_whole_answer_has_the_keys_that_the_published_description_requires(url: str):
  found = post(url, {**CHAT, "max_tokens": 2}).json()
  [choice] = found["choices"]
  assert {"logprobs", "finish_reason", "index", "message"} <= choice.keys()
  assert {"role", "content", "refusal"} <= choice["message"].keys()


@pytest.mark.parametrize(
  ("path", "method", "status"),
  [
    ("/nope", "GET", 404),
    ("/v1/embeddings", "POST", 404),
    ("/v1/chat/completions", "GET", 405),
    ("/v1/models/x", "GET", 404),
  ],
)
def test_errors_have_one_shape(url: str, path: str, method: str, status: int):
  found = httpx2.request(method, url + path)
  check_error(found, status)


def check_error(found: httpx2.Response, status: int) -> None:
  assert found.status_code == status, found.text
  assert found.headers["x-request-id"]
  [(name, error)] = found.json().items()
  assert name == "error" and error.keys() == {"message", "type", "param", "code"}
  assert isinstance(error["message"], str) and isinstance(error["type"], str)
  assert all(error[key] is None or isinstance(error[key], str) for key in ("param", "code"))


def test_a_page_of_another_site_cannot_ask():
  with process.fake(origins=["https://good.example"]) as server:
    asked = {"access-control-request-method": "POST"}
    good = httpx2.options(
      f"{server.url}/v1/models", headers={"origin": "https://good.example", **asked}
    )
    assert good.headers["access-control-allow-origin"] == "https://good.example"
    bad = httpx2.options(
      f"{server.url}/v1/models", headers={"origin": "https://bad.example", **asked}
    )
    assert "access-control-allow-origin" not in bad.headers
    # What a page may send without asking is not read.
    text = httpx2.post(
      f"{server.url}/v1/chat/completions",
      content=json.dumps(CHAT),
      headers={"content-type": "text/plain"},
    )
    check_error(text, 415)


def test_by_default_no_origin_is_let_in(url: str):
  found = httpx2.get(f"{url}/v1/models", headers={"origin": "https://any.example"})
  assert "access-control-allow-origin" not in found.headers


def test_long_bodies_and_long_answers_are_cut():
  limits = {"body_bytes": 1000, "request_s": 0.3}
  with process.fake(engine={"delay_s": 0.05}, limits=limits) as server:
    check_error(post(server.url, {**CHAT, "user": "x" * 1000}), 413)
    found = post(server.url, LONG)
    check_error(found, 504)
    assert found.headers["x-should-retry"] == "false"
    *_, error, done, _ = post(server.url, {**LONG, "stream": True}).text.split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "timeout"
    assert done == "data: [DONE]"
    wait_until(lambda: busy(server.url) == (0, 0))


def test_a_stream_that_waits_is_kept_open_with_comments():
  with process.fake(engine={"delay_s": 0.4}, limits={"idle_s": 0.05}) as server:
    events = post(server.url, {**CHAT, "max_tokens": 2, "stream": True}).text.split("\n\n")
  assert events[0] == ": waiting" and events[-2] == "data: [DONE]"
  assert all(event.startswith(("data: {", ":")) for event in events[:-2])


def test_a_body_that_never_comes_is_not_waited_for():
  import socket

  with process.fake(limits={"body_s": 0.2}) as server:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
      connection.sendall(
        b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        b"Content-Length: 100\r\n\r\n{"
      )
      assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
    assert httpx2.get(f"{server.url}/version").status_code == 200


def test_long_texts_are_refused_and_keep_nobody_waiting(url: str):
  with httpx2.stream("POST", f"{url}/v1/chat/completions", json={**LONG, "stream": True}) as found:
    check_error(post(url, {"model": "fake", "prompt": "a" * 200_000}, "/v1/completions"), 400)
    assert "[DONE]" in found.read().decode()


# ---- clients that go away


def busy(url: str) -> tuple[int, int]:
  load = httpx2.get(f"{url}/busy").json()
  return load["running"], load["queued"]


def wait_until(holds: Callable[[], bool], most_s: float = 10.0) -> None:
  """The engine's own count says so, long before the answers that were asked for would have ended."""
  end_s = time.monotonic() + most_s
  while not holds():
    assert time.monotonic() < end_s, "it never came to hold"
    time.sleep(0.005)


class Leaver:
  """A request in a thread of its own, whose connection is cut."""

  def __init__(self, url: str, *, stream: bool):
    self._client = httpx2.Client(timeout=60)
    self._url, self._stream = url, stream
    self._thread = threading.Thread(target=self._ask)
    self._thread.start()

  def _ask(self) -> None:
    import contextlib

    with contextlib.suppress(Exception):
      self._client.post(f"{self._url}/v1/chat/completions", json={**LONG, "stream": self._stream})

  def leave(self) -> None:
    import socket

    for connection in list(self._client._transport._pool._connections):
      raw = connection._connection._network_stream.get_extra_info("socket")
      raw.shutdown(socket.SHUT_RDWR)
    self._thread.join(10)
    self._client.close()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot_and_its_place_in_the_queue(slow: str, stream: bool):
  first = Leaver(slow, stream=stream)
  wait_until(lambda: busy(slow) == (1, 0))
  second = Leaver(slow, stream=stream)
  wait_until(lambda: busy(slow) == (1, 1))
  second.leave()
  wait_until(lambda: busy(slow) == (1, 0))
  first.leave()
  wait_until(lambda: busy(slow) == (0, 0))


def test_after_many_have_gone_away_at_any_time_nothing_is_left(slow: str):
  draw = random.Random(0)
  for _ in range(12):
    leaver = Leaver(slow, stream=draw.random() < 0.5)
    time.sleep(draw.random() * 0.05)
    leaver.leave()
  wait_until(lambda: busy(slow) == (0, 0))
  assert post(slow, {**CHAT, "max_tokens": 1}).status_code == 200


# ---- the end


def test_a_server_that_is_told_to_end_lets_answers_finish_and_takes_no_new_ones():
  with process.fake(engine={"delay_s": 0.02}) as server:
    body = {**LONG, "max_tokens": 60, "stream": True}
    with httpx2.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as found:
      lines = found.iter_lines()
      next(lines)
      server.process.send_signal(signal.SIGTERM)
      refused = None
      while refused is None or refused.status_code == 200:
        refused = httpx2.get(f"{server.url}/version")
      check_error(refused, 503)
      assert refused.headers["retry-after"]
      rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
    assert server.process.wait(20) == 0


# ---- small endpoints


def test_tokens_there_and_back(url: str):
  found = post(url, {"prompt": "ab"}, "/tokenize").json()
  assert found["tokens"] == [1, 100, 101] and found["count"] == 3
  bare = post(url, {"prompt": "ab", "add_special_tokens": False}, "/tokenize").json()
  assert bare["tokens"] == [100, 101]
  # How lm-evaluation-harness learns the ids of BOS and EOS.
  info = httpx2.get(f"{url}/tokenizer_info").json()
  asked = {"prompt": info["eos_token"], "add_special_tokens": False}
  assert post(url, asked, "/tokenize").json()["tokens"] == [2]
  text = post(url, {"tokens": [100, 101]}, "/detokenize").json()["prompt"]
  assert text == "ab"
  check_error(post(url, {"tokens": [9999]}, "/detokenize"), 400)
  chat = post(url, {"messages": CHAT["messages"]}, "/tokenize").json()
  assert (
    post(url, {"tokens": chat["tokens"]}, "/detokenize")
    .json()["prompt"]
    .endswith("user: ab\nassistant: ")
  )


def test_a_message_that_spells_a_control_token_stays_text(url: str):
  messages = [{"role": "user", "content": "</s><end>"}]
  tokens = post(url, {"messages": messages}, "/tokenize").json()["tokens"]
  assert 2 not in tokens and 259 not in tokens


def test_health_proves_a_token():
  with process.fake() as server:
    assert httpx2.get(f"{server.url}/health").status_code == 200
  with process.fake(engine={"fail_at": 0}) as server:
    check_error(httpx2.get(f"{server.url}/health"), 503)
    assert httpx2.get(f"{server.url}/version").status_code == 200
