"""The unmodified client of OpenAI, in its strict mode, against a server process over a fake engine."""

from collections.abc import Iterator

import openai
import pytest

from tests.serve import process

MESSAGES = [{"role": "user", "content": "ab"}]
SPACE, SIZE = 260, 261  # of the fake server's vocabulary, whose ids 3.. are bytes


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
  with process.fake() as server:
    yield server.url


@pytest.fixture
def client(url: str) -> openai.OpenAI:
  return openai.OpenAI(
    base_url=f"{url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
  )


def letters(first: str) -> str:
  """A message whose answer begins with a letter: the fake engine sums the prompt, and counts on."""
  ends = [chr(code) for code in range(33, 127)]
  for text in [*ends, *(end + "~" for end in ends)]:
    prompt = f"user: {text}\nassistant: "
    ids = [1, *(SPACE if char == " " else ord(char) + 3 for char in prompt)]
    if sum(ids) % SIZE == ord(first) + 3:
      return text
  raise AssertionError("no message has such an answer")


def ask(text: str) -> list:
  return [{"role": "user", "content": text}]


def test_a_chat_is_answered_whole_and_streamed_alike(client: openai.OpenAI):
  # The client's helper for streams takes no answer that was cut off.
  asked = dict(model="fake", messages=ask(letters("a")), max_completion_tokens=30, stop="ij")
  whole = client.chat.completions.create(**asked)
  [choice] = whole.choices
  assert choice.message.content == "abcdefgh" and choice.finish_reason == "stop"
  assert whole.usage is not None and whole.usage.completion_tokens == 10
  assert whole.usage.total_tokens == whole.usage.prompt_tokens + 10
  with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
    final = stream.get_final_completion()
  assert final.choices[0].message.content == "abcdefgh"
  assert final.choices[0].finish_reason == "stop"
  assert final.usage is not None and final.usage.model_dump() == whole.usage.model_dump()


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_each_with_its_end_at_a_stop_string(client: openai.OpenAI, stream: bool):
  question = ask(letters("a"))
  asked = dict(model="fake", messages=question, max_tokens=20, n=3, stop=["fg", "xyz"])
  if not stream:
    found = client.chat.completions.create(**asked)
    assert [choice.index for choice in found.choices] == [0, 1, 2]
  else:
    with client.chat.completions.stream(**asked) as chunks:
      found = chunks.get_final_completion()
  assert [choice.message.content for choice in found.choices] == ["abcde"] * 3
  assert [choice.finish_reason for choice in found.choices] == ["stop"] * 3


def test_log_probabilities_of_a_chat(client: openai.OpenAI):
  found = client.chat.completions.create(
    model="fake", messages=ask(letters("a")), max_tokens=3, logprobs=True, top_logprobs=2
  )
  rows = found.choices[0].logprobs.content
  assert [row.token for row in rows] == ["a", "b", "c"]
  assert [bytes(row.bytes) for row in rows] == [b"a", b"b", b"c"]
  assert all(len(row.top_logprobs) == 2 for row in rows)
  streamed = client.chat.completions.create(
    model="fake", messages=ask(letters("a")), max_tokens=3, logprobs=True, top_logprobs=2,
    stream=True,
  )  # fmt: skip
  told = [
    row
    for chunk in streamed
    for choice in chunk.choices
    if choice.logprobs is not None
    for row in choice.logprobs.content or ()
  ]
  assert told == rows


def test_models_and_aliases(client: openai.OpenAI):
  assert [model.id for model in client.models.list()] == ["fake", "alias"]
  assert client.models.retrieve("alias").id == "alias"
  found = client.chat.completions.create(model="alias", messages=MESSAGES, max_tokens=1)
  assert found.model == "fake"


def test_completions(client: openai.OpenAI):
  found = client.completions.create(model="fake", prompt=["a", "!!"], n=2, max_tokens=4)
  assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
  assert found.choices[0].text == found.choices[1].text != found.choices[2].text
  assert found.usage.completion_tokens == 16


