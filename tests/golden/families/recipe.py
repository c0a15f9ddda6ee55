"""The weights of the tiny models here: numbers that follow from a tensor's name and shape alone."""

import json
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent
PROMPT, DECODED = 48, 64


def values(name: str, shape: tuple[int, ...], *, norms_around: float) -> np.ndarray:
  """float32, large enough that attention, gates and experts make a difference.

  Args:
    norms_around: What the scales of norms lie around: 0 where a checkpoint keeps what is added to 1.
  """
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  x = rng.standard_normal(shape, np.float32)
  if name.endswith("layer_scalar"):
    return 0.7 + 0.1 * x
  if name.endswith(".bias"):
    return 0.5 * x
  if "norm" in name:
    return norms_around + 0.2 * x
  # The rows of an embedding lie as the others do, so that a tied head's logits are of size 1.
  return x * np.float32((3.0 if "q_proj" in name or "k_proj" in name else 1.0) / shape[-1] ** 0.5)


def tokens(vocab_size: int) -> np.ndarray:
  return np.random.default_rng(5).integers(0, vocab_size, PROMPT + DECODED).astype(np.int32)


def write_folder(folder: Path, name: str) -> Path:
  """A folder for transformers, from what is kept of a family here."""
  kept = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
  around = 0.0 if kept["config"]["model_type"] == "gemma3_text" else 1.0
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(kept["config"]), encoding="utf-8")
  arrays = {
    tensor: values(tensor, tuple(shape), norms_around=around)
    for tensor, shape in kept["tensors"].items()
  }
  save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
  return folder
