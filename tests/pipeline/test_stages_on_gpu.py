"""Stage servers that share one GPU give the tokens of one process, to the last bit."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from neurojax.config import ModelConfig
from neurojax.files.dummy import write_dummy
from tests.kernels import hopper

pytestmark = hopper.needed


@pytest.mark.timeout(400)
@pytest.mark.parametrize("weights", ["w2a8", "w2a16"])
def test_two_stages_give_the_tokens_of_one_process(tmp_path, weights: str):
  config = dataclasses.replace(ModelConfig.named("bonsai-1.7b"), num_layers=5, vocab_size=4096)
  path = tmp_path / "model.gguf"
  write_dummy(path, config, "Q2_0 (group 128)")

  def answer(*how: str) -> tuple[list[int], list[float], str]:
    command = [sys.executable, "-m", "neurojax", "generate", "--model", str(path), "--json"]
    command += ["--weights", weights, "--dtype", "bfloat16", "--programs", "fused", "--ignore-eos"]
    command += ["--prompt", "the sea and the sky", "--max-tokens", "40", *how]
    done = subprocess.run(
      command, capture_output=True, text=True,
      env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    return answer["tokens"], answer["logprobs"], done.stderr

  tokens, logprobs, said = answer()
  assert len(tokens) == 40 and len(set(tokens)) > 3
  assert answer("--stages", "2")[:2] == (tokens, logprobs), said
