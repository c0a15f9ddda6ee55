"""Model files of random ternary weights: the size and speed of a real model without its download.

python -m neurojax.files.dummy bonsai-8b "Q2_0 (group 128)" bonsai-8b.gguf
"""

import math
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

from neurojax.config import ModelConfig
from neurojax.files import names
from neurojax.model import params
from neurojax.weights.codecs import CODECS, Codec
from neurojax.weights.ternary import CODE_BYTES


def write_dummy(
  path: str | Path, config: ModelConfig, kind: str, *, outer: str | None = None, seed: int = 0
) -> None:
  """Write a GGUF file, one tensor in memory at a time. llama.cpp loads it where it has the type.

  Codes are uniform; scales are such that a product keeps the size of normalised activations, and
  differ by up to a factor of three. The tokenizer is a list of made-up words, where the vocabulary
  has room for it.

  Args:
    kind: A name in `weights.codecs.CODECS`, for all matrices.
    outer: Another type that the gguf package can encode ("F16", "Q8_0"), for embedding and head.
  Raises: ValueError: an unknown type, rows that are no whole blocks, or a configuration that no
    known architecture has.
  """
  if kind not in CODECS:
    raise ValueError(f"type {kind!r}: choose one of {', '.join(CODECS)}")
  if outer is not None and outer not in gguf.GGMLQuantizationType.__members__:
    raise ValueError(f"outer = {outer!r}: choose a type that the gguf package encodes, as 'Q8_0'")
  codec = CODECS[kind]
  outer_type = None if outer is None else gguf.GGMLQuantizationType[outer]
  architecture = names.architecture_of(config, as_it_is=True)
  writer = gguf.GGUFWriter(path, architecture)
  writer.add_name(f"random {kind}")
  writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
  arch = names.ARCHITECTURES[architecture]
  for key, value in arch.metadata(architecture, config).items():
    _add(writer, key, value)
  _add_vocabulary(writer, config.vocab_size)

  tensors = list(_tensors(arch, config))
  for name, shape, is_matrix in tensors:
    type_id, nbytes = _storage(name, shape, codec if is_matrix else None, outer_type)
    # A dtype other than uint8, as that would make the package translate the shape.
    writer.add_tensor_info(name, shape, np.dtype(np.int8), nbytes, raw_dtype=type_id)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_ti_data_to_file()
  for index, (name, shape, is_matrix) in enumerate(tensors):
    rng = np.random.default_rng([seed, index])
    values = _values(rng, name, shape, codec if is_matrix else None, outer_type)
    if name == names.FACTORS:
      values = np.array(names.rope_factors(config), np.float32)
    writer.write_tensor_data(values)
  writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
  if isinstance(value, list):
    writer.add_array(key, value)
  elif isinstance(value, str):
    writer.add_string(key, value)
  elif isinstance(value, float):
    writer.add_float32(key, value)
  else:
    writer.add_uint32(key, int(value))  # type: ignore[call-overload]


def _tensors(
  arch: names.Architecture, config: ModelConfig
) -> Iterator[tuple[str, tuple[int, ...], bool]]:
  """Name and shape of each tensor, and whether it is a matrix that may be packed."""
  if factors := names.rope_factors(config):
    yield names.FACTORS, (len(factors),), False
  for name, layer, stored in arch.places(config):
    yield stored.name, names.file_shape(stored.axes, config, layer), params.is_matrix(name)


def _is_outer(name: str) -> bool:
  return not name.startswith("blk.")


def _storage(
  name: str, shape: tuple[int, ...], codec: Codec | None, outer: gguf.GGMLQuantizationType | None
) -> tuple[int, int]:
  if codec is None:
    return gguf.GGMLQuantizationType.F32, 4 * math.prod(shape)
  if outer is None or not _is_outer(name):
    return codec.type_id, codec.nbytes(math.prod(shape[:-1]), shape[-1])
  block, block_bytes = gguf.GGML_QUANT_SIZES[outer]
  return outer, math.prod(shape) // block * block_bytes


def _values(
  rng: np.random.Generator,
  name: str,
  shape: tuple[int, ...],
  codec: Codec | None,
  outer: gguf.GGMLQuantizationType | None,
) -> np.ndarray:
  if codec is None:
    return rng.uniform(0.5, 1.5, shape).astype(np.float32)
  rows, k = math.prod(shape[:-1]), shape[-1]
  if outer is not None and _is_outer(name):
    return gguf.quantize(rng.standard_normal(shape, np.float32) / np.float32(math.sqrt(k)), outer)
  codes = CODE_BYTES[rng.integers(0, 81, (rows, k // 4), np.uint8)]
  # Two thirds of the weights are not zero: the sum of their squares over a row is about 1.
  grouping = (1, 1) if codec.group_size is None else (rows, k // codec.group_size)
  scales = rng.uniform(0.5, 1.5, grouping) * math.sqrt(1.5 / k)
  return codec.pack(codes, scales.astype(codec.scale_dtype))


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
  special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
  words = size - len(special)
  if words < 0:
    return
  writer.add_tokenizer_model("llama")
  writer.add_token_list([*special, *(f"▁word{i}" for i in range(words))])
  writer.add_token_scores([0.0] * len(special) + [-float(i) for i in range(words)])
  kind = gguf.TokenType
  control = [kind.UNKNOWN, kind.CONTROL, kind.CONTROL]
  writer.add_token_types([*control, *[kind.BYTE] * 256, *[kind.NORMAL] * words])
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  writer.add_unk_token_id(0)


def _main(arch: str, kind: str, path: Path, outer: str | None = None, seed: int = 0) -> None:
  write_dummy(path, ModelConfig.named(arch), kind, outer=outer, seed=seed)


if __name__ == "__main__":
  import tyro

  tyro.cli(tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(_main))
