"""/v1/responses, stateless, as the unmodified client asks for it and accumulates it."""

import json
from collections.abc import Iterator

import openai
import pytest

from tests.serve import fake_server, process
from tests.serve.test_parts import (
  CALLS,
  MARKS,
  OBJECT,
  PARAMETERS,
  SCRIPTS,
  TEMPLATE,
  TEXT,
  THINKS,
)  # fmt: skip

TOOL = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
  with process.fake(scripts=SCRIPTS, marks=MARKS, template=TEMPLATE) as server:
    yield openai.OpenAI(
      base_url=f"{server.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    )


def both(client: openai.OpenAI, seed: int, **asked):
  """The response, whole and as the client puts it together from events, which have to be alike."""
  asked = {"model": "fake", "input": "?", "extra_body": {"seed": seed}, **asked}
  whole = client.responses.create(**asked)
  with client.responses.stream(**asked) as events:
    kinds = [event.type for event in events]
    final = events.get_final_response()
  assert kinds[:2] == ["response.created", "response.in_progress"]
  assert kinds[-1] == "response.completed" == f"response.{final.status}"

  def plain(response) -> list:
    return [
      {
        k: v
        for k, v in json.loads(item.to_json()).items()
        if k not in ("id", "call_id", "parsed_arguments")
      }
      for item in response.output
    ]

  assert [item["type"] for item in plain(final)] == [item["type"] for item in plain(whole)]
  assert final.output_text == whole.output_text and final.usage == whole.usage
  return whole


def test_text_and_reasoning(client: openai.OpenAI):
  assert both(client, TEXT).output_text == SCRIPTS[TEXT]
  found = both(client, THINKS)
  reasoning, message = found.output
  assert reasoning.content[0].text == "Let me see." and found.output_text == "It is 4."
  assert found.usage.output_tokens_details.reasoning_tokens > 0 and message.status == "completed"


def test_calls_and_their_outputs_go_on_in_the_input(client: openai.OpenAI):
  found = both(client, CALLS, tools=[TOOL])
  calls = [item for item in found.output if item.type == "function_call"]
  assert [json.loads(call.arguments)["city"] for call in calls] == ["Oslo", "Bergen"]
  items: list = [{"role": "user", "content": "?"}]
  first = client.responses.create(
    model="fake", input=items, tools=[TOOL], extra_body={"seed": fake_server.BY_TURN}
  )
  items += [item.model_dump(exclude_none=True) for item in first.output]
  items += [
    {"type": "function_call_output", "call_id": item.call_id, "output": "4"}
    for item in first.output
    if item.type == "function_call"
  ]
  second = client.responses.create(
    model="fake", input=items, tools=[TOOL], extra_body={"seed": fake_server.BY_TURN}
  )
  assert second.output_text == SCRIPTS[TEXT]


def test_a_format_is_kept_and_an_answer_that_is_cut_off_says_so(client: openai.OpenAI):
  format = {"type": "json_schema", "name": "w", "schema": PARAMETERS, "strict": True}
  found = both(client, OBJECT, text={"format": format})
  assert json.loads(found.output_text) == {"city": "Oslo", "days": 3}
  cut = client.responses.create(
    model="fake", input="?", max_output_tokens=4, extra_body={"seed": TEXT}
  )
  assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
  assert cut.output_text == SCRIPTS[TEXT][:4]


@pytest.mark.parametrize(
  ("changes", "param"),
  [
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]"),
    ({"truncation": "auto"}, "truncation"),
    ({"include": ["file_search_call.results"]}, "include"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
    ({"background": True}, "background"),
  ],
)
def test_what_is_not_served_is_refused_by_name(client: openai.OpenAI, changes: dict, param: str):
  with pytest.raises(openai.BadRequestError) as caught:
    client.responses.create(**{"model": "fake", "input": "?", **changes})
  assert caught.value.param == param
