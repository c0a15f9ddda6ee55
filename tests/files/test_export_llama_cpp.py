"""Exported files through llama.cpp itself.

NEUROJAX_LLAMA_PYTHON names a Python that has llama-cpp-python, in any environment; without it these
tests are skipped. That package builds llama.cpp, so it is no dependency of ours.
"""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from neurojax.config import ModelConfig
from neurojax.files.model_file import ModelFile
from neurojax.files.open import open_model
from neurojax.tokenizer import Tokenizer
from tests.files import tiny, trained
from tests.files.oracle import Oracle
from tests.tokenizer import vocab

PYTHON = os.environ.get("NEUROJAX_LLAMA_PYTHON")
pytestmark = pytest.mark.skipif(
  PYTHON is None, reason="NEUROJAX_LLAMA_PYTHON names no Python that has llama-cpp-python"
)

TEXT = "the cat, the 'll  then 12 \n\n\u00e9a\u4e2d"
IDS = [(37 * i + 5) % 263 for i in range(40)]
PLAIN = ModelConfig(
  vocab_size=263, model_dim=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64,
  ffn_dim=512,
)  # fmt: skip
CONFIGS = {
  "llama": dataclasses.replace(PLAIN, rope_style="interleaved", tied_embedding=False, num_heads=8),
  "llama, turned": PLAIN,
  "bitnet": dataclasses.replace(PLAIN, sub_norm=True),
  "qwen3": dataclasses.replace(PLAIN, qk_norm=True, head_dim=32, num_heads=16),
}


def ask(file: ModelFile, *tensors: tuple[str, int]) -> dict:
  listed = [file.info(name, layer) for name, layer in tensors]
  request = {
    "model": str(file.path),
    "ids": IDS,
    "text": TEXT,
    "tensors": [
      {
        "type": info.type.partition(" ")[0],
        "count": info.shape[0] * info.shape[1],
        "bytes": file.stored_bytes(name, layer).tobytes().hex(),
      }
      for info, (name, layer) in zip(listed, tensors, strict=True)
    ],
  }
  script = Path(__file__).with_name("llama_cpp_logits.py")
  done = subprocess.run(
    [str(PYTHON), str(script)], input=json.dumps(request), capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", ["F32", "TQ2_0", "TQ1_0", "Q2_0"])
def test_llama_cpp_agrees(tmp_path: Path, config: ModelConfig, kind: str):
  weights = trained.make(config, 256)
  dense = "F32" if kind == "F32" else None
  spec = vocab.tiny_bpe(add_eos=False)
  trained.write_gguf(tmp_path / "m.gguf", weights, spec, dict(name="m"), kind=kind, dense=dense)
  packed = [] if kind == "F32" else [("q_DNH", 1), ("o_NHD", 0), ("down_FD", 1)]
  with open_model(tmp_path / "m.gguf") as file:
    theirs = ask(file, *packed)
    ours_TV = Oracle(file).logits_TV(IDS)
    for (name, layer), values in zip(packed, theirs["tensors"], strict=True):
      ours = tiny.as_stored(file.read(name, layer), name)
      np.testing.assert_array_equal(np.array(values, np.float32), ours.ravel())
    assert Tokenizer(file.tokenizer).encode(TEXT, add_special=True) == theirs["text_ids"]
  apart_TV = np.abs(ours_TV - np.array(theirs["logits"])) / ours_TV.std()
  if kind == "F32":
    assert apart_TV.max() < 5e-5
  else:
    # The weights are the same; llama.cpp rounds activations to 8 bits in front of such a matrix,
    # and to bfloat16 in front of the head.
    assert np.sqrt((apart_TV**2).mean()) < 0.06
