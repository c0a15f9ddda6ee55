"""Presents each weight of a folder as one, however many tensors keep it."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from neurojax.files.folder import compressed
from neurojax.files.folder.compressed import Quantization
from neurojax.files.folder.safetensors import DTYPES
from neurojax.files.folder.shards import Shards
from neurojax.files.tensor_info import TensorInfo
from neurojax.forms import Form, Grouped, Plain, Scales
from neurojax.weights.codecs import check_codes
from neurojax.weights.codecs import dequantize as ternary_values
from neurojax.weights.rows import GroupedRows

NUMBERS = ("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2")
"""Element types that are numbers as they are."""

_PLAIN: Mapping[str, Plain] = {"F16": Plain("float16"), "BF16": Plain("bfloat16")}
# Elements turned into numbers at a time: temporaries stay small beside the result.
_CHUNK_ELEMENTS = 1 << 20
# Tensors beside a module's weight: its scales, and scales of its activations, which are not rounded.
_SCALES = ("weight_scale_inv", "weight_scale")
_UNUSED = ("input_scale", "activation_scale", "input_scale_ub")


@dataclasses.dataclass(frozen=True)
class Weight:
  """One weight as the folder keeps it.

  Attributes:
    info: The entry of this weight in `FolderFile.tensors`.
    kind: "plain", "scaled" (numbers with scales beside them, as FP8), "awq", "bitnet", or "online":
      numbers that are ternary when used.
    parts: The file's tensors that it consists of, by what each is.
  """

  info: TensorInfo
  kind: str
  parts: Mapping[str, str]


class Weights:
  """The weights of an open folder.

  Attributes:
    all: The weights by transformers' names.
  Raises: ValueError: tensors that do not go together.
  """

  def __init__(self, folder: Path, shards: Shards, quantization: Quantization | None) -> None:
    self.path, self._shards, self.quantization = folder, shards, quantization
    self.all: Mapping[str, Weight] = dict(self._group())

  def narrow_form(self, weight: Weight) -> Form | None:
    """The form that keeps a weight's numbers in the width of the file, see `WeightSource.narrow_form`."""
    if weight.kind == "awq":
      return self._awq_form(weight)
    if weight.kind == "scaled":
      return self._float8_form(weight)
    if weight.kind in ("bitnet", "online"):
      return Scales(None, 4)
    return _PLAIN.get(weight.info.type)

  def grouped(self, weight: Weight) -> GroupedRows:
    """Numbers and scales of a weight whose form is `Grouped`."""
    form = self.narrow_form(weight)
    assert isinstance(form, Grouped)
    return self._awq_rows(weight) if weight.kind == "awq" else self._float8(weight, form)

  def _group(self) -> Iterator[tuple[str, Weight]]:
    """The weights that the tensors make up."""
    method = None if self.quantization is None else self.quantization.method
    for name, info in self._shards.tensors.items():
      module, _, part = name.rpartition(".")
      if part in (*_SCALES, *_UNUSED) and f"{module}.weight" in self._shards.tensors:
        continue
      if (
        method == "awq"
        and part in ("qzeros", "scales")
        and f"{module}.qweight" in self._shards.tensors
      ):
        continue
      if method == "awq" and part == "qweight":
        yield f"{module}.weight", self._awq(module, info)
      elif part == "weight":
        yield name, self._weight(module, info, method)
      else:
        yield name, Weight(info, "plain", {"weight": name})

  def _weight(self, module: str, info: TensorInfo, method: str | None) -> Weight:
    scales = next(
      (f"{module}.{one}" for one in _SCALES if f"{module}.{one}" in self._shards.tensors), None
    )
    parts = {"weight": info.name} | ({} if scales is None else {"scales": scales})
    more = 0 if scales is None else self._shards.tensors[scales].nbytes
    if method == "bitnet" and info.type == "U8" and scales is not None and len(info.shape) == 2:
      shape = (4 * info.shape[0], info.shape[1])
      kept = dataclasses.replace(info, type="BitNet", shape=shape, nbytes=info.nbytes + more)
      return Weight(kept, "bitnet", parts)
    assert self.quantization is not None or method is None
    if method == "bitnet" and self.quantization is not None and self.quantization.is_online:
      is_linear = len(info.shape) == 2 and "embed_tokens" not in module
      if is_linear and self.quantization.is_converted(module):
        return Weight(info, "online", parts)
    if scales is not None:
      return Weight(dataclasses.replace(info, nbytes=info.nbytes + more), "scaled", parts)
    return Weight(info, "plain", parts)

  def _awq(self, module: str, info: TensorInfo) -> Weight:
    """Raises: ValueError: shapes or types that do not go together."""
    parts = {part: f"{module}.{part}" for part in ("qweight", "qzeros", "scales")}
    if missing := [name for name in parts.values() if name not in self._shards.tensors]:
      raise ValueError(f"{self.path}: the tensor {missing[0]!r} is missing: the file is incomplete")
    infos = {part: self._shards.tensors[name] for part, name in parts.items()}
    assert self.quantization is not None
    if len(info.shape) != 2 or 0 in info.shape:
      raise ValueError(
        f"{self.path}: tensor {info.name!r} has the shape {info.shape}: two axes, none of them empty"
      )
    k, n = info.shape[0], 8 * info.shape[1]
    group = self.quantization.group_size or k
    wanted = {"qweight": (k, n // 8), "qzeros": (k // group, n // 8), "scales": (k // group, n)}
    types = {"qweight": ("I32",), "qzeros": ("I32",), "scales": ("F16", "BF16", "F32")}
    for part, one in infos.items():
      if k % group or one.shape != wanted[part] or one.type not in types[part]:
        raise ValueError(
          f"{self.path}: tensor {one.name!r} is {one.type} {one.shape}: AWQ of groups of {group} and"
          f" qweight {info.shape} has {' or '.join(types[part])} {wanted[part]}"
        )
    nbytes = sum(one.nbytes for one in infos.values())
    kind = f"AWQ int4 (group {group})"
    kept = TensorInfo(f"{module}.weight", kind, (n, k), info.offset, nbytes)
    return Weight(kept, "awq", parts)

  def values(self, name: str) -> np.ndarray:
    """Float32 of a weight, in the order of the file."""
    weight = self.all[name]
    if weight.kind == "awq":
      rows = self._awq_rows(weight)
      return _by_rows(rows.codes.shape, lambda part: _rows(rows, part).values())
    if weight.kind in ("bitnet", "online"):
      codes, scales = self.ternary(weight)
      k = weight.info.shape[1]
      return _by_rows(
        weight.info.shape, lambda part: ternary_values(codes[part], scales, None)[:, :k]
      )
    with self._shards.array(weight.parts["weight"]) as array:
      flat = array.reshape(-1)
      values = np.empty(flat.shape, np.float32)
      for first in range(0, flat.size, _CHUNK_ELEMENTS):
        chunk = slice(first, first + _CHUNK_ELEMENTS)
        values[chunk] = _as_float32(flat[chunk])
      values = values.reshape(array.shape)
    if weight.kind == "scaled":
      self._scale(weight, values)
    return values

  def _factors(self, weight: Weight) -> tuple[np.ndarray, int]:
    """The factors of a weight's rows and the elements that share one, see `compressed.row_scales`."""
    quantization, shape = self.quantization, weight.info.shape
    with self._shards.array(weight.parts["scales"]) as array:
      scales = array.copy()
    block = None if quantization is None else quantization.block
    try:
      if len(shape) != 2:
        raise ValueError(f"a weight of the shape {shape} has no scales")
      factors, size = compressed.row_scales(scales, shape, block)
    except ValueError as error:
      raise ValueError(f"{self.path}: tensor {weight.parts['scales']!r}: {error}") from error
    is_inverse = quantization is not None and quantization.is_inverse
    return (np.float32(1) / factors if is_inverse else factors), size

  def _scale(self, weight: Weight, values: np.ndarray) -> None:
    """Multiply a weight by the scales that stand beside it."""
    factors, size = self._factors(weight)
    k = values.shape[1]
    if size >= k:
      values *= factors
      return
    step = max(1, _CHUNK_ELEMENTS // k)
    for first in range(0, len(values), step):
      part = slice(first, first + step)
      values[part] *= np.repeat(factors[part], size, axis=1)[:, :k]

  def _float8_form(self, weight: Weight) -> Grouped | None:
    """The form of an FP8 matrix whose rows consist of whole blocks; None for others."""
    kind = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2"}.get(weight.info.type)
    if kind is None or weight.kind != "scaled" or len(weight.info.shape) != 2:
      return None
    n, k = weight.info.shape
    scales = self._shards.tensors[weight.parts["scales"]].shape
    block = None if self.quantization is None else self.quantization.block
    is_blocked = block is not None and math.prod(scales) > 1 and scales not in ((n,), (n, 1))
    size = block[1] if block is not None and is_blocked else k
    if k % size:
      return None
    return Grouped(bits=8, offset=0, group_size=size, scale="float32", float8=kind)  # type: ignore[arg-type]

  def _float8(self, weight: Weight, form: Grouped) -> GroupedRows:
    n, k = weight.info.shape
    factors, _ = self._factors(weight)
    scales = np.ascontiguousarray(np.broadcast_to(factors, (n, k // form.group_size)))
    with self._shards.array(weight.parts["weight"]) as array:
      rows = GroupedRows(form, array.view(np.uint8).copy(), scales)
    try:
      rows.check_finite()
    except ValueError as error:
      raise ValueError(
        f"{self.path}: tensor {weight.info.name!r}: {error}: the file is damaged"
      ) from error
    return rows

  def ternary(self, weight: Weight) -> tuple[np.ndarray, np.ndarray]:
    """Codes, and the one scale [1, 1]."""
    assert self.quantization is not None
    if weight.kind == "online":
      # Imports JAX, which a reader of headers does without.
      from neurojax.weights.quantize import absmean

      with self._shards.array(weight.parts["weight"]) as array:
        values = _as_float32(array)
      mean = np.abs(values).mean(dtype=np.float64)
      if 0 < mean < 1e-5:
        raise NotImplementedError(
          f"{self.path}: tensor {weight.info.name!r}: |w| is {mean} on average, and transformers"
          " takes 1e-5 then"
        )
      packed = absmean(values, -1, scale_dtype="float32")
      return np.asarray(packed.codes), np.asarray(packed.scales)
    with self._shards.array(weight.parts["scales"]) as array:
      scale = array.astype(np.float32)
    if scale.size != 1 or not np.isfinite(scale).all() or (scale <= 0).any():
      raise ValueError(
        f"{self.path}: tensor {weight.parts['scales']!r} is {scale.tolist()!r:.80}: one positive"
        " number was expected"
      )
    with self._shards.array(weight.parts["weight"]) as array:
      codes = compressed.bitnet_codes(array)
    try:
      check_codes(codes)
    except ValueError as error:
      raise ValueError(
        f"{self.path}: tensor {weight.info.name!r}: {error}: the file is damaged"
      ) from error
    scale = scale.reshape(1, 1)
    return codes, np.float32(1) / scale if self.quantization.is_inverse else scale

  def _awq_form(self, weight: Weight) -> Grouped:
    scales = self._shards.tensors[weight.parts["scales"]]
    return Grouped(
      bits=4,
      offset=0,
      group_size=weight.info.shape[1] // scales.shape[0],
      scale="float16" if scales.type == "F16" else "float32",
      minima="zero",
    )

  def _awq_rows(self, weight: Weight) -> GroupedRows:
    form = self._awq_form(weight)
    with self._shards.array(weight.parts["qweight"]) as words:
      codes = np.ascontiguousarray(compressed.awq_integers(words).T)
    with self._shards.array(weight.parts["qzeros"]) as words:
      zeros = np.ascontiguousarray(compressed.awq_integers(words).T)
    with self._shards.array(weight.parts["scales"]) as array:
      scales = np.ascontiguousarray(array.T).astype(form.scale)
    rows = GroupedRows(form, codes, scales, minima=zeros)
    try:
      rows.check_finite()
    except ValueError as error:
      raise ValueError(
        f"{self.path}: tensor {weight.parts['scales']!r}: {error}: the file is damaged"
      ) from error
    return rows


def _as_float32(array: np.ndarray) -> np.ndarray:
  if array.dtype == DTYPES["BF16"]:
    # The upper half of a float32, which is faster than the cast.
    return (array.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
  if array.dtype.itemsize == 1:
    every = np.arange(256, dtype=np.uint8).view(array.dtype).astype(np.float32)
    return every[array.view(np.uint8)]
  # What is beyond float32 becomes infinite, which the loader refuses.
  with np.errstate(over="ignore"):
    return array.astype(np.float32)


def _by_rows(shape: tuple[int, ...], values: Callable[[slice], np.ndarray]) -> np.ndarray:
  """A matrix whose rows are made a few at a time."""
  n, k = shape
  whole = np.empty(shape, np.float32)
  step = max(1, _CHUNK_ELEMENTS // k)
  for first in range(0, n, step):
    part = slice(first, min(first + step, n))
    whole[part] = values(part)
  return whole


def _rows(rows: GroupedRows, part: slice) -> GroupedRows:
  return dataclasses.replace(
    rows,
    codes=rows.codes[part],
    scales=rows.scales[part],
    minima=None if rows.minima is None else rows.minima[part],
  )
