"""Bodies that no client means: every answer is an error in shape, and none blames the server."""

import json
import math
from collections.abc import Iterator

import httpx2
import hypothesis
import pytest
from hypothesis import strategies as st

from tests.serve import process
from tests.serve.test_http import check_error

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize")


@pytest.fixture(scope="module")
def client() -> Iterator[httpx2.Client]:
  with process.fake() as server, httpx2.Client(base_url=server.url, timeout=60) as client:
    yield client


def send(client: httpx2.Client, path: str, body: bytes) -> httpx2.Response:
  return client.post(path, content=body, headers={"content-type": "application/json"})


BODIES = [
  b"",
  b"{",
  b"null",
  b"[]",
  b'"text"',
  b"\xff\xfe{}",
  b'{"model": "fake", "prompt": "\xc3("}',
  b'{"model": "fake", "prompt": "\\ud800"}',
  b'{"model": "fake", "prompt": NaN}',
  b'{"model": "fake", "prompt": "a", "temperature": NaN}',
  b'{"model": "fake", "prompt": "a", "temperature": 1e999}',
  b'{"model": "fake", "prompt": "a", "temperature": -Infinity}',
  b'{"model": "fake", "prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}",
  b'{"model": "fake", "prompt": "a", "max_tokens": ' + b"9" * 400 + b"}",
  b'{"model": "fake", "prompt": "a", "n": 129}',
  b'{"model": "fake", "prompt": [1, "a"]}',
  b'{"model": "fake", "prompt": [[]]}',
  b'{"model": "fake", "prompt": [[1, 99999999999999999999]]}',
  b'{"model": "fake", "prompt": [-1]}',
  b'{"model": "fake", "prompt": "a", "stop": [1]}',
  b'{"model": "fake", "prompt": "a", "stream_options": {"x": 1}}',
  b'{"model": "fake", "prompt": "a", "logit_bias": {"1": 1e300}}',
  b'{"model": "fake", "prompt": "a", "seed": 1e400}',
  b"[" * 100_000,
  b'{"a":' * 100_000,
  b'{"model": "fake", "messages": ' + b"[" * 5000 + b"]" * 5000 + b"}",
  b'{"model": "fake", "messages": [{"role": "user", "content": {"a": 1}}]}',
  b'{"model": "fake", "messages": [{"role": "god", "content": "a"}]}',
  b'{"model": "fake", "messages": [{"role": "user"}]}',
  b'{"model": "fake", "messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"messages": 1}}',
  b'{"model": "fake", "messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}',
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("body", BODIES, ids=[repr(body[:60]) for body in BODIES])
def test_a_body_that_no_client_means_is_refused_in_shape(
  client: httpx2.Client, path: str, body: bytes
):
  check_error(send(client, path, body), 400)


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
  lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=5), inside, max_size=3),
  max_leaves=8,
)  # fmt: skip
FIELDS = (
  "max_tokens", "temperature", "top_p", "n", "stop", "seed", "logit_bias", "logprobs", "top_logprobs",
  "stream", "stream_options", "echo", "top_k", "min_p", "repetition_penalty", "min_tokens",
  "stop_token_ids", "ignore_eos", "priority", "tools", "tool_choice", "response_format",
  "structured_outputs", "chat_template_kwargs", "reasoning_effort", "thinking_token_budget", "suffix",
  "best_of", "input", "text", "reasoning", "include", "instructions", "messages", "prompt", "documents", "add_generation_prompt", "tokens",
)  # fmt: skip


@hypothesis.given(
  path=st.sampled_from(PATHS),
  fields=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3),
  is_whole=st.booleans(),
)
@hypothesis.settings(
  max_examples=150, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_no_value_of_a_field_fails_the_server(client, path: str, fields: dict, is_whole: bool):
  base = {"model": "fake", "max_output_tokens" if "responses" in path else "max_tokens": 1}
  if path.startswith("/v1"):
    base |= {"messages": [{"role": "user", "content": "a"}]} if "chat" in path else {"prompt": "a"}
  found = send(client, path, json.dumps({**(base if is_whole else {}), **fields}).encode())
  assert found.status_code < 500, found.text
  if found.status_code >= 400:
    check_error(found, found.status_code)
  elif found.headers["content-type"] == "application/json":
    _check_numbers(found.json())


def _check_numbers(value: object) -> None:
  """JSON has no infinity; what is no number must not come out."""
  match value:
    case float():
      assert math.isfinite(value)
    case dict():
      [_check_numbers(each) for each in value.values()]
    case list():
      [_check_numbers(each) for each in value]
