"""GGUF, versions 2 and 3, little-endian: its tensors under canonical names.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the header is read by
`header`.
"""

import contextlib
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from neurojax.config import ModelConfig
from neurojax.files import names
from neurojax.files.gguf.blocks import BLOCKS
from neurojax.files.gguf.parts import Parts, whole_metadata
from neurojax.files.names.architecture import Activations
from neurojax.files.tensor_info import TensorInfo
from neurojax.forms import Form, Plain, Scales
from neurojax.tokenizer.tokenizer_spec import TokenizerSpec
from neurojax.weights import codecs
from neurojax.weights.rows import GroupedRows

# Elements decoded at a time: the decoders make several temporaries of this many float32.
_CHUNK_ELEMENTS = 1 << 20

_NUMBERS = {
  "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"),
  "BF16": np.dtype(ml_dtypes.bfloat16), "I8": np.dtype("<i1"), "I16": np.dtype("<i2"),
  "I32": np.dtype("<i4"), "I64": np.dtype("<i8"),
}  # fmt: skip
_PLAIN: Mapping[str, Plain] = {"F16": Plain("float16"), "BF16": Plain("bfloat16")}


class GgufFile:
  """An open GGUF file (a `ModelFile`), or the first of its parts. Headers are checked on
  opening; tensors are mapped and decoded one by one.

  Raises:
    ValueError: truncated, damaged or contradictory.
    NotImplementedError: a version or byte order that is not read.
  """

  format = "gguf"

  def __init__(self, path: str | Path) -> None:
    self.path = Path(path)
    with contextlib.ExitStack() as undo:
      self._parts = Parts(self.path)
      undo.callback(self._parts.close)
      self.version = self._parts.header.version
      self.metadata: Mapping[str, object] = whole_metadata(self._parts)
      self.tensors: Mapping[str, TensorInfo] = self._parts.tensors
      self._fields = self._parts.header.fields
      self.interpretation = names.interpret_gguf(self.metadata, self.tensors, self._floats)
      undo.pop_all()

  @property
  def file_bytes(self) -> int:
    return self._parts.size_bytes

  @property
  def config(self) -> ModelConfig:
    return self.interpretation.model_config(str(self.path))

  @functools.cached_property
  def _spec(self) -> TokenizerSpec | None:
    # "none" and "no_vocab" are what converters write for models fed with embeddings.
    if self.metadata.get("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
      return None
    from neurojax.tokenizer.read.gguf import spec_from_gguf

    return spec_from_gguf(self.metadata)

  @property
  def tokenizer(self) -> TokenizerSpec | None:
    try:
      return self._spec
    except NotImplementedError as error:
      raise NotImplementedError(f"{self.path}: tokenizer: {error}") from error
    except ValueError as error:
      raise ValueError(f"{self.path}: tokenizer: {error}") from error

  @property
  def activations(self) -> Activations | None:
    return self.interpretation.activations

  @property
  def card(self) -> Mapping[str, str]:
    return {
      key: value
      for key, value in self.metadata.items()
      if key.startswith("general.") and isinstance(value, str)
    }

  def info(self, name: str, layer: int | None = None) -> TensorInfo:
    return self.tensors[self._locate(name, layer).name]

  def read(self, name: str, layer: int | None = None) -> np.ndarray:
    stored = self._locate(name, layer)
    info = self.tensors[stored.name]
    if not _can_decode(info.type):
      raise NotImplementedError(f"{self.path}: {_undecodable(info)}")
    if info.type in codecs.CODECS:
      values = codecs.dequantize(*self._unpack(info)).reshape(info.shape)
    else:
      with self._parts.range(info) as raw:
        values = _decode(raw, info)
    return names.to_canonical(values, name, stored.axes, self.config, layer)

  def read_ternary(
    self, name: str, layer: int | None = None
  ) -> tuple[np.ndarray, np.ndarray, int | None]:
    info = self.info(name, layer)
    if info.type not in codecs.CODECS:
      raise ValueError(
        f"{self.path}: tensor {info.name!r} is {info.type}, which is not ternary: read it as numbers"
      )
    return self._unpack(info)

  def narrow_form(self, name: str, layer: int | None = None) -> Form | None:
    info = self.info(name, layer)
    if info.type in _PLAIN:
      return _PLAIN[info.type]
    if len(info.shape) < 2:
      return None
    if info.type in BLOCKS:
      return BLOCKS[info.type].form
    codec = codecs.CODECS.get(info.type)
    return None if codec is None else Scales(codec.group_size, codec.scale_dtype.itemsize)

  def read_grouped(self, name: str, layer: int | None = None) -> GroupedRows:
    info = self.info(name, layer)
    if info.type not in BLOCKS or len(info.shape) < 2:
      raise ValueError(
        f"{self.path}: tensor {info.name!r} is {info.type} {info.shape}, no matrix of grouped"
        " integers: read it as numbers"
      )
    with self._parts.range(info) as raw:
      rows = BLOCKS[info.type].rows(raw, math.prod(info.shape[:-1]), info.shape[-1])
    try:
      rows.check_finite()
    except ValueError as error:
      raise ValueError(
        f"{self.path}: tensor {info.name!r}: {error}: the file is damaged, get it again"
      ) from error
    return rows

  def read_plain(self, name: str, layer: int | None = None) -> np.ndarray:
    stored = self._locate(name, layer)
    info = self.tensors[stored.name]
    if info.type not in _NUMBERS:
      raise ValueError(
        f"{self.path}: tensor {info.name!r} is {info.type}, which are no plain numbers"
      )
    with self._parts.range(info) as raw:
      values = raw.view(_NUMBERS[info.type]).reshape(info.shape).copy()
    return names.to_canonical(values, name, stored.axes, self.config, layer)

  def field_bytes(self, key: str) -> bytes:
    """A key of the metadata with its type and value, as the file has them. Raises: KeyError."""
    start, end = self._fields[key]
    return self._parts.first(start, end - start).tobytes()

  def tensor_bytes(self, file_name: str) -> contextlib.AbstractContextManager[np.ndarray]:
    """The undecoded bytes of a tensor under the file's name: uint8, a read-only view of the file, whose
    pages leave the process with the context. Raises: KeyError."""
    info = self.tensors[file_name]
    return self._parts.range(info)

  def check_finite(self, file_name: str) -> None:
    """Raises ValueError if a tensor, by the file's name, holds NaN or infinity; it names the place."""
    info = self.tensors[file_name]
    if info.type in codecs.CODECS:
      self._unpack(info)
      return
    with self._parts.range(info) as raw:
      width = info.shape[-1] if info.shape else 1
      rows = raw.reshape(math.prod(info.shape[:-1]), -1)
      step = max(1, _CHUNK_ELEMENTS // width)
      for first in range(0, len(rows), step):
        bad = ~np.isfinite(_decode_rows(rows[first : first + step], info.type, width))
        if bad.any():
          row, element = (int(i) for i in np.argwhere(bad)[0])
          raise ValueError(
            f"{self.path}: tensor {file_name!r}: row {first + row}, element {element} is NaN or"
            " infinite: the file is damaged, get it again"
          )

  def stored_bytes(self, name: str, layer: int | None = None) -> np.ndarray:
    info = self.info(name, layer)
    return self._parts.view(info)

  def problems(self) -> list[str]:
    found = [*self.interpretation.demands, *self.interpretation.faults]
    undecodable = [info for info in self.tensors.values() if not _can_decode(info.type)]
    for kind in sorted({info.type for info in undecodable}):
      infos = [info for info in undecodable if info.type == kind]
      more = f" (and {len(infos) - 1} more tensors)" if len(infos) > 1 else ""
      found.append(_undecodable(infos[0]) + more)
    try:
      spec = self.tokenizer
    except (ValueError, NotImplementedError) as error:
      found.append(str(error).removeprefix(f"{self.path}: "))
    else:
      config = self.interpretation.config
      if spec is not None and config is not None and len(spec.tokens) > config.vocab_size:
        found.append(
          f"the tokenizer has {len(spec.tokens)} tokens, the embedding {config.vocab_size} rows"
        )
    return found

  def check(self) -> None:
    # Each raises with the kind of its own reasons.
    self.config  # noqa: B018
    self.tokenizer  # noqa: B018
    if found := self.problems():
      raise NotImplementedError(f"{self.path}: not supported: {'; '.join(found)}")

  def check_unchanged(self) -> None:
    self._parts.check_unchanged()

  def sha256(self) -> str:
    return self._parts.sha256()

  def close(self) -> None:
    """Views that `stored_bytes` gave out stay valid; the map goes with the last of them."""
    self._parts.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self.close()

  def _floats(self, file_name: str) -> np.ndarray:
    """A tensor of few numbers, by the name in the file."""
    info = self.tensors[file_name]
    if info.type not in _NUMBERS:
      raise NotImplementedError(f"tensor {file_name!r} is {info.type}: F32 is read")
    with self._parts.range(info) as raw:
      return raw.view(_NUMBERS[info.type]).astype(np.float32).reshape(info.shape)

  def _locate(self, name: str, layer: int | None) -> names.Stored:
    config = self.config
    try:
      return names.locate(self.interpretation.tensors, name, layer, config)
    except ValueError as error:
      raise ValueError(f"{self.path}: {error}") from error

  def _unpack(self, info: TensorInfo) -> tuple[np.ndarray, np.ndarray, int | None]:
    codec = codecs.CODECS[info.type]
    with self._parts.range(info) as raw:
      try:
        codes, scales = codec.unpack(raw, math.prod(info.shape[:-1]), info.shape[-1])
      except ValueError as error:
        raise ValueError(
          f"{self.path}: tensor {info.name!r}: {error}: the file is damaged, or its weights are not"
          " ternary"
        ) from error
    return codes, scales, codec.group_size


@functools.cache
def _can_decode(kind: str) -> bool:
  if kind in codecs.CODECS or kind in BLOCKS or kind in _NUMBERS:
    return True
  # What a later version of the package knows.
  if kind not in GGMLQuantizationType.__members__:
    return False
  qtype = GGMLQuantizationType[kind]
  try:
    dequantize(np.zeros((1, GGML_QUANT_SIZES[qtype][1]), np.uint8), qtype)
  except NotImplementedError:
    return False
  return True


def _undecodable(info: TensorInfo) -> str:
  return f"tensor {info.name!r} has the type {info.type}, for which there is no decoder"


def _decode(raw: np.ndarray, info: TensorInfo) -> np.ndarray:
  """Float32 values, a few rows at a time: the decoders' temporaries stay small."""
  width = info.shape[-1] if info.shape else 1
  rows = raw.reshape(math.prod(info.shape[:-1]), -1)
  values = np.empty((len(rows), width), np.float32)
  step = max(1, _CHUNK_ELEMENTS // width)
  for first in range(0, len(rows), step):
    values[first : first + step] = _decode_rows(rows[first : first + step], info.type, width)
  return values.reshape(info.shape)


def _decode_rows(rows: np.ndarray, kind: str, width: int) -> np.ndarray:
  """The numbers of a few rows of `width` elements of a type."""
  # A damaged scale may be infinite: the values say so, a warning helps nobody.
  with np.errstate(all="ignore"):
    if kind in _NUMBERS:
      return rows.view(_NUMBERS[kind]).astype(np.float32)
    if kind in BLOCKS:
      return BLOCKS[kind].rows(rows.reshape(-1), len(rows), width).values()
    return dequantize(rows, GGMLQuantizationType[kind])
