"""What Prometheus reads, and that every panel of the board has something to show."""

import json
import logging
import re
from pathlib import Path

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from tests.serve import process
from tests.serve.test_http import CHAT, post

BOARD = Path(__file__).parents[2] / "configs" / "serve" / "grafana.json"


def samples(url: str) -> dict[str, float]:
  """Values by name, added up over labels."""
  found: dict[str, float] = {}
  for family in text_string_to_metric_families(httpx2.get(f"{url}/metrics").text):
    assert family.documentation
    for sample in family.samples:
      assert sample.labels["model_name"] == "fake"
      found[sample.name] = found.get(sample.name, 0.0) + sample.value
  return found


def test_what_was_served_is_counted():
  with process.fake() as server:
    before = samples(server.url)
    assert before["vllm:generation_tokens_total"] == 0
    post(server.url, {**CHAT, "max_tokens": 5, "n": 2, "ignore_eos": True})
    post(server.url, {**CHAT, "max_tokens": 7, "stream": True, "ignore_eos": True})
    post(server.url, {**CHAT, "max_tokens": 0})
    found = samples(server.url)
  assert found["vllm:generation_tokens_total"] == 17
  assert found["vllm:request_success_total"] == 3
  assert found["vllm:time_to_first_token_seconds_count"] == 3
  assert found["vllm:inter_token_latency_seconds_count"] == 14
  assert found["vllm:e2e_request_latency_seconds_count"] == 3
  assert found["vllm:request_generation_tokens_sum"] == 17
  assert found["vllm:request_params_n_sum"] == 3
  assert found["vllm:num_requests_running"] == 0 and found["neurojax:slots"] == 8
  # Three requests, one of them refused, and one look at the metrics.
  assert found["neurojax:http_requests_total"] == 4


def test_refusals_failures_and_odd_paths_are_counted():
  with process.fake(engine={"fail_at": 2}) as server:
    post(server.url, {**CHAT, "max_tokens": 5})
    for i in range(3):
      httpx2.get(f"{server.url}/odd/{i}")
    text = httpx2.get(f"{server.url}/metrics").text
    assert samples(server.url)["neurojax:request_failures_total"] == 1
  assert 'path="other",status="404"} 3.0' in text and "/odd" not in text


def test_every_panel_of_the_board_reads_what_there_is():
  with process.fake(engine={"slots": 1, "delay_s": 0.01}, limits={"queued": 0}) as server:
    post(server.url, {**CHAT, "max_tokens": 5})
    found = samples(server.url)
  board = json.loads(BOARD.read_text(encoding="utf-8"))
  panels = board["panels"]
  assert len({panel["title"] for panel in panels}) == len(panels) >= 10
  for panel in panels:
    for target in panel["targets"]:
      names = re.findall(r"(?:vllm|neurojax):\w+", target["expr"])
      assert names and target["expr"].count("$model_name") >= len(names)
      for name in names:
        # A fake engine has no stages; tests/serve/test_stages.py looks at those.
        assert name in found or name.startswith("neurojax:stage_"), name


def test_the_log_has_a_line_for_each_request_and_nothing_of_what_was_asked(tmp_path: Path):
  from starlette.testclient import TestClient

  from neurojax.engine.fake import FakeEngine
  from neurojax.serve.app import make_app
  from neurojax.serve.served import Served
  from neurojax.tokenizer import Tokenizer
  from tests.serve.fake_server import SPEC, VOCAB

  lines: list[str] = []
  handler = logging.Handler()
  handler.emit = lambda record: lines.append(record.getMessage())
  log = logging.getLogger("neurojax.serve.app")
  log.addHandler(handler)
  log.setLevel(logging.INFO)
  try:
    served = Served(FakeEngine(vocab_size=len(VOCAB)), Tokenizer(SPEC), names=["fake"])
    client = TestClient(make_app(served))
    body = {"model": "fake", "prompt": "secret words", "max_tokens": 2, "user": "somebody"}
    client.post("/v1/completions", json=body, headers={"x-request-id": "mine-1"})
    client.post("/v1/completions", content=b"secret", headers={"content-type": "application/json"})
  finally:
    log.removeHandler(handler)
    log.setLevel(logging.NOTSET)
  told = [json.loads(line) for line in lines]
  assert [line["status"] for line in told] == [200, 400]
  assert told[0]["request"] == "mine-1" and told[0]["prompt_tokens"] == 13
  assert "secret" not in "".join(lines) and "somebody" not in "".join(lines)
