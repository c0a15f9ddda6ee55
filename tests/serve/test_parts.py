"""Reasoning, calls of tools and constrained answers, told by a server whose model says scripts by heart.

The seed of a request picks the script. Where a constraint forbids the next token of a script, the next
id that is allowed comes in its place.
"""

import json
from collections.abc import Iterator

import jsonschema
import openai
import pydantic
import pytest

from tests.serve import fake_server, process

MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
TEMPLATE = (
  "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}"
  "{% for m in messages %}{{ m.role }}: {{ m.content }}\n"
  "{% for c in m.tool_calls or () %}{{ c.function.arguments.city }}{% endfor %}{% endfor %}"
  "{% if add_generation_prompt %}assistant: "
  "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
  "{% endif %}"
)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}\n</tool_call>'
SCRIPTS = [
  "<think>\nLet me see.\n</think>\n\nIt is 4.",
  f"<think>\nI ask.\n</think>\n\n{CALL}\n{CALL.replace('Oslo', 'Bergen')}",
  "The text says <b> and { and ends.",
  '{"city": "Oslo", "days": 3}',
  "<tool_call>\nnot a call\n</tool_call>",
  "<think>\nOn and on and on and on and on.</think>Done.",
  '[{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}]',
  "zzzz",
]
THINKS, CALLS, TEXT, OBJECT, NO_CALL, LONG, LIST, NOISE = range(len(SCRIPTS))
PARAMETERS = {
  "type": "object",
  "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
  "required": ["city", "days"],
  "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
ASK = {"model": "fake", "messages": [{"role": "user", "content": "?"}]}


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
  with process.fake(scripts=SCRIPTS, marks=MARKS, template=TEMPLATE) as server:
    yield openai.OpenAI(
      base_url=f"{server.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    )


def both(client: openai.OpenAI, **asked) -> openai.types.chat.ChatCompletion:
  """The answer, whole and streamed, which have to be alike."""
  whole = client.chat.completions.create(**ASK, **asked)
  content, reasoning, calls, reason = "", "", {}, None
  for chunk in client.chat.completions.create(**ASK, **asked, stream=True):
    for choice in chunk.choices:
      delta = choice.delta
      content += delta.content or ""
      reasoning += getattr(delta, "reasoning_content", None) or ""
      assert getattr(delta, "reasoning", None) == getattr(delta, "reasoning_content", None)
      for call in delta.tool_calls or ():
        held = calls.setdefault(call.index, {"name": "", "arguments": "", "id": "", "type": ""})
        held["name"] += call.function.name or ""
        held["arguments"] += call.function.arguments or ""
        held["id"] += call.id or ""
        held["type"] += call.type or ""
      reason = choice.finish_reason or reason
  message = whole.choices[0].message
  assert content == (message.content or "") and reason == whole.choices[0].finish_reason
  assert reasoning == (getattr(message, "reasoning_content", None) or "")
  assert [(calls[i]["name"], calls[i]["arguments"], calls[i]["type"]) for i in sorted(calls)] == [
    (call.function.name, call.function.arguments, call.type) for call in message.tool_calls or ()
  ]
  assert all(held["id"] for held in calls.values())
  return whole


def test_reasoning_stands_beside_the_content(client: openai.OpenAI):
  found = both(client, seed=THINKS)
  message = found.choices[0].message
  assert message.content == "It is 4." and message.reasoning_content == "Let me see."
  assert message.reasoning == message.reasoning_content
  assert found.choices[0].finish_reason == "stop"
  assert (
    found.usage.completion_tokens_details.reasoning_tokens == len("\nLet me see.\n</think>") - 7
  )
  hidden = both(client, seed=THINKS, extra_body={"include_reasoning": False})
  assert not hasattr(hidden.choices[0].message, "reasoning_content")


def test_a_budget_ends_the_reasoning(client: openai.OpenAI):
  for budget in (0, 1, 7):
    found = both(client, seed=LONG, extra_body={"thinking_token_budget": budget})
    details = found.usage.completion_tokens_details
    assert details.reasoning_tokens <= budget + 1
    assert len(getattr(found.choices[0].message, "reasoning_content", "")) <= budget


def test_calls_of_tools(client: openai.OpenAI):
  found = both(client, seed=CALLS, tools=[TOOL])
  message = found.choices[0].message
  assert message.content is None and found.choices[0].finish_reason == "tool_calls"
  assert message.reasoning_content == "I ask."
  cities = [json.loads(call.function.arguments)["city"] for call in message.tool_calls]
  assert cities == ["Oslo", "Bergen"] and len({call.id for call in message.tool_calls}) == 2
  one = both(client, seed=CALLS, tools=[TOOL], parallel_tool_calls=False)
  assert len(one.choices[0].message.tool_calls) == 1
  # The answer of the tool goes back with the call.
  again = client.chat.completions.create(
    model="fake",
    messages=[
      *ASK["messages"],
      message.model_dump(exclude_none=True),
      {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "4 degrees"},
    ],
    tools=[TOOL],
    seed=TEXT,
  )
  assert again.choices[0].message.content == SCRIPTS[TEXT]


@pytest.mark.parametrize("strict", [False, True])
def test_a_loop_of_tools_ends_in_an_answer(client: openai.OpenAI, strict: bool):
  tool = {"type": "function", "function": {**TOOL["function"], "strict": strict}}
  messages: list = [*ASK["messages"]]
  turns = 0
  while True:
    found = client.chat.completions.create(
      model="fake", messages=messages, tools=[tool], seed=fake_server.BY_TURN
    )
    turns += 1
    message = found.choices[0].message
    if not message.tool_calls:
      break
    messages.append(message.model_dump())
    for call in message.tool_calls:
      messages.append({"role": "tool", "tool_call_id": call.id, "content": "4 degrees"})
  assert turns == 2 and message.content == SCRIPTS[TEXT]


def test_text_is_text_with_tools_or_without(client: openai.OpenAI):
  assert both(client, seed=TEXT, tools=[TOOL]).choices[0].message.content == SCRIPTS[TEXT]
  assert both(client, seed=TEXT).choices[0].message.content == SCRIPTS[TEXT]
  found = both(client, seed=NO_CALL, tools=[TOOL]).choices[0]
  assert found.message.content == SCRIPTS[NO_CALL] and found.finish_reason == "stop"
  # Without tools, or where none may be called, nothing is read as a call.
  free = both(client, seed=CALLS, tools=[TOOL], tool_choice="none").choices[0]
  assert free.message.tool_calls is None and free.finish_reason == "stop"


def test_a_tool_that_has_to_be_called(client: openai.OpenAI):
  for seed in (LIST, TEXT, NOISE, THINKS):
    found = both(client, seed=seed, tools=[TOOL], tool_choice="required", max_tokens=400).choices[0]
    if found.finish_reason == "length":
      continue  # A script that a grammar bends may write strings without an end.
    assert found.finish_reason == "tool_calls"
    for call in found.message.tool_calls:
      jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)
  found = both(client, seed=LIST, tools=[TOOL], tool_choice="required").choices[0]
  assert json.loads(found.message.tool_calls[0].function.arguments) == {"city": "Oslo", "days": 3}
  named = {"type": "function", "function": {"name": "weather"}}
  found = both(client, seed=OBJECT, tools=[TOOL], tool_choice=named).choices[0]
  assert found.finish_reason == "stop" and found.message.content is None
  assert json.loads(found.message.tool_calls[0].function.arguments) == {"city": "Oslo", "days": 3}


def test_a_strict_tool_keeps_its_schema_where_the_model_chooses(client: openai.OpenAI):
  tool = {"type": "function", "function": {**TOOL["function"], "strict": True}}
  found = both(client, seed=CALLS, tools=[tool]).choices[0]
  assert len(found.message.tool_calls) == 2
  assert both(client, seed=TEXT, tools=[tool]).choices[0].message.content == SCRIPTS[TEXT]
  bent = both(client, seed=NO_CALL, tools=[tool], max_tokens=300).choices[0]
  for call in bent.message.tool_calls or ():
    jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)
  assert bent.message.tool_calls or bent.finish_reason == "length"


