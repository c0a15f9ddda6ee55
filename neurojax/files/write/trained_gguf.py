"""Writing a model as GGUF, so that reading it back gives the same bits."""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import gguf
import ml_dtypes
import numpy as np

from neurojax.config import ModelConfig
from neurojax.files import names
from neurojax.files.gguf.file import GgufFile
from neurojax.files.gguf.writer import FILE_TYPES, Tensor, field, write
from neurojax.files.write import packing
from neurojax.files.write.trained_weights import Weights, stored
from neurojax.model import params
from neurojax.tokenizer.tokenizer_spec import TokenizerSpec
from neurojax.tokenizer.write.gguf import gguf_from_spec
from neurojax.weights.codecs import dequantize
from neurojax.weights.ternary import TernaryArray

Dense = Literal["F32", "F16", "BF16"]

_KINDS = gguf.GGMLQuantizationType
_DTYPES: dict[str, np.dtype] = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
_DENSE = {dtype.name: kind for kind, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
  """What a file says about its model: GGUF's general.* keys of the same names."""

  name: str
  license: str | None = None
  """An SPDX identifier, as "Apache-2.0"."""
  description: str | None = None
  author: str | None = None
  url: str | None = None


def write_gguf(
  path: str | Path,
  weights: Weights,
  tokenizer: TokenizerSpec | None,
  card: Card,
  *,
  kind: str | None = None,
  dense: Dense | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> str:
  """Write a model; the file appears whole or not at all, and has been opened once by our reader.

  Args:
    kind: How ternary matrices are stored: a name in `packing.TYPES`, exactly; or of `Dense`: as
      the numbers they stand for. None: the first of TQ2_0 and Q2_0 that holds them all.
    dense: How the other matrices are stored, rounded if need be; None: each in its own dtype. Norms
      are F32.
    progress: Called with the tensors written so far and their number.
  Returns: The type of the ternary matrices, or of the others where there are none.
  Raises:
    ValueError: the type cannot hold a weight exactly (nothing is written), a weight is damaged, or
      no architecture of GGUF has these parts; and what `gguf_from_spec` raises.
  """
  path = Path(path)
  arch = architecture(weights.config)
  packed = weights.ternary()
  if kind is None:
    kind = packing.choose(packed) if packed else _most(weights, dense)
  elif kind not in packing.TYPES and kind not in _DTYPES:
    raise ValueError(f"type {kind!r}: choose one of {', '.join([*packing.TYPES, *_DTYPES])}")
  elif kind in packing.TYPES:
    if not packed:
      raise ValueError(f"type {kind!r}: the model has no ternary matrix: leave the type away")
    for name, array in packed.items():
      packing.check(array, packing.TYPES[kind], name)
  with _replacing(path) as temporary:
    _write(temporary, weights, tokenizer, card, arch, kind, dense, progress)
    _verify(temporary, weights.config, arch)
  return kind


def architecture(config: ModelConfig) -> str:
  """The name under which GGUF files keep such a model.

  Raises: ValueError: there is none; it names the parts that do not go together.
  """
  if config.sub_norm and config.qk_norm:
    raise ValueError("sub_norm and qk_norm: no architecture of GGUF has both: train with one")
  if config.qk_norm:
    return "qwen3"
  if not config.sub_norm:
    return "llama"
  if not config.tied_embedding:
    raise ValueError(
      "sub_norm without tied_embedding: llama.cpp's bitnet has no head beside the embedding: train"
      " with tied_embedding = true"
    )
  if config.num_heads * config.head_dim != config.model_dim:
    raise ValueError(
      f"num_heads * head_dim = {config.num_heads * config.head_dim}, model_dim ="
      f" {config.model_dim}: llama.cpp's bitnet wants them equal: train with head_dim ="
      " model_dim / num_heads"
    )
  return "bitnet"


def _write(
  path: Path,
  weights: Weights,
  tokenizer: TokenizerSpec | None,
  card: Card,
  arch: str,
  kind: str,
  dense: Dense | None,
  progress: Callable[[int, int], None] | None,
) -> None:
  config, rules = weights.config, names.ARCHITECTURES[arch]
  places = [
    (n, layer, names.locate(rules.tensors, n, layer, config)) for n, layer in weights.places()
  ]
  said: dict[str, object] = {"general.architecture": arch}
  said |= {f"general.{key}": value for key, value in dataclasses.asdict(card).items()}
  said |= {
    "general.type": "model",
    "general.file_type": FILE_TYPES[kind],
    "general.quantization_version": gguf.GGML_QUANT_VERSION,
    **rules.metadata(arch, config),
    f"{arch}.vocab_size": config.vocab_size,
    **gguf_from_spec(tokenizer, config.vocab_size),
  }
  fields = [field(key, value) for key, value in said.items() if value is not None]

  def data(done: int, name: str, layer: int | None, place: Any) -> np.ndarray:
    if progress:
      progress(done, len(places))
    return _bytes(weights, name, layer, place.axes, rules, kind, dense)

  tensors = []
  for number, (name, layer, place) in enumerate(places, 1):
    shape = names.file_shape(place.axes, config)
    type_id, nbytes = _storage(weights, name, kind, dense, shape)
    make = functools.partial(data, number, name, layer, place)
    tensors.append(Tensor(place.name, shape, type_id, nbytes, make))
  write(path, fields, tensors)


def _dense_kind(weights: Weights, name: str, kind: str, dense: Dense | None) -> str:
  """The type of a tensor that is not kept packed."""
  array = weights.arrays[name]
  if not params.is_matrix(name):
    return "F32"
  if isinstance(array, TernaryArray):
    return kind
  return dense or _DENSE[array.dtype.name]


def _storage(
  weights: Weights, name: str, kind: str, dense: Dense | None, shape: tuple[int, ...]
) -> tuple[int, int]:
  """Type number and bytes of a tensor."""
  if isinstance(weights.arrays[name], TernaryArray) and kind in packing.TYPES:
    codec = packing.TYPES[kind]
    return codec.type_id, codec.nbytes(*shape)
  own = _dense_kind(weights, name, kind, dense)
  return _KINDS[own], math.prod(shape) * _DTYPES[own].itemsize


def _bytes(
  weights: Weights,
  name: str,
  layer: int | None,
  axes: str,
  rules: names.Architecture,
  kind: str,
  dense: Dense | None,
) -> np.ndarray:
  host = weights.read(name, layer, rules.rope_style)
  where = name if layer is None else f"{name} of layer {layer}"
  if isinstance(host, TernaryArray):
    if kind in packing.TYPES:
      return packing.pack(host, packing.TYPES[kind], where)
    # Rows of codes are rows of the file: output channels, or entries of the vocabulary.
    exact = dequantize(host.codes, host.scales.astype(np.float32), host.group_size)
    exact = exact[:, : host.contraction.k]
    values = exact.astype(_DTYPES[kind])
    if (values.astype(np.float32) != exact).any():
      raise ValueError(f"{where}: {kind} does not hold its scales exactly: choose F32")
    return values
  dtype = _DTYPES[_dense_kind(weights, name, kind, dense)]
  values = stored(host, name, axes, weights.config)
  with np.errstate(over="ignore"):
    rounded = values.astype(dtype)
  if not np.isfinite(rounded.astype(np.float32)).all():
    raise ValueError(f"{where}: a value is beyond {dtype.name}: choose BF16 or F32")
  return rounded


def _most(weights: Weights, dense: Dense | None) -> str:
  return dense or _DENSE[weights.arrays["down_FD"].dtype.name]


def _verify(path: Path, config: ModelConfig, arch: str) -> None:
  """What was written is what will be read: the file's own words make the same architecture."""
  with GgufFile(path) as file:
    file.check()
    # GGUF keeps these two in float32.
    wanted = dataclasses.replace(
      config,
      rope_style=names.ARCHITECTURES[arch].rope_style,
      rope_base=float(np.float32(config.rope_base)),
      norm_eps=float(np.float32(config.norm_eps)),
    )
    if file.config != wanted:
      raise AssertionError(f"wrote {wanted}, read {file.config}")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
  """A path beside `path` that takes its place when all went well, and is removed otherwise."""
  if path.is_dir():
    raise ValueError(f"{path} is a folder: name the file to write in it")
  if not path.parent.is_dir():
    raise FileNotFoundError(f"{path.parent}: no such folder: make it first")
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    yield temporary
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
