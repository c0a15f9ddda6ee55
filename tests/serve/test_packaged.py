"""`neurojax serve` on the packaged model: what lm-evaluation-harness asks for, to the bit."""

import concurrent.futures
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import numpy as np
import openai
import pytest

import neurojax as nj
from tests.serve import process

pytestmark = pytest.mark.optimized
TEXTS = ("The old house stood at the end of the road.", "She said: “Nothing at all”, and left.")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
  template = tmp_path_factory.mktemp("serve") / "template.jinja"
  template.write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}")
  command = [
    sys.executable, "-m", "neurojax", "serve", "--model", "neurollm", "--port", "0", "--json",
    "--context", "256", "--sequences", "4", "--chat-template", str(template), "--name", "neuro",
  ]  # fmt: skip
  with process.started(command) as server:
    yield server.url


@pytest.fixture(scope="module")
def model() -> Iterator[nj.Model]:
  with nj.load("neurollm", context=256, sequences=4) as model:
    yield model


def post(url: str, body: dict, path: str = "/v1/completions") -> dict:
  found = httpx2.post(url + path, json={"model": "neuro", **body}, timeout=120)
  assert found.status_code == 200, found.text
  return found.json()


def test_prompt_scores_as_lm_evaluation_harness_asks_for_them(url: str, model: nj.Model):
  rows = [model.tokenize(text) for text in TEXTS]
  asked = {
    "prompt": rows,
    "temperature": 0,
    "max_tokens": 1,
    "logprobs": 1,
    "seed": 1234,
    "echo": True,
  }
  choices = post(url, asked)["choices"]
  assert [choice["index"] for choice in choices] == [0, 1]
  for row, choice in zip(rows, choices, strict=True):
    table = choice["logprobs"]
    assert {len(column) for column in table.values()} == {len(row) + 1}
    assert table["token_logprobs"][0] is None and table["top_logprobs"][0] is None
    told = np.array(table["token_logprobs"][1:-1])
    assert (told == np.array(model.score(row).logprobs)).all()
    # The harness takes a token as greedy if its value is that of the likeliest, exactly.
    for place in range(1, len(row)):
      likeliest = model.generate(row[:place], max_tokens=1).tokens[0] if place < 4 else None
      best = max(table["top_logprobs"][place].values())
      value = table["token_logprobs"][place]
      assert value <= best and (likeliest is None or (value == best) == (likeliest == row[place]))
    assert choice["text"].startswith(model.detokenize(row))


def test_prompt_scores_are_the_same_alone_whole_streamed_and_without_an_answer(url: str):
  alone = {"prompt": TEXTS[0], "temperature": 0, "logprobs": 2, "echo": True}
  one = post(url, {**alone, "max_tokens": 1})["choices"][0]["logprobs"]
  none = post(url, {**alone, "max_tokens": 0})["choices"][0]["logprobs"]
  assert none["token_logprobs"] == one["token_logprobs"][:-1]
  assert none["text_offset"] == one["text_offset"][:-1]
  assert none["top_logprobs"] == one["top_logprobs"][:-1]
  body = {"model": "neuro", **alone, "max_tokens": 1, "stream": True}
  events = httpx2.post(f"{url}/v1/completions", json=body, timeout=120).text.split("\n\n")
  tables = [json.loads(event[6:])["choices"][0] for event in events[:-2]]
  told = [value for table in tables for value in table["logprobs"]["token_logprobs"]]
  assert told == one["token_logprobs"]


def test_offsets_point_at_the_tokens_of_the_text(url: str):
  choice = post(url, {"prompt": TEXTS[1], "max_tokens": 6, "logprobs": 0, "echo": True})["choices"][
    0
  ]
  table, text = choice["logprobs"], choice["text"]
  for token, offset in zip(table["tokens"], table["text_offset"], strict=True):
    # The BOS that the server put in front is not shown.
    if not token.startswith("bytes:") and token != "<|endoftext|>":
      assert text[offset:].startswith(token)


