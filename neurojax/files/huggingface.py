"""A folder in the layout of Hugging Face's transformers: config.json, and safetensors in one file or
in several that an index lists. Nothing in it is believed before it is checked."""

import contextlib
import dataclasses
import functools
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from neurojax.config import ModelConfig
from neurojax.files import compressed, digest, names
from neurojax.files.compressed import Quantization
from neurojax.files.names.architecture import Demand, Fault
from neurojax.files.safetensors import DTYPES, SafetensorsFile, read_json
from neurojax.files.source import TensorInfo
from neurojax.quant.rows import GroupedRows
from neurojax.scaling.count import Form, Grouped, Plain, Scales
from neurojax.ternary.codecs import check_codes
from neurojax.ternary.codecs import dequantize as ternary_values
from neurojax.tokenizer.spec import TokenizerSpec

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_MAX_SHARDS = 1000
# Elements turned into numbers at a time: temporaries stay small beside the result.
_CHUNK_ELEMENTS = 1 << 20
_NUMBERS = ("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2")
_PLAIN: Mapping[str, Plain] = {"F16": Plain("float16"), "BF16": Plain("bfloat16")}
# What stands beside a module's weight: scales of it, and of its activations, which are not rounded.
_SCALES = ("weight_scale_inv", "weight_scale")
_UNUSED = ("input_scale", "activation_scale", "input_scale_ub")


@dataclasses.dataclass(frozen=True)
class _Weight:
  """One weight as it is kept.

  Attributes:
    info: As `tensors` lists it.
    kind: "plain", "fp8", "awq", "bitnet", or "online": numbers that are ternary when used.
    parts: The file's tensors that it consists of, by what each is.
  """

  info: TensorInfo
  kind: str
  parts: Mapping[str, str]


