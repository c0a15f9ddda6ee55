"""Writes any source as GGUF: exactly, or in a type that is asked for by name."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from neurojax.config import ModelConfig, RopeStyle
from neurojax.files import names
from neurojax.files.gguf.file import GgufFile
from neurojax.files.gguf.writer import FILE_TYPES, Tensor, field, write
from neurojax.files.open import open_model
from neurojax.files.weight_source import WeightSource
from neurojax.files.write import exact, ternarize
from neurojax.files.write.packing import TYPES, pack
from neurojax.files.write.tensors import (
  DTYPES,
  NO_LICENSE,
  Converted,
  Loss,
  Place,
  is_ternary,
  narrowest,
  numbers,
  places,
  rounded,
  ternary_rows,
)
from neurojax.model import params
from neurojax.tokenizer.write.gguf import gguf_from_spec
from neurojax.weights import codecs

_IDS = gguf.GGMLQuantizationType
_ROUNDED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
KINDS = (*TYPES, *DTYPES, *_ROUNDED)
"""Types that are written. Ternary types hold ternary weights exactly, or the nearest ternary ones."""

_DROPPED = ("general.alignment", "general.file_type", "general.quantization_version")
"""Keys of a GGUF file that are written anew."""


@dataclasses.dataclass(frozen=True)
class _Conversion:
  """The choices that all tensors of a conversion share.

  Attributes:
    source: The source of the numbers.
    rope_style: The order of a head's elements in the new file.
    kind: The type that is asked for, for matrices of layers: one of KINDS, or None: each as it is.
    outer: The same for embedding and head.
    is_exact: Ternary matrices keep their numbers, and only they get a ternary type.
    ternary: The type of ternary matrices for which none is asked, if `is_exact`.
    loss: Counts what rounding changes.
  """

  source: WeightSource
  rope_style: RopeStyle
  kind: str | None
  outer: str | None
  is_exact: bool
  ternary: str | None
  loss: Loss

  def wanted(self, place: Place) -> str | None:
    """The type that is asked for; None: its own, or the narrowest that changes nothing."""
    if not params.is_matrix(place.name):
      return None
    wanted = self.outer if place.layer is None else self.kind
    if not self.is_exact:
      return wanted
    if is_ternary(self.source, place):
      return wanted or self.ternary
    return None if wanted in TYPES else wanted


def to_gguf(
  source: WeightSource,
  path: Path,
  *,
  kind: str | None = None,
  outer: str | None = None,
  is_exact: bool = False,
  overwrite: bool = False,
  general: Mapping[str, str] | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> Converted:
  """Write a model as GGUF. The file appears whole or not at all, after our reader has opened it once.

  Args:
    kind: One of KINDS, for the matrices of layers. None: every one as it is; quantized matrices of a
      folder in the narrowest type that changes nothing.
    outer: The same for embedding and head.
    is_exact: Refuse a type that does not hold a ternary matrix exactly, in place of taking the nearest
      numbers. Matrices that are not ternary then get no ternary type, and ternary ones for which
      none is asked all get the first of TQ2_0 and Q2_0 that holds them.
    overwrite: Replace a file that is there.
    general: Keys such as "general.name" to set.
    progress: Called with the number of tensors written so far and of all.
  Raises:
    FileExistsError: something is there.
    ValueError: a type that does not take rows of this length, or no architecture holds this model, or
      a number is NaN or infinite; and what reading raises.
    NotImplementedError: the tokenizer has no place in GGUF; and what reading raises.
  """
  for option, value in (("type", kind), ("type of embedding and head", outer)):
    if value is not None and value not in KINDS:
      raise ValueError(f"{option} {value!r}: choose one of {', '.join(KINDS)}")
  source.check()
  if is_exact:
    exact.check_parts(source.config, "GGUF")
  said = dict(general or {})
  if isinstance(source, GgufFile):
    architecture = str(source.interpretation.architecture)
    job = _Conversion(source, source.config.rope_style, kind, outer, is_exact, None, Loss())
    tensors = _from_gguf(source, job)
    kept = [key for key in source.metadata if key not in (*_DROPPED, *said)]
    fields = [source.field_bytes(key) for key in kept]
  else:
    architecture = names.architecture_of(source.config)
    style, free = names.ARCHITECTURES[architecture].rope_style, None
    if is_exact:
      free = exact.ternary_type(source, _places(source, architecture), kind, outer)
    job = _Conversion(source, style, kind, outer, is_exact, free, Loss())
    tensors = _from_other(architecture, job)
    fields = [field(key, value) for key, value in _metadata(source, architecture, said).items()]
  fields += [field(key, value) for key, value in said.items()]
  fields.append(field("general.quantization_version", gguf.GGML_QUANT_VERSION))
  main = next((tensor.kind for tensor in tensors if is_exact and tensor.is_ternary), None) or _most(
    tensors
  )
  if (file_type := FILE_TYPES.get(main)) is not None:
    fields.append(field("general.file_type", file_type))
  elif kind is None and isinstance(source, GgufFile) and "general.file_type" in source.metadata:
    fields.append(source.field_bytes("general.file_type"))
  with new_file(path, overwrite=overwrite) as temporary:
    write(temporary, fields, tensors, progress)
    _verify(source, temporary, architecture)
  types: dict[str, int] = {}
  for tensor in tensors:
    types[tensor.kind] = types.get(tensor.kind, 0) + 1
  notes = list(_notes(architecture, source.config))
  if "general.license" not in {**source.card, **said}:
    notes.append(NO_LICENSE)
  return Converted(architecture, main, types, job.loss, tuple(notes))


def _notes(architecture: str, config: ModelConfig) -> Iterator[str]:
  """Sentences about cases in which llama.cpp, as of 2026, computes something else than the file says."""
  windows = {kind.sliding_window for kind in config.kinds} - {None}
  if architecture == "llama" and windows:
    yield (
      f"llama.cpp gives 'llama' no sliding window: its logits are those of this model for the first"
      f" {min(windows)} positions only"
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor(Tensor):
  """A tensor of the new file.

  Attributes:
    kind: Its type as KINDS spells it.
    is_matrix: Whether it is a matrix of the model.
    is_ternary: Whether the source has ternary codes for it.
  """

  kind: str
  is_matrix: bool = False
  is_ternary: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Copied(_Tensor):
  """A tensor of a GGUF file as it is."""

  source: GgufFile

  def data(self) -> np.ndarray:
    self.source.check_finite(self.name)
    with self.source.tensor_bytes(self.name) as raw:
      return raw.copy()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Encoded(_Tensor):
  """A tensor whose numbers are read and put into a type."""

  job: _Conversion
  place: Place

  def data(self) -> np.ndarray:
    return _encoded(self.job, self.place, self.kind)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Factors(_Tensor):
  """The rotary factors of a configuration."""

  factors: np.ndarray

  def data(self) -> np.ndarray:
    return self.factors


def _from_gguf(source: GgufFile, job: _Conversion) -> list[_Tensor]:
  """Every tensor of a GGUF file as it is, but for matrices whose type changes."""
  config = source.config
  arch = names.ARCHITECTURES[str(source.interpretation.architecture)]
  known = {place.file_name: place for place in places(arch.places(config), config.num_experts)}
  tensors: list[_Tensor] = []
  for name, info in source.tensors.items():
    place = known.get(name)
    kind = None if place is None else job.wanted(place)
    if kind is None or place is None or kind == _plain_name(info.type):
      tensors.append(
        _Copied(
          name=name, shape=info.shape, type_id=_type_id(info.type), nbytes=info.nbytes,
          kind=_plain_name(info.type), source=source,
          is_matrix=place is not None and params.is_matrix(place.name),
        )
      )  # fmt: skip
    else:
      tensors.append(_made(job, place, kind))
  return tensors


def _from_other(architecture: str, job: _Conversion) -> list[_Tensor]:
  tensors: list[_Tensor] = [
    _made(job, place, job.wanted(place) or _as_it_is(job, place))
    for place in _places(job.source, architecture)
  ]
  factors = np.array(names.rope_factors(_own(job.source, architecture)), np.float32)
  if factors.size:
    first = _Factors(
      name=names.FACTORS, shape=factors.shape, type_id=_IDS.F32, nbytes=factors.nbytes, kind="F32",
      factors=factors,
    )  # fmt: skip
    tensors.insert(0, first)
  return tensors


def _own(source: WeightSource, architecture: str) -> ModelConfig:
  """The configuration as a file of this architecture says it."""
  style = names.ARCHITECTURES[architecture].rope_style
  return dataclasses.replace(names.in_words(source.config), rope_style=style)


def _places(source: WeightSource, architecture: str) -> list[Place]:
  """The tensors of a file of this architecture."""
  own = _own(source, architecture)
  return list(places(names.ARCHITECTURES[architecture].places(own), own.num_experts))


def _as_it_is(job: _Conversion, place: Place) -> str:
  """The narrowest type that changes nothing."""
  source = job.source
  if not params.is_matrix(place.name):
    # llama.cpp adds and multiplies by these in float32.
    return "F32"
  if is_ternary(source, place):
    rows = ternary_rows(source, place, job.rope_style)
    for name in ("TQ2_0", "Q2_0"):
      with contextlib.suppress(ValueError):
        pack(*rows, place.shape(source.config)[-1], TYPES[name], place.title)
        return name
  info = source.info(place.name, place.layer)
  if info.type in DTYPES:
    return info.type
  return narrowest(numbers(source, place, job.rope_style))


def _made(job: _Conversion, place: Place, kind: str) -> _Encoded:
  """Raises: ValueError: the type does not take such rows."""
  shape = place.shape(job.source.config)
  rows, k = math.prod(shape[:-1]), shape[-1]
  if kind in TYPES:
    block = TYPES[kind].block
    type_id, nbytes = TYPES[kind].type_id, 0 if k % block else TYPES[kind].nbytes(rows, k)
  else:
    type_id = _IDS[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[type_id]
    nbytes = rows * k // block * block_bytes
  if k % block:
    fitting = [
      name for name in (*TYPES, "Q8_0", "F16")
      if k % (TYPES[name].block if name in TYPES else gguf.GGML_QUANT_SIZES[_IDS[name]][0]) == 0
    ]  # fmt: skip
    raise ValueError(
      f"{place.file_name}: rows of {k} elements are no whole {kind} blocks of {block}: choose"
      f" {' or '.join(fitting)}"
    )

  is_matrix = params.is_matrix(place.name)
  return _Encoded(
    name=place.file_name, shape=shape, type_id=type_id, nbytes=nbytes, kind=kind, job=job,
    place=place, is_matrix=is_matrix, is_ternary=is_matrix and is_ternary(job.source, place),
  )  # fmt: skip


def _encoded(job: _Conversion, place: Place, kind: str) -> np.ndarray:
  """The bytes of a tensor in a type."""
  source, loss = job.source, job.loss
  has_codes = is_ternary(source, place)
  if kind in TYPES and has_codes:
    try:
      rows = ternary_rows(source, place, job.rope_style)
      return pack(*rows, place.shape(source.config)[-1], TYPES[kind], place.title)
    except ValueError:
      if job.is_exact:
        raise
  values = numbers(source, place, job.rope_style)
  if kind in DTYPES:
    made = rounded(values, kind, place.file_name)
    if job.is_exact and has_codes and (made.astype(np.float32) != values).any():
      raise ValueError(f"{place.title}: {kind} does not hold its scales exactly: choose F32")
    loss.add(place.file_name, values, made)
    return made
  single = values.astype(np.float32, copy=False).reshape(-1, values.shape[-1])
  if kind in TYPES:
    codec = TYPES[kind]
    codes, scales = ternarize.nearest(single, codec.block)
    loss.add(place.file_name, single, codecs.dequantize(codes, scales, codec.block))
    return codec.pack(codes, scales)
  encoded = gguf.quants.quantize(single, _IDS[kind])
  loss.add(place.file_name, single, gguf.quants.dequantize(encoded, _IDS[kind]))
  return encoded


def _metadata(source: WeightSource, architecture: str, said: Mapping[str, str]) -> dict[str, Any]:
  """The keys of a model that comes from another format, without those in `said`."""
  keys: dict[str, Any] = {"general.name": Path(source.path).resolve().name, **source.card}
  keys = {key: value for key, value in keys.items() if key not in (*_DROPPED, *said)}
  keys |= {"general.architecture": architecture, "general.type": "model"}
  keys |= names.ARCHITECTURES[architecture].metadata(architecture, _own(source, architecture))
  keys[f"{architecture}.vocab_size"] = source.config.vocab_size
  if source.activations is not None:
    keys[names.ACTIVATIONS] = source.activations
  return keys | gguf_from_spec(source.tokenizer, source.config.vocab_size)


def _type_id(kind: str) -> int:
  return codecs.CODECS[kind].type_id if kind in codecs.CODECS else _IDS[kind]


def _plain_name(kind: str) -> str:
  """A type as KINDS spells it."""
  return {"Q2_0 (group 64)": "Q2_0", "Q2_0 (group 128)": "Q2_0_g128"}.get(kind, kind)


def _most(tensors: list[_Tensor]) -> str:
  """The type of most numbers."""
  sums: dict[str, int] = {}
  for tensor in tensors:
    if tensor.is_matrix:
      sums[tensor.kind] = sums.get(tensor.kind, 0) + math.prod(tensor.shape)
  return max(sums, key=lambda kind: sums[kind], default="F32")


def _verify(source: WeightSource, path: Path, architecture: str) -> None:
  """Check that the new file's own words make the same model."""
  with open_model(path) as made:
    made.check()
    wanted = _own(source, architecture)
    if as_float32(made.config) != as_float32(wanted):
      raise AssertionError(f"wrote {wanted}, read {made.config}")


