"""Writes model files of random ternary weights: the size and speed of a real model without a download.

python -m neurojax.files.dummy bonsai-8b "Q2_0 (group 128)" bonsai-8b.gguf
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

from neurojax.config import ModelConfig
from neurojax.files import names
from neurojax.files.gguf.writer import Tensor, field, write
from neurojax.model import params
from neurojax.tokenizer.tokenizer_spec import TokenizerSpec
from neurojax.tokenizer.write.gguf import gguf_from_spec
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
    seed: The seed of the random numbers.
  Raises: ValueError: an unknown type, rows that are no whole blocks, or a configuration that no
    known architecture has.
  """
  if kind not in CODECS:
    raise ValueError(f"type {kind!r}: choose one of {', '.join(CODECS)}")
  if outer is not None and outer not in gguf.GGMLQuantizationType.__members__:
    raise ValueError(f"outer = {outer!r}: choose a type that the gguf package encodes, as 'Q8_0'")
  outer_type = None if outer is None else gguf.GGMLQuantizationType[outer]
  architecture = names.architecture_of(config, as_it_is=True)
  said = {
    "general.architecture": architecture,
    "general.name": f"random {kind}",
    "general.quantization_version": gguf.GGML_QUANT_VERSION,
    **names.ARCHITECTURES[architecture].metadata(architecture, config),
  }
  if (spec := _vocabulary(config.vocab_size)) is not None:
    said |= gguf_from_spec(spec, config.vocab_size)
  tensors = list(_tensors(architecture, config, CODECS[kind], outer_type, seed))
  write(Path(path), [field(key, value) for key, value in said.items()], tensors)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Random(Tensor):
  """A tensor of random numbers.

  Attributes:
    seeds: The seeds of its numbers.
    codec: The ternary type of a matrix, or None.
    outer: The type of embedding and head, where it is another.
  """

  seeds: tuple[int, int]
  codec: Codec | None
  outer: gguf.GGMLQuantizationType | None

  def data(self) -> np.ndarray:
    rng = np.random.default_rng(self.seeds)
    return _values(rng, self.name, self.shape, self.codec, self.outer)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Factors(Tensor):
  """The rotary factors of a configuration."""

  factors: np.ndarray

  def data(self) -> np.ndarray:
    return self.factors


def _tensors(
  architecture: str,
  config: ModelConfig,
  codec: Codec,
  outer: gguf.GGMLQuantizationType | None,
  seed: int,
) -> Iterator[Tensor]:
  """The tensors of the file; each has the seed and its number as seeds."""
  factors = np.array(names.rope_factors(config), np.float32)
  if factors.size:
    type_id, nbytes = gguf.GGMLQuantizationType.F32, factors.nbytes
    yield _Factors(
      name=names.FACTORS, shape=factors.shape, type_id=type_id, nbytes=nbytes, factors=factors
    )
  places = names.ARCHITECTURES[architecture].places(config)
  for index, (name, layer, stored) in enumerate(places, 1 if factors.size else 0):
    own = codec if params.is_matrix(name) else None
    shape = names.file_shape(stored.axes, config, layer)
    type_id, nbytes = _storage(stored.name, shape, own, outer)
    yield _Random(
      name=stored.name, shape=shape, type_id=type_id, nbytes=nbytes, seeds=(seed, index), codec=own,
      outer=outer,
    )  # fmt: skip


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


def _vocabulary(size: int) -> TokenizerSpec | None:
  """Special tokens, bytes and made-up words; None where that is more than `size` tokens."""
  special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
  words = size - len(special)
  if words < 0:
    return None
  return TokenizerSpec(
    kind="spm",
    tokens=(*special, *(f"\u2581word{i}" for i in range(words))),
    types=("unknown", "control", "control", *["byte"] * 256, *["normal"] * words),
    scores=(*[0.0] * len(special), *(-float(i) for i in range(words))),
    bos_id=1,
    eos_id=2,
    unknown_id=0,
    stop_ids=frozenset({2}),
    add_bos=True,
    add_space_prefix=True,
  )


def _main(arch: str, kind: str, path: Path, outer: str | None = None, seed: int = 0) -> None:
  write_dummy(path, ModelConfig.named(arch), kind, outer=outer, seed=seed)


if __name__ == "__main__":
  import tyro

  tyro.cli(tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(_main))
