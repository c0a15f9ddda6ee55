"""Writes safetensors files, a tensor at a time.

Format: https://github.com/huggingface/safetensors: the length of the header as 8 bytes, little-
endian; the header, JSON; the tensors in the order of the header, without gaps.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np

from neurojax.files.put import put, stored

Dtype = Literal["float32", "bfloat16", "float16"]

DTYPES: Mapping[Dtype, np.dtype] = {
  "float32": np.dtype("<f4"),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
  "float16": np.dtype("<f2"),
}
_NAMES: Mapping[Dtype, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_ALIGNMENT = 8


def write_safetensors(
  path: Path,
  shapes: Mapping[str, tuple[int, ...]],
  tensors: Iterable[np.ndarray],
  dtype: Dtype | Mapping[str, Dtype],
  metadata: Mapping[str, str],
) -> None:
  """Write a file.

  Args:
    shapes: The shape of each tensor by its name.
    tensors: The values in the order of `shapes`, in the dtype.
    dtype: The dtype of all tensors, or of each by its name.
    metadata: Words about the file, for its header.
  Raises: ValueError: a tensor has another shape or dtype.
  """
  header: dict[str, object] = {"__metadata__": dict(metadata)}
  own: Mapping[str, Dtype] = dict.fromkeys(shapes, dtype) if isinstance(dtype, str) else dtype
  end = 0
  for name, shape in shapes.items():
    start, end = end, end + math.prod(shape) * DTYPES[own[name]].itemsize
    header[name] = {"dtype": _NAMES[own[name]], "shape": list(shape), "data_offsets": [start, end]}
  text = json.dumps(header, separators=(",", ":")).encode()
  # The tensors then begin at a multiple of this in the file.
  text += b" " * (-len(text) % _ALIGNMENT)
  with stored(path) as file:
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for (name, shape), values in zip(shapes.items(), tensors, strict=True):
      if values.shape != shape or values.dtype != DTYPES[own[name]]:
        raise ValueError(
          f"{name} is {values.dtype} {values.shape}: {own[name]} {shape} was announced"
        )
      put(file, values)
