"""Any model file to GGUF: exactly, or in a type that is asked for by name."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from neurojax.config import ModelConfig, RopeStyle
from neurojax.files import names
from neurojax.files.gguf.file import GgufFile
from neurojax.files.gguf.writer import FILE_TYPES, Tensor, field, write
from neurojax.files.model_file import ModelFile
from neurojax.files.open import open_model
from neurojax.files.tensor_info import TensorInfo
from neurojax.files.write import ternarize
from neurojax.files.write.packing import TYPES, check, pack
from neurojax.files.write.tensors import (
  DTYPES,
  Loss,
  Place,
  is_ternary,
  narrowest,
  numbers,
  places,
  ternary_rows,
)
from neurojax.model import params
from neurojax.tokenizer.write.gguf import gguf_from_spec
from neurojax.weights import codecs
from neurojax.weights.ternary import TernaryArray

_IDS = gguf.GGMLQuantizationType
_ROUNDED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
KINDS = (*TYPES, *DTYPES, *_ROUNDED)
"""Types that are written. Ternary ones hold ternary weights exactly, or the nearest ternary ones."""

_DROPPED = ("general.alignment", "general.file_type", "general.quantization_version")
"""Keys of a GGUF file that are written anew."""


@dataclasses.dataclass(frozen=True)
class Converted:
  """What a conversion made: the architecture or model_type, tensors by type, what it changed, and what
  other readers make of it."""

  architecture: str
  types: dict[str, int]
  loss: Loss
  note: str = ""


def to_gguf(
  file: ModelFile,
  path: Path,
  *,
  kind: str | None = None,
  outer: str | None = None,
  general: dict[str, str] | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> Converted:
  """Write a model file as GGUF; it appears whole or not at all, and has been opened once by our reader.

  Args:
    kind: One of KINDS, for the matrices of layers; None: every one as it is, quantized ones of a folder
      in the narrowest type that changes nothing.
    outer: The same for embedding and head.
    general: Keys such as "general.name" to set.
  Raises:
    FileExistsError: something is there.
    ValueError: a type that does not take rows of this length, or no architecture holds this model; and
      what reading raises.
    NotImplementedError: the tokenizer has no place in GGUF; and what reading raises.
  """
  for option, value in (("type", kind), ("type of embedding and head", outer)):
    if value is not None and value not in KINDS:
      raise ValueError(f"{option} {value!r}: choose one of {', '.join(KINDS)}")
  file.check()
  loss, said = Loss(), dict(general or {})
  if isinstance(file, GgufFile):
    plans = _from_gguf(file, kind, outer, loss)
    architecture = str(file.interpretation.architecture)
    kept = [key for key in file.metadata if key not in (*_DROPPED, *said)]
    fields = [file.field_bytes(key) for key in kept]
  else:
    architecture = names.architecture_of(file.config)
    plans = _from_other(file, architecture, kind, outer, loss)
    fields = [field(key, value) for key, value in _metadata(file, architecture, said).items()]
  fields += [field(key, value) for key, value in said.items()]
  fields.append(field("general.quantization_version", gguf.GGML_QUANT_VERSION))
  if (file_type := FILE_TYPES.get(_most(plans))) is not None:
    fields.append(field("general.file_type", file_type))
  elif kind is None and isinstance(file, GgufFile) and "general.file_type" in file.metadata:
    fields.append(file.field_bytes("general.file_type"))
  with new_file(path) as temporary:
    write(temporary, fields, list(_counted(plans, progress)))
    _verify(file, temporary, architecture)
  types: dict[str, int] = {}
  for plan in plans:
    types[plan.kind] = types.get(plan.kind, 0) + 1
  return Converted(architecture, types, loss, _note(architecture, file.config))


def _note(architecture: str, config: ModelConfig) -> str:
  """Where llama.cpp, as of 2026, computes something else than the file says."""
  windows = {kind.sliding_window for kind in config.kinds} - {None}
  if architecture == "llama" and windows:
    return (
      f"llama.cpp gives 'llama' no sliding window: its logits are those of this model for the first"
      f" {min(windows)} positions only"
    )
  return ""


@dataclasses.dataclass(frozen=True)
class _Plan:
  """A tensor with the name of its type."""

  kind: str
  tensor: Tensor
  is_matrix: bool


def _from_gguf(file: GgufFile, kind: str | None, outer: str | None, loss: Loss) -> list[_Plan]:
  """Every tensor of a GGUF file as it is, but for matrices whose type changes."""
  config = file.config
  arch = names.ARCHITECTURES[str(file.interpretation.architecture)]
  known = {place.file_name: place for place in places(arch.places(config), config.num_experts)}
  plans = []
  for name, info in file.tensors.items():
    place = known.get(name)
    wanted = None if place is None else _wanted(place, kind, outer)
    if wanted is None or place is None or wanted == _plain_name(info.type):
      plans.append(_copied(file, info, place is not None and params.is_matrix(place.name)))
    else:
      plans.append(_made(file, place, wanted, config.rope_style, loss))
  return plans


def _from_other(
  file: ModelFile, architecture: str, kind: str | None, outer: str | None, loss: Loss
) -> list[_Plan]:
  arch = names.ARCHITECTURES[architecture]
  own = dataclasses.replace(names.in_words(file.config), rope_style=arch.rope_style)
  plans = []
  for place in places(arch.places(own), own.num_experts):
    wanted = _wanted(place, kind, outer) or _as_it_is(file, place, arch.rope_style)
    plans.append(_made(file, place, wanted, arch.rope_style, loss))
  factors = np.array(names.rope_factors(own), np.float32)
  if factors.size:
    tensor = Tensor(names.FACTORS, factors.shape, _IDS.F32, factors.nbytes, lambda: factors)
    plans.insert(0, _Plan("F32", tensor, False))
  return plans


def _wanted(place: Place, kind: str | None, outer: str | None) -> str | None:
  """The type that was asked for, if this is a matrix."""
  if not params.is_matrix(place.name):
    return None
  return kind if place.layer is not None else outer


def _as_it_is(file: ModelFile, place: Place, rope_style: RopeStyle) -> str:
  """The narrowest type that changes nothing."""
  if not params.is_matrix(place.name):
    # llama.cpp adds and multiplies by these in float32.
    return "F32"
  if is_ternary(file, place):
    codes, scales, group_size = ternary_rows(file, place, rope_style)
    for name in ("TQ2_0", "Q2_0"):
      with contextlib.suppress(ValueError):
        pack(_array(codes, scales, group_size, place.shape(file.config)), TYPES[name], place.name)
        return name
  info = file.info(place.name, place.layer)
  if info.type in DTYPES:
    return info.type
  return narrowest(numbers(file, place, rope_style))


def _copied(file: GgufFile, info: TensorInfo, is_matrix: bool) -> _Plan:
  def data() -> np.ndarray:
    with file.tensor_bytes(info.name) as raw:
      return raw.copy()

  tensor = Tensor(info.name, info.shape, _type_id(info.type), info.nbytes, data)
  return _Plan(_plain_name(info.type), tensor, is_matrix)


def _made(file: ModelFile, place: Place, kind: str, rope_style: RopeStyle, loss: Loss) -> _Plan:
  """Raises: ValueError: the type does not take such rows."""
  shape = place.shape(file.config)
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

  def data() -> np.ndarray:
    return _encoded(file, place, kind, rope_style, loss)

  return _Plan(
    kind, Tensor(place.file_name, shape, type_id, nbytes, data), params.is_matrix(place.name)
  )


def _encoded(
  file: ModelFile, place: Place, kind: str, rope_style: RopeStyle, loss: Loss
) -> np.ndarray:
  """The bytes of a tensor in a type."""
  if kind in TYPES and is_ternary(file, place):
    with contextlib.suppress(ValueError):
      array = _array(*ternary_rows(file, place, rope_style), place.shape(file.config))
      check(array, TYPES[kind], place.file_name)
      return pack(array, TYPES[kind], place.file_name)
  values = numbers(file, place, rope_style)
  if kind in DTYPES:
    with np.errstate(over="ignore"):
      rounded = values.astype(DTYPES[kind])
    if not np.isfinite(rounded.astype(np.float32)).all():
      raise ValueError(f"{place.file_name}: a number is beyond {kind}: choose BF16 or F32")
    loss.add(place.file_name, values.astype(np.float32), rounded.astype(np.float32))
    return rounded
  exact = values.astype(np.float32, copy=False).reshape(-1, values.shape[-1])
  if kind in TYPES:
    codec = TYPES[kind]
    codes, scales = ternarize.nearest(exact, codec.block)
    loss.add(place.file_name, exact, codecs.dequantize(codes, scales, codec.block))
    return codec.pack(codes, scales)
  encoded = gguf.quants.quantize(exact, _IDS[kind])
  loss.add(place.file_name, exact, gguf.quants.dequantize(encoded, _IDS[kind]))
  return encoded


def _array(
  codes: np.ndarray, scales: np.ndarray, group_size: int | None, shape: tuple[int, ...]
) -> TernaryArray:
  return TernaryArray.from_rows(
    codes, scales, (math.prod(shape[:-1]), shape[-1]), -1, group_size=group_size
  )


def _metadata(file: ModelFile, architecture: str, said: dict[str, str]) -> dict[str, Any]:
  """The keys of a model that comes from another format."""
  config = file.config
  own = dataclasses.replace(
    names.in_words(config), rope_style=names.ARCHITECTURES[architecture].rope_style
  )
  name = file.metadata.get("_name_or_path") or Path(file.path).resolve().name
  keys: dict[str, Any] = {"general.architecture": architecture, "general.type": "model"}
  if "general.name" not in said:
    keys["general.name"] = str(name)
  keys |= names.ARCHITECTURES[architecture].metadata(architecture, own)
  keys[f"{architecture}.vocab_size"] = config.vocab_size
  return keys | gguf_from_spec(file.tokenizer, config.vocab_size)


def _type_id(kind: str) -> int:
  return codecs.CODECS[kind].type_id if kind in codecs.CODECS else _IDS[kind]


def _plain_name(kind: str) -> str:
  """A type as KINDS spells it."""
  return {"Q2_0 (group 64)": "Q2_0", "Q2_0 (group 128)": "Q2_0_g128"}.get(kind, kind)


def _most(plans: list[_Plan]) -> str:
  """The type of most numbers."""
  sums: dict[str, int] = {}
  for plan in plans:
    if plan.is_matrix:
      sums[plan.kind] = sums.get(plan.kind, 0) + math.prod(plan.tensor.shape)
  return max(sums, key=lambda kind: sums[kind], default="F32")


def _counted(plans: list[_Plan], progress: Callable[[int, int], None] | None) -> Iterator[Tensor]:
  for done, plan in enumerate(plans):

    def data(plan: _Plan = plan, done: int = done) -> np.ndarray:
      made = plan.tensor.data()
      if progress:
        progress(done + 1, len(plans))
      return made

    yield dataclasses.replace(plan.tensor, data=data)


def _verify(file: ModelFile, path: Path, architecture: str) -> None:
  """What was written is what will be read: the file's own words make the same model."""
  with open_model(path) as made:
    made.check()
    wanted = names.in_words(file.config)
    wanted = dataclasses.replace(wanted, rope_style=names.ARCHITECTURES[architecture].rope_style)
    if as_float32(made.config) != as_float32(wanted):
      raise AssertionError(f"wrote {wanted}, read {made.config}")


def as_float32(config: ModelConfig) -> object:
  """A configuration with its numbers as GGUF keeps them, for comparison."""

  def rounded(value: object) -> object:
    if isinstance(value, float):
      return float(np.float32(value))
    if isinstance(value, dict):
      return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list | tuple) else value

  return rounded(dataclasses.asdict(config))


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
  """A path beside `path` that gets its name when all went well, and is removed otherwise.

  Raises: FileExistsError: something is there. FileNotFoundError: its folder is not.
  """
  check_new(path)
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    yield temporary
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
  if path.exists() or path.is_symlink():
    raise FileExistsError(f"{path} exists: name another, or remove it first")
  if not path.parent.is_dir():
    raise FileNotFoundError(f"{path.parent}: no such folder: make it first")
