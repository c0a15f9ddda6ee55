"""Make ternary.gguf and logits.npy: a ternary file of llama.cpp's own tool, and what llama.cpp computes.

    python -m tests.golden.llama_quantize.make LLAMA_QUANTIZE LLAMA_PYTHON

LLAMA_QUANTIZE is llama.cpp's program of that name; LLAMA_PYTHON a Python that has llama-cpp-python.
The model is random; its matrices become TQ1_0, TQ2_0 and Q2_0. In front of such matrices llama.cpp rounds activations to 8 bits, so its logits are those of the same file expanded to
float32, by llama-quantize too.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from neurojax.config import ModelConfig
from tests.files import trained
from tests.tokenizer import vocab

HERE = Path(__file__).parent
FILE, LOGITS = HERE / "ternary.gguf", HERE / "logits.npy"
SCRIPT = Path(__file__).parents[2] / "files" / "llama_cpp_logits.py"
IDS = [(37 * i + 5) % 263 for i in range(16)]
CONFIG = ModelConfig(
  vocab_size=263, model_dim=256, num_layers=1, num_heads=4, num_kv_heads=1, head_dim=64, ffn_dim=256,
  rope_style="interleaved", norm_eps=2.0**-17,
)  # fmt: skip
KINDS = {"ffn_gate": "TQ2_0", "ffn_down": "Q2_0"}
"""Of the other matrices: TQ1_0."""


def write_float(path: Path, config: ModelConfig) -> Path:
  """A random model in float32, with the vocabulary that tests have."""
  weights = trained.make(config, ternary=False, outer="float32")
  trained.write_gguf(path, weights, vocab.tiny_bpe(add_eos=False), dict(name="random"), dense="F32")
  return path


def quantize(program: str, source: Path, out: Path, kind: str, *options: str) -> Path:
  """Run llama-quantize. Raises: RuntimeError: it failed, with its last words."""
  command = [program, "--allow-requantize", *options, str(source), str(out), kind, "1"]
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    raise RuntimeError(f"{kind}: {(done.stdout + done.stderr)[-1000:]}")
  return out


def logits(python: str, file: Path, ids: list[int]) -> np.ndarray:
  """What llama.cpp computes from a file, float32 [T, V]."""
  request = {"model": str(file), "ids": ids, "text": "a", "tensors": []}
  done = subprocess.run(
    [python, str(SCRIPT)], input=json.dumps(request), capture_output=True, text=True
  )
  if done.returncode:
    raise RuntimeError(done.stderr[-3000:])
  return np.array(json.loads(done.stdout)["logits"], np.float32)


def main(program: str, python: str) -> None:
  options = [
    word for name, kind in KINDS.items() for word in ("--tensor-type", f"{name}={kind.lower()}")
  ]
  with tempfile.TemporaryDirectory() as scratch:
    source = write_float(Path(scratch, "f32.gguf"), CONFIG)
    quantize(program, source, FILE, "TQ1_0", "--token-embedding-type", "tq1_0", *options)
    expanded = quantize(program, FILE, Path(scratch, "expanded.gguf"), "F32")
    np.save(LOGITS, logits(python, expanded, IDS))


if __name__ == "__main__":
  main(*sys.argv[1:])
