"""Random blocks of the types of ggml: any bytes, or such as stand for numbers of modest size."""

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from jaxtyping import UInt8

_SCALES = {
  "Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2),
  "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,),
}  # fmt: skip
"""Where a block has its float16 numbers, if not one in front."""


def anything(kind: str, n: int, k: int, seed: int = 0) -> UInt8[np.ndarray, "N bytes"]:
  """Rows of blocks of random bytes."""
  block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
  shape = (n, k // block * block_bytes)
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def modest(kind: str, n: int, k: int, seed: int = 0) -> UInt8[np.ndarray, "N bytes"]:
  """Rows of blocks of random codes with scales that keep the weights below one or so."""
  rows = anything(kind, n, k, seed)
  rng = np.random.default_rng(seed + 1)
  _, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
  blocks = rows.reshape(-1, block_bytes)
  if kind in ("F16", "BF16", "F32"):
    raise ValueError(f"{kind} has no blocks")
  halves = (rng.uniform(0.5, 1.5, (len(blocks), 4)) * 2.0**-12).astype("<f2")
  if kind == "MXFP4":
    blocks[:, 0] = rng.integers(118, 122, len(blocks))
  elif kind == "NVFP4":
    blocks[:, :4] = rng.integers(1, 30, (len(blocks), 4))
  elif kind == "Q8_K":
    blocks[:, :4] = halves[:, :1].astype("<f4").view(np.uint8)
  elif kind == "IQ1_M":
    words = blocks[:, 48:56].view("<u2")
    shifts = np.array([0, 4, 8, 12], np.uint16)
    words[:] = words & 0x0FFF | (halves[:, :1].view("<u2") >> shifts & 15) << 12
  else:
    for i, at in enumerate(_SCALES.get(kind, (0,))):
      blocks[:, at : at + 2] = np.ascontiguousarray(halves[:, i : i + 1]).view(np.uint8)
  return rows