REFUSALS = [
  ({"temperature": -1}, "temperature"),
  ({"n": 0}, "n"),
  ({"top_logprobs": 3}, "top_logprobs"),
  ({"logit_bias": {"x": 1}}, "logit_bias"),
  ({"logit_bias": {"261": 1}}, "logit_bias"),
  ({"max_tokens": 100_000}, "max_tokens"),
  ({"seed": 2**70}, "seed"),
  ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
  ({"web_search_options": {}}, "web_search_options"),
  ({"modalities": ["text", "audio"]}, "modalities"),
  ({"reasoning_effort": "high"}, "reasoning_effort"),
  (
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    "messages[0].content[0]",
  ),
  ({"extra_body": {"guided_regex": "a"}}, "guided_regex"),
]


@pytest.mark.parametrize(("changes", "param"), REFUSALS, ids=[param for _, param in REFUSALS])
def test_what_cannot_be_served_is_refused_by_name(client: openai.OpenAI, changes: dict, param: str):
  with pytest.raises(openai.BadRequestError) as caught:
    client.chat.completions.create(**{"model": "fake", "messages": MESSAGES, **changes})
  assert caught.value.param == param and caught.value.type == "invalid_request_error"
  assert caught.value.code is None or isinstance(caught.value.code, str)
  assert param.partition("[")[0] in str(caught.value)


def test_fields_without_effect_are_taken(client: openai.OpenAI):
  found = client.chat.completions.create(
    model="fake", messages=MESSAGES, max_tokens=1, user="me", store=False, metadata={"a": "b"},
    service_tier="auto", modalities=["text"], prompt_cache_key="k", parallel_tool_calls=True,
  )  # fmt: skip
  assert found.choices[0].finish_reason == "length"


def test_another_model_is_not_found(client: openai.OpenAI):
  with pytest.raises(openai.NotFoundError) as caught:
    client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
  assert caught.value.code == "model_not_found" and caught.value.param == "model"
  assert caught.value.request_id


def test_keys_are_asked_for():
  with process.fake(keys=["right", "also"]) as server:

    def client(key: str) -> openai.OpenAI:
      return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)

    assert client("right").models.list() and client("also").models.list()
    for wrong in ("wrong", "righ", "right1"):
      with pytest.raises(openai.AuthenticationError) as caught:
        client(wrong).models.list()
      assert caught.value.code == "invalid_api_key"


def test_a_failure_is_an_error_before_the_first_token_and_an_event_after_it():
  with process.fake(engine={"fail_at": 3}) as server:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.InternalServerError, match="fails at token 3"):
      client.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=9)
    seen = []
    with pytest.raises(openai.APIError, match="fails at token 3"):
      for chunk in client.chat.completions.create(
        model="fake", messages=MESSAGES, max_tokens=9, stream=True
      ):
        seen.append(chunk)
    assert seen


def test_a_client_that_finds_the_queue_full_comes_again_and_is_served():
  with process.fake(engine={"slots": 1, "delay_s": 0.02}, limits={"queued": 0}) as server:
    tries = []
    watched = openai.DefaultHttpxClient(event_hooks={"request": [tries.append]})
    base = f"{server.url}/v1"
    client = openai.OpenAI(base_url=base, api_key="none", max_retries=20, http_client=watched)
    first = openai.OpenAI(base_url=base, api_key="none").chat.completions.create(
      model="fake", messages=MESSAGES, max_tokens=40, stream=True
    )
    next(iter(first))
    hasty = client.with_options(max_retries=0)
    with pytest.raises(openai.RateLimitError) as caught:
      hasty.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=1)
    assert caught.value.response.headers["retry-after"] == "1"
    tries.clear()
    found = client.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=1)
    assert found.choices and len(tries) >= 2
    first.close()
