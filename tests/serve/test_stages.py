"""`neurojax serve --stages 2`: the tokens of one process, metrics of stages, and a stage that dies."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

import neurojax as nj
from tests.serve import process
from tests.serve.test_http import check_error, wait_until


@pytest.fixture
def server(tiny_path: Path) -> Iterator[process.Process]:
  command = [
    sys.executable, "-m", "neurojax", "serve", "--model", str(tiny_path), "--name", "tiny", "--port",
    "0", "--json", "--stages", "2", "--sequences", "4", "--context", "512",
  ]  # fmt: skip
  with process.started(command) as server:
    yield server


ASK = {"model": "tiny", "temperature": 0.9, "seed": 3, "ignore_eos": True}


def test_two_stages_answer_as_one_process_does(server: process.Process, tiny_path: Path):
  body = {**ASK, "prompt": ["abc", "hij"], "max_tokens": 20, "logprobs": 0}
  found = httpx2.post(f"{server.url}/v1/completions", json=body, timeout=120).json()
  with nj.load(tiny_path, context=512, sequences=4) as model:
    for choice, prompt in zip(found["choices"], body["prompt"], strict=True):
      wanted = model.generate(prompt, max_tokens=20, temperature=0.9, seed=3, ignore_eos=True)
      assert choice["text"] == wanted.text
      assert choice["logprobs"]["token_logprobs"] == list(wanted.logprobs)
  text = httpx2.get(f"{server.url}/metrics").text
  for name in ("neurojax:stage_step_seconds", "neurojax:stage_decode_steps_total"):
    assert text.count(f"\n{name}{{") == 2
  assert "\nneurojax:stages_up{" in text


def stages(server: process.Process) -> list[int]:
  """The processes of its stage servers."""
  listed = subprocess.run(
    ["ps", "--ppid", str(server.process.pid), "-o", "pid=,args="], capture_output=True, text=True
  ).stdout
  return [int(line.split()[0]) for line in listed.splitlines() if " stage " in line]


def test_a_stage_that_dies_ends_the_stream_in_an_error_and_the_health(server: process.Process):
  body = {**ASK, "prompt": "abc", "max_tokens": 480, "stream": True}
  url = f"{server.url}/v1/completions"
  with httpx2.stream("POST", url, json=body, timeout=120) as found:
    lines = found.iter_lines()
    next(lines)
    os.kill(stages(server)[1], signal.SIGKILL)
    rest = [line for line in lines if line]
  error = json.loads(rest[-2].removeprefix("data: "))["error"]
  assert (
    rest[-1] == "data: [DONE]"
    and error["code"] == "engine_error"
    and "127.0.0.1" in error["message"]
  )
  wait_until(lambda: httpx2.get(f"{server.url}/health", timeout=60).status_code == 503, 60)
  check_error(httpx2.post(url, json={**body, "stream": False}, timeout=60), 500)