def test_answers_are_those_of_the_library_streamed_or_not(url: str, model: nj.Model):
  client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
  wanted = model.generate("The sea was", max_tokens=24, temperature=0.8, seed=7)
  asked = dict(model="neuro", prompt="The sea was", max_tokens=24, temperature=0.8, seed=7)
  whole = client.completions.create(**asked, logprobs=0)
  assert whole.choices[0].text == wanted.text
  assert whole.choices[0].logprobs.token_logprobs == list(wanted.logprobs)
  streamed = client.completions.create(**asked, stream=True)
  assert "".join(chunk.choices[0].text for chunk in streamed) == wanted.text
  # Answer i of several is that of the seed plus i.
  several = client.completions.create(**asked, n=2)
  second = model.generate("The sea was", max_tokens=24, temperature=0.8, seed=8)
  assert [choice.text for choice in several.choices] == [wanted.text, second.text]
  chat = client.chat.completions.create(
    model="neuro",
    messages=[{"role": "user", "content": "The sea was"}],
    max_tokens=8,
    temperature=0,
  )
  assert chat.choices[0].message.content == model.generate("The sea was\n", max_tokens=8).text


def test_generation_as_lm_evaluation_harness_asks_for_it(url: str, model: nj.Model):
  whole = model.generate(TEXTS[0], max_tokens=40).text
  until = [whole[12:15], "\u0000 never", "a", "b", "c", "d"]
  asked = {"prompt": [model.tokenize(TEXTS[0])], "max_tokens": 40, "temperature": 0, "seed": 1234}
  choice = post(url, {**asked, "stop": until})["choices"][0]
  end = min(whole.find(stop) for stop in until if stop in whole)
  assert choice["text"] == whole[:end] and choice["finish_reason"] == "stop"


def test_a_bias_and_a_rate_of_likelihood_reach_the_sampler(url: str, model: nj.Model):
  token = model.tokenize(" sea")[0]
  found = post(
    url, {"prompt": "The", "max_tokens": 3, "logit_bias": {str(token): 100}, "logprobs": 0}
  )
  assert set(found["choices"][0]["logprobs"]["tokens"]) == {" sea"}
  assert all(math.isfinite(x) for x in found["choices"][0]["logprobs"]["token_logprobs"])


def test_requests_answer_alike_alone_and_among_others(url: str):
  """Greedy and drawn, streamed and whole, of different lengths, more than there are slots."""
  asked = [
    {
      "model": "neuro", "prompt": f"{TEXTS[i % 2][: 6 + 5 * (i % 4)]}", "max_tokens": 8 + 3 * (i % 5),
      "temperature": 0.9 * (i % 3), "seed": i, "stream": i % 2 == 0, "logprobs": i % 3,
      "top_k": 50 if i % 4 == 1 else None,
    }
    for i in range(16)
  ]  # fmt: skip

  def ask(body: dict) -> tuple[str, list[float]]:
    found = httpx2.post(f"{url}/v1/completions", json=body, timeout=120)
    if not body["stream"]:
      parts = found.json()["choices"]
    else:
      parts = [json.loads(event[6:])["choices"][0] for event in found.text.split("\n\n")[:-2]]
    values = [value for part in parts for value in part["logprobs"]["token_logprobs"]]
    return "".join(part["text"] for part in parts), values

  alone = [ask(body) for body in asked]
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    assert list(pool.map(ask, asked)) == alone
  assert len({text for text, _ in alone}) > 8


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["--port", "70000"], "--port 70000"),
    (["--queue", "-1"], "--queue -1"),
    (["--api-key-file", "EMPTY"], "no key"),
    (["--bind", "203.0.113.1", "--port", "0"], "203.0.113.1"),
  ],
)
def test_wrong_options_are_said_before_the_model_is_read(
  tmp_path: Path, arguments: list[str], said: str
):
  (tmp_path / "EMPTY").write_text("# nothing\n")
  found = subprocess.run(
    [sys.executable, "-m", "neurojax", "serve", "--model", "neurollm", *arguments],
    capture_output=True, text=True, timeout=120, cwd=tmp_path,
  )  # fmt: skip
  assert found.returncode == 2 and said in found.stderr and "Traceback" not in found.stderr


def test_a_real_model_keeps_a_schema_at_any_temperature(url: str):
  import jsonschema

  schema = {
    "type": "object",
    "properties": {"sea": {"enum": ["calm", "wild"]}, "feet": {"type": "integer", "maximum": 999}},
    "required": ["sea", "feet"],
    "additionalProperties": False,
  }
  format = {"type": "json_schema", "json_schema": {"name": "sea", "schema": schema, "strict": True}}
  for seed in range(3):
    asked = {"prompt": "The sea was", "max_tokens": 60, "seed": seed, "response_format": format}
    found = post(url, {**asked, "temperature": 1.5, "n": 2})
    for choice in found["choices"]:
      assert choice["finish_reason"] == "stop"
      jsonschema.validate(json.loads(choice["text"]), schema)