class HuggingFaceFile:
  """An open folder (a `source.ModelFile`). Headers are checked on opening; tensors are mapped and
  decoded one by one.

  `tensors` lists weights under transformers' names, a weight that is kept in several tensors as the
  one that it is of.

  Raises:
    ValueError: a file is missing, truncated, damaged or contradicts another.
    NotImplementedError: the weights are in another format.
  """

  format = "huggingface"

  def __init__(self, path: str | Path) -> None:
    self.path = Path(path)
    with contextlib.ExitStack() as undo:
      self._stamps = {CONFIG: (self.path / CONFIG).stat()}
      self.metadata: Mapping[str, Any] = read_json(self.path / CONFIG)
      self._shards: dict[str, SafetensorsFile] = {}
      undo.callback(self.close)
      self._open_shards()
      self._shard_of = {
        name: shard for shard in self._shards.values() for name in shard.tensors
      }  # fmt: skip
      version = self.metadata.get("transformers_version")
      self.version = version if isinstance(version, str) else "unknown"
      self._refused: tuple[str, ...] = ()
      self._quantization = self._read_quantization()
      self._weights = dict(self._group())
      self.tensors: Mapping[str, TensorInfo] = {
        name: weight.info for name, weight in self._weights.items()
      }
      self.interpretation = self._interpret()
      undo.pop_all()

  @property
  def file_bytes(self) -> int:
    return sum(shard.size_bytes for shard in self._shards.values())

  @property
  def config(self) -> ModelConfig:
    return self.interpretation.model_config(str(self.path))

  @functools.cached_property
  def tokenizer(self) -> TokenizerSpec | None:
    from neurojax.tokenizer.huggingface import spec_from_folder

    return spec_from_folder(self.path)

  def info(self, name: str, layer: int | None = None) -> TensorInfo:
    stored = self._locate(name, layer)
    if not stored.is_split:
      return self.tensors[stored.name]
    infos = [self.tensors[one] for one in self._experts(stored)]
    shape, nbytes = (len(infos), *infos[0].shape), sum(info.nbytes for info in infos)
    kinds = sorted({info.type for info in infos})
    return dataclasses.replace(infos[0], type=" and ".join(kinds), shape=shape, nbytes=nbytes)

  def read(self, name: str, layer: int | None = None) -> np.ndarray:
    stored = self._locate(name, layer)
    if stored.is_split:
      values = np.stack([self._values(one) for one in self._experts(stored)])
    else:
      values = self._values(stored.name)
    if stored.shift:
      values += np.float32(stored.shift)
    return names.to_canonical(values, name, stored.axes, self.config, layer)

  def read_ternary(
    self, name: str, layer: int | None = None
  ) -> tuple[np.ndarray, np.ndarray, int | None]:
    weights = self._parts(name, layer)
    if any(weight.kind not in ("bitnet", "online") for weight in weights):
      kind = self.info(name, layer).type
      raise ValueError(f"{self.path}: {name} is {kind}, which is not ternary: read it as numbers")
    codes, scales = zip(*(self._ternary(weight) for weight in weights), strict=True)
    if len(weights) == 1:
      return codes[0], scales[0], None
    return np.concatenate(codes), np.concatenate(scales), None

  def narrow_form(self, name: str, layer: int | None = None) -> Form | None:
    if self._locate(name, layer).shift:
      return None
    forms = {self._form(weight) for weight in self._parts(name, layer)}
    return forms.pop() if len(forms) == 1 else None

  def read_grouped(self, name: str, layer: int | None = None) -> GroupedRows:
    form = self.narrow_form(name, layer)
    if not isinstance(form, Grouped):
      raise ValueError(
        f"{self.path}: {name} is {self.info(name, layer).type}, no matrix of grouped numbers: read it"
        " as numbers"
      )
    rows = [
      self._grouped(weight) if weight.kind == "awq" else self._float8(weight, form)
      for weight in self._parts(name, layer)
    ]
    return rows[0] if len(rows) == 1 else GroupedRows.join(rows)

  def read_plain(self, name: str, layer: int | None = None) -> np.ndarray:
    stored = self._locate(name, layer)
    weights = self._parts(name, layer)
    if stored.shift or any(weight.kind != "plain" for weight in weights):
      raise ValueError(f"{self.path}: {name} is no plain numbers: read it as such")
    copies = []
    for weight in weights:
      with self._array(weight.parts["weight"]) as array:
        copies.append(array.copy())
    values = np.stack(copies) if stored.is_split else copies[0]
    return names.to_canonical(values, name, stored.axes, self.config, layer)

  def stored_bytes(self, name: str, layer: int | None = None) -> np.ndarray:
    stored = self._locate(name, layer)
    if stored.is_split or len(self._weights[stored.name].parts) > 1:
      raise ValueError(f"{self.path}: {name} is kept in several tensors: read it instead")
    part = self._weights[stored.name].parts["weight"]
    return self._shard_of[part].view(part)

  def problems(self) -> list[str]:
    found = [*self.interpretation.demands, *self.interpretation.faults]
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
    for name, stamp in self._stamps.items():
      digest.check_unchanged(self.path / name, stamp)
    for shard in self._shards.values():
      shard.check_unchanged()

  def sha256(self) -> str:
    """Hex digest of the digests of config.json, the index and the weights, each with its name; the
    tokenizer's files are not part of it."""
    whole = hashlib.sha256()
    for name, stamp in sorted(self._stamps.items()):
      whole.update(f"{digest.sha256_of(self.path / name, opened_as=stamp)}  {name}\n".encode())
    for name, shard in sorted(self._shards.items()):
      whole.update(f"{shard.sha256()}  {name}\n".encode())
    return whole.hexdigest()

  def close(self) -> None:
    """Views that `stored_bytes` gave out stay valid."""
    for shard in self._shards.values():
      shard.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self.close()

  def _open_shards(self) -> None:
    # transformers takes the whole file where there are both.
    if (self.path / WEIGHTS).is_file():
      self._shards[WEIGHTS] = SafetensorsFile(self.path / WEIGHTS)
      return
    if not (self.path / INDEX).is_file():
      raise _no_weights(self.path)
    self._stamps[INDEX] = (self.path / INDEX).stat()
    placed = read_json(self.path / INDEX).get("weight_map")
    if not isinstance(placed, dict) or not placed:
      raise ValueError(f"{self.path / INDEX}: it has no weight_map: download it again")
    for tensor, shard in placed.items():
      if not isinstance(shard, str) or not _is_plain_name(shard):
        raise ValueError(
          f"{self.path / INDEX}: tensor {tensor[:100]!r} is in {str(shard)[:100]!r}: a file of this"
          " folder is named by its name alone"
        )
    files = sorted(set(placed.values()))
    if len(files) > _MAX_SHARDS:
      raise ValueError(f"{self.path / INDEX}: {len(files)} files: at most {_MAX_SHARDS} are read")
    for file in files:
      if not (self.path / file).is_file():
        raise ValueError(
          f"{self.path}: {file} is missing, one of {len(files)} files that the index lists: download"
          " it again"
        )
      self._shards[file] = SafetensorsFile(self.path / file)
    seen: dict[str, str] = {}
    for file, shard in self._shards.items():
      for tensor in shard.tensors:
        if tensor in seen:
          raise ValueError(f"{self.path}: tensor {tensor!r} is in {seen[tensor]} and in {file}")
        seen[tensor] = file
    for tensor, file in placed.items():
      if seen.get(tensor) != file:
        raise ValueError(
          f"{self.path}: the index has tensor {tensor[:100]!r} in {file}, which does not hold it:"
          " download it again"
        )

  def _read_quantization(self) -> Quantization | None:
    table = self.metadata.get("quantization_config")
    if table is None and isinstance(self.metadata.get("text_config"), dict):
      table = self.metadata["text_config"].get("quantization_config")
    if table is None:
      return None
    try:
      if not isinstance(table, dict):
        raise Fault(f"quantization_config = {str(table)[:100]!r}: expected a table")
      return compressed.quantization(table)
    except (Demand, Fault) as reason:
      self._refused = (str(reason),)
      return None

  def _group(self) -> Iterator[tuple[str, _Weight]]:
    """The weights that the tensors make up."""
    method = None if self._quantization is None else self._quantization.method
    for name, shard in self._shard_of.items():
      module, _, part = name.rpartition(".")
      if part in (*_SCALES, *_UNUSED) and f"{module}.weight" in self._shard_of:
        continue
      if method == "awq" and part in ("qzeros", "scales") and f"{module}.qweight" in self._shard_of:
        continue
      info = shard.tensors[name]
      if method == "awq" and part == "qweight":
        yield f"{module}.weight", self._awq(module, info)
      elif part == "weight":
        yield name, self._weight(module, info, method)
      else:
        yield name, _Weight(info, "plain", {"weight": name})

  def _weight(self, module: str, info: TensorInfo, method: str | None) -> _Weight:
    scales = next(
      (f"{module}.{one}" for one in _SCALES if f"{module}.{one}" in self._shard_of), None
    )
    parts = {"weight": info.name} | ({} if scales is None else {"scales": scales})
    more = 0 if scales is None else self._shard_of[scales].tensors[scales].nbytes
    if method == "bitnet" and info.type == "U8" and scales is not None and len(info.shape) == 2:
      shape = (4 * info.shape[0], info.shape[1])
      kept = dataclasses.replace(info, type="BitNet", shape=shape, nbytes=info.nbytes + more)
      return _Weight(kept, "bitnet", parts)
    assert self._quantization is not None or method is None
    if method == "bitnet" and self._quantization is not None and self._quantization.is_online:
      is_linear = len(info.shape) == 2 and "embed_tokens" not in module
      if is_linear and self._quantization.is_converted(module):
        return _Weight(info, "online", parts)
    if scales is not None:
      return _Weight(dataclasses.replace(info, nbytes=info.nbytes + more), "scaled", parts)
    return _Weight(info, "plain", parts)

  def _awq(self, module: str, info: TensorInfo) -> _Weight:
    """Raises: ValueError: shapes or types that do not go together."""
    parts = {part: f"{module}.{part}" for part in ("qweight", "qzeros", "scales")}
    if missing := [name for name in parts.values() if name not in self._shard_of]:
      raise ValueError(f"{self.path}: the tensor {missing[0]!r} is missing: the file is incomplete")
    infos = {part: self._shard_of[name].tensors[name] for part, name in parts.items()}
    assert self._quantization is not None
    if len(info.shape) != 2:
      raise ValueError(f"{self.path}: tensor {info.name!r} has the shape {info.shape}: two axes")
    k, n = info.shape[0], 8 * info.shape[1]
    group = self._quantization.group_size or k
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
    return _Weight(kept, "awq", parts)

  def _interpret(self) -> names.Interpretation:
    found = names.interpret_huggingface(self.metadata, self.tensors)
    demands = (*found.demands, *(f"config.json: {reason}" for reason in self._refused))
    faults = list(found.faults)
    if not demands and not faults and found.config is not None:
      faults += self._type_faults(found)
    return dataclasses.replace(found, demands=demands, faults=tuple(faults))

  def _type_faults(self, found: names.Interpretation) -> Iterator[str]:
    wanted = {stored.name for stored in found.tensors.values()}
    for name, weight in self._weights.items():
      if names.template_of(name) not in wanted and name not in wanted:
        continue
      unexplained = weight.kind == "scaled" and self._quantization is None
      is_plain = weight.kind in ("plain", "scaled", "online")
      if unexplained or (is_plain and weight.info.type not in _NUMBERS):
        yield (
          f"tensor {name!r} is {weight.info.type}{' with scales' if unexplained else ''}, and"
          " quantization_config does not say what that stands for"
        )
        return

  def _locate(self, name: str, layer: int | None) -> names.Stored:
    config = self.config
    try:
      return names.locate(self.interpretation.tensors, name, layer, config)
    except ValueError as error:
      raise ValueError(f"{self.path}: {error}") from error

  def _experts(self, stored: names.Stored) -> list[str]:
    return [stored.name.replace("{expert}", str(e)) for e in range(self.config.num_experts)]

  def _parts(self, name: str, layer: int | None) -> list[_Weight]:
    """The weight of a canonical name, or that of each expert."""
    stored = self._locate(name, layer)
    files = self._experts(stored) if stored.is_split else [stored.name]
    return [self._weights[file] for file in files]

  def _form(self, weight: _Weight) -> Form | None:
    if weight.kind == "awq":
      return self._awq_form(weight)
    if weight.kind == "scaled":
      return self._float8_form(weight)
    if weight.kind in ("bitnet", "online"):
      return Scales(None, 4)
    return _PLAIN.get(weight.info.type)

  def _array(self, part: str) -> contextlib.AbstractContextManager[np.ndarray]:
    return self._shard_of[part].array(part)

  def _values(self, name: str) -> np.ndarray:
    """Float32 of a weight, in the order of the file."""
    weight = self._weights[name]
    if weight.kind == "awq":
      rows = self._grouped(weight)
      return _by_rows(rows.codes.shape, lambda part: _rows(rows, part).values())
    if weight.kind in ("bitnet", "online"):
      codes, scales = self._ternary(weight)
      k = weight.info.shape[1]
      return _by_rows(
        weight.info.shape, lambda part: ternary_values(codes[part], scales, None)[:, :k]
      )
    with self._array(weight.parts["weight"]) as array:
      flat = array.reshape(-1)
      values = np.empty(flat.shape, np.float32)
      for first in range(0, flat.size, _CHUNK_ELEMENTS):
        chunk = slice(first, first + _CHUNK_ELEMENTS)
        values[chunk] = _as_float32(flat[chunk])
      values = values.reshape(array.shape)
    if weight.kind == "scaled":
      self._scale(weight, values)
    return values

  def _factors(self, weight: _Weight) -> tuple[np.ndarray, int]:
    """What rows of a weight are multiplied by, as `compressed.row_scales`."""
    quantization, shape = self._quantization, weight.info.shape
    with self._array(weight.parts["scales"]) as array:
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

  def _scale(self, weight: _Weight, values: np.ndarray) -> None:
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

  def _float8_form(self, weight: _Weight) -> Grouped | None:
    """Of an FP8 matrix whose rows consist of whole blocks."""
    kind = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2"}.get(weight.info.type)
    if kind is None or weight.kind != "scaled" or len(weight.info.shape) != 2:
      return None
    n, k = weight.info.shape
    scales = self._shard_of[weight.parts["scales"]].tensors[weight.parts["scales"]].shape
    block = None if self._quantization is None else self._quantization.block
    is_blocked = block is not None and math.prod(scales) > 1 and scales not in ((n,), (n, 1))
    size = block[1] if block is not None and is_blocked else k
    if k % size:
      return None
    return Grouped(bits=8, offset=0, group_size=size, scale="float32", float8=kind)  # type: ignore[arg-type]

  def _float8(self, weight: _Weight, form: Grouped) -> GroupedRows:
    n, k = weight.info.shape
    factors, _ = self._factors(weight)
    scales = np.ascontiguousarray(np.broadcast_to(factors, (n, k // form.group_size)))
    with self._array(weight.parts["weight"]) as array:
      rows = GroupedRows(form, array.view(np.uint8).copy(), scales)
    try:
      rows.check_finite()
    except ValueError as error:
      raise ValueError(
        f"{self.path}: tensor {weight.info.name!r}: {error}: the file is damaged"
      ) from error
    return rows

  def _ternary(self, weight: _Weight) -> tuple[np.ndarray, np.ndarray]:
    """Codes, and the one scale [1, 1]."""
    assert self._quantization is not None
    if weight.kind == "online":
      # Imports JAX, which a reader of headers does without.
      from neurojax.ternary.quantize import absmean

      with self._array(weight.parts["weight"]) as array:
        values = _as_float32(array)
      mean = np.abs(values).mean(dtype=np.float64)
      if 0 < mean < 1e-5:
        raise NotImplementedError(
          f"{self.path}: tensor {weight.info.name!r}: |w| is {mean} on average, and transformers"
          " takes 1e-5 then"
        )
      packed = absmean(values, -1, scale_dtype="float32")
      return np.asarray(packed.codes), np.asarray(packed.scales)
    with self._array(weight.parts["scales"]) as array:
      scale = array.astype(np.float32)
    if scale.size != 1 or not np.isfinite(scale).all() or (scale <= 0).any():
      raise ValueError(
        f"{self.path}: tensor {weight.parts['scales']!r} is {scale.tolist()!r:.80}: one positive"
        " number was expected"
      )
    with self._array(weight.parts["weight"]) as array:
      codes = compressed.bitnet_codes(array)
    try:
      check_codes(codes)
    except ValueError as error:
      raise ValueError(
        f"{self.path}: tensor {weight.info.name!r}: {error}: the file is damaged"
      ) from error
    scale = scale.reshape(1, 1)
    return codes, np.float32(1) / scale if self._quantization.is_inverse else scale

  def _awq_form(self, weight: _Weight) -> Grouped:
    scales = self._shard_of[weight.parts["scales"]].tensors[weight.parts["scales"]]
    return Grouped(
      bits=4,
      offset=0,
      group_size=weight.info.shape[1] // scales.shape[0],
      scale="float16" if scales.type == "F16" else "float32",
      minima="zero",
    )

  def _grouped(self, weight: _Weight) -> GroupedRows:
    form = self._awq_form(weight)
    with self._array(weight.parts["qweight"]) as words:
      codes = np.ascontiguousarray(compressed.awq_integers(words).T)
    with self._array(weight.parts["qzeros"]) as words:
      zeros = np.ascontiguousarray(compressed.awq_integers(words).T)
    with self._array(weight.parts["scales"]) as array:
      scales = np.ascontiguousarray(array.T).astype(form.scale)
    rows = GroupedRows(form, codes, scales, minima=zeros)
    try:
      rows.check_finite()
    except ValueError as error:
      raise ValueError(
        f"{self.path}: tensor {weight.parts['scales']!r}: {error}: the file is damaged"
      ) from error
    return rows


def _no_weights(folder: Path) -> Exception:
  for pattern, what in (("*.bin", "PyTorch's"), ("*.pth", "PyTorch's"), ("*.gguf", "GGUF")):
    if other := sorted(folder.glob(pattern)):
      remedy = "name the file" if what == "GGUF" else "convert them to safetensors"
      return NotImplementedError(
        f"{folder}: no {WEIGHTS}, and weights in {what} format ({other[0].name}): {remedy}"
      )
  return ValueError(f"{folder}: neither {WEIGHTS} nor {INDEX}: download them")


def _is_plain_name(name: str) -> bool:
  return (
    name.endswith(".safetensors")
    and not name.startswith(".")
    and os.path.basename(name) == name
    and not set(name) & {"/", "\\", "\0", ":"}
  )


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