def test_the_clients_parse_gives_the_object(client: openai.OpenAI):
  class Weather(pydantic.BaseModel):
    city: str
    days: int

  found = client.chat.completions.parse(**ASK, seed=OBJECT, response_format=Weather)
  assert found.choices[0].message.parsed == Weather(city="Oslo", days=3)
  # Reasoning is free, and the format begins after it.
  found = client.chat.completions.create(
    **ASK, seed=THINKS, max_tokens=200,
    response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}},
  ).choices[0]  # fmt: skip
  assert found.message.reasoning_content == "Let me see."
  assert isinstance(json.loads(found.message.content), int)


def test_objects_expressions_choices_and_grammars(client: openai.OpenAI):
  found = both(client, seed=OBJECT, response_format={"type": "json_object"}).choices[0]
  assert json.loads(found.message.content) == {"city": "Oslo", "days": 3}

  def answer(seed: int, **outputs) -> str:
    # Without it, the mark of reasoning could be what comes in the place of a letter that is not allowed.
    body = {"structured_outputs": outputs, "chat_template_kwargs": {"enable_thinking": False}}
    return both(client, seed=seed, extra_body=body, max_tokens=60).choices[0].message.content

  assert answer(NOISE, choice=["yes", "no"]) in ("yes", "no")
  assert answer(NOISE, regex="[ab]{3}c") in {
    f"{x}{y}{z}c" for x in "ab" for y in "ab" for z in "ab"
  }
  assert answer(NOISE, grammar='start: "x" /[0-9]{2}/')[:1] == "x"
  assert answer(NOISE, grammar='root ::= "left" | "right"') in ("left", "right")
  assert isinstance(json.loads(answer(NOISE, json={"enum": [1, 22, 333]})), int)
  whole = client.completions.create(
    model="fake", prompt="a", seed=NOISE, extra_body={"structured_outputs": {"choice": ["yes"]}}
  )
  assert whole.choices[0].text == "yes" and whole.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
  ("schema", "named"),
  [
    ({"not": {"type": "string"}}, "not"),
    ({"type": "string", "format": "phone"}, "phone"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"type": "array", "minItems": 3, "maxItems": 2}, "minItems"),
    ({"$ref": "https://example.org/schema"}, "example.org"),
    ({"type": "strong"}, "strong"),
    ({"type": "string", "pattern": "(?=a)b"}, "look"),
  ],
)
def test_what_a_schema_asks_for_and_cannot_be_kept_is_named(
  client: openai.OpenAI, schema: dict, named: str
):
  format = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
  with pytest.raises(openai.BadRequestError, match=named) as caught:
    client.chat.completions.create(**ASK, response_format=format)
  assert caught.value.param == "response_format"


@pytest.mark.parametrize(
  ("changes", "param"),
  [
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL, TOOL]}, "tools"),
    (
      {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
      "tool_choice",
    ),
    ({"extra_body": {"thinking_token_budget": -1}}, "thinking_token_budget"),
    ({"extra_body": {"structured_outputs": {"regex": "(a"}}}, "structured_outputs.regex"),
    ({"extra_body": {"structured_outputs": {"choice": []}}}, "structured_outputs.choice"),
    ({"extra_body": {"structured_outputs": {}}}, "structured_outputs"),
    ({"extra_body": {"structured_outputs": {"grammar": "start: x"}}}, "structured_outputs.grammar"),
    (
      {"response_format": {"type": "json_object"}, "extra_body": {"ignore_eos": True}},
      "ignore_eos",
    ),
  ],
)
def test_wrong_asks_are_refused_by_name(client: openai.OpenAI, changes: dict, param: str):
  with pytest.raises(openai.BadRequestError) as caught:
    client.chat.completions.create(**{**ASK, **changes})
  assert caught.value.param == param