def as_float32(config: ModelConfig) -> object:
  """A configuration with its numbers as GGUF keeps them, for comparison."""

  def single(value: object) -> object:
    if isinstance(value, float):
      return float(np.float32(value))
    if isinstance(value, dict):
      return {key: single(inner) for key, inner in value.items()}
    return [single(inner) for inner in value] if isinstance(value, list | tuple) else value

  return single(dataclasses.asdict(config))


@contextlib.contextmanager
def new_file(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
  """A path beside `path` that gets its name when all went well, and is removed otherwise.

  Args:
    overwrite: Take the place of a file that is there.
  Raises:
    FileExistsError: something is there. ValueError: a folder is there, and `overwrite`.
    FileNotFoundError: the folder to write in is not there.
  """
  if not overwrite:
    check_new(path)
  elif path.is_dir():
    raise ValueError(f"{path} is a folder: name the file to write in it")
  check_folder(path.parent)
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    yield temporary
    if overwrite:
      os.replace(temporary, path)
      return
    # A link, unlike a move, never takes the place of what somebody else has put there meanwhile; not
    # every file system has links.
    try:
      os.link(temporary, path)
    except FileExistsError:
      check_new(path)
    except OSError:
      check_new(path)
      os.rename(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def check_new(path: Path) -> None:
  """Raises: FileExistsError: something is there."""
  if path.exists() or path.is_symlink():
    raise FileExistsError(f"{path} exists: name another, or remove it first")


def check_folder(path: Path) -> None:
  """Raises: FileNotFoundError: there is no such folder to write in."""
  if not path.is_dir():
    raise FileNotFoundError(f"{path}: no such folder: make it first")
