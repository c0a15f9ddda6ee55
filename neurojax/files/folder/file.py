"""Reads a folder in the layout of transformers: config.json and safetensors. Everything in it is checked
before it is used."""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from neurojax.config import ModelConfig
from neurojax.files import digest, names
from neurojax.files.folder import compressed
from neurojax.files.folder.card import read_card
from neurojax.files.folder.compressed import Quantization
from neurojax.files.folder.safetensors import read_json
from neurojax.files.folder.shards import Shards
from neurojax.files.folder.weights import NUMBERS, Weight, Weights
from neurojax.files.names.architecture import Activations, Demand, Fault
from neurojax.files.tensor_info import TensorInfo
from neurojax.forms import Form, Grouped
from neurojax.tokenizer.tokenizer_spec import TokenizerSpec
from neurojax.weights.rows import GroupedRows

CONFIG = "config.json"


class FolderFile:
  """An open folder (a `ModelFile`). Headers are checked on opening; tensors are mapped and
  decoded one by one.

  `tensors` lists weights under transformers' names; a weight that is kept in several tensors has one
  entry.

  Raises:
    ValueError: a file is missing, truncated, damaged or contradicts another.
    NotImplementedError: the weights are in another format.
  """

  format = "huggingface"

  def __init__(self, path: str | Path) -> None:
    self.path = Path(path)
    self._opened_as = (self.path / CONFIG).stat()
    self.metadata: Mapping[str, Any] = read_json(self.path / CONFIG)
    version = self.metadata.get("transformers_version")
    self.version = version if isinstance(version, str) else "unknown"
    self._refused: tuple[str, ...] = ()
    self._quantization = self._read_quantization()
    with contextlib.ExitStack() as undo:
      self._shards = Shards(self.path)
      undo.callback(self.close)
      self._weights = Weights(self.path, self._shards, self._quantization)
      self.tensors: Mapping[str, TensorInfo] = {
        name: weight.info for name, weight in self._weights.all.items()
      }
      self.interpretation = self._interpret()
      undo.pop_all()

  @property
  def file_bytes(self) -> int:
    return self._shards.size_bytes

  @property
  def config(self) -> ModelConfig:
    return self.interpretation.model_config(str(self.path))

  @functools.cached_property
  def tokenizer(self) -> TokenizerSpec | None:
    from neurojax.tokenizer.read.folder import spec_from_folder

    return spec_from_folder(self.path)

  @property
  def activations(self) -> Activations | None:
    return self.interpretation.activations

  @functools.cached_property
  def card(self) -> Mapping[str, str]:
    said = {key: v for key, v in self._shards.metadata.items() if key.startswith("general.")}
    return {**said, **read_card(self.path, self.metadata)}

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
      values = np.stack([self._weights.values(one) for one in self._experts(stored)])
    else:
      values = self._weights.values(stored.name)
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
    codes, scales = zip(*(self._weights.ternary(weight) for weight in weights), strict=True)
    if len(weights) == 1:
      return codes[0], scales[0], None
    return np.concatenate(codes), np.concatenate(scales), None

  def narrow_form(self, name: str, layer: int | None = None) -> Form | None:
    if self._locate(name, layer).shift:
      return None
    forms = {self._weights.narrow_form(weight) for weight in self._parts(name, layer)}
    return forms.pop() if len(forms) == 1 else None

  def read_grouped(self, name: str, layer: int | None = None) -> GroupedRows:
    form = self.narrow_form(name, layer)
    if not isinstance(form, Grouped):
      raise ValueError(
        f"{self.path}: {name} is {self.info(name, layer).type}, no matrix of grouped numbers: read it"
        " as numbers"
      )
    rows = [self._weights.grouped(weight) for weight in self._parts(name, layer)]
    return rows[0] if len(rows) == 1 else GroupedRows.join(rows)

  def read_plain(self, name: str, layer: int | None = None) -> np.ndarray:
    stored = self._locate(name, layer)
    weights = self._parts(name, layer)
    if stored.shift or any(weight.kind != "plain" for weight in weights):
      raise ValueError(f"{self.path}: {name} is no plain numbers: read it as such")
    copies = []
    for weight in weights:
      with self._shards.array(weight.parts["weight"]) as array:
        copies.append(array.copy())
    values = np.stack(copies) if stored.is_split else copies[0]
    return names.to_canonical(values, name, stored.axes, self.config, layer)

  def stored_bytes(self, name: str, layer: int | None = None) -> np.ndarray:
    (weight, *more) = self._parts(name, layer)
    if more or len(weight.parts) > 1:
      raise ValueError(f"{self.path}: {name} is kept in several tensors: read it instead")
    return self._shards.view(weight.parts["weight"])

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
    digest.check_unchanged(self.path / CONFIG, self._opened_as)
    self._shards.check_unchanged()

  def sha256(self) -> str:
    """Hex digest of the digests of config.json, the index and the weights, each with its name; the
    tokenizer's files are not part of it."""
    config = digest.sha256_of(self.path / CONFIG, opened_as=self._opened_as)
    whole = hashlib.sha256()
    for name, one in ((CONFIG, config), *self._shards.digests()):
      whole.update(f"{one}  {name}\n".encode())
    return whole.hexdigest()

  def close(self) -> None:
    """Views that `stored_bytes` gave out stay valid."""
    self._shards.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self.close()

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

  def _interpret(self) -> names.Interpretation:
    found = names.interpret_folder(self.metadata, self.tensors)
    demands = (*found.demands, *(f"config.json: {reason}" for reason in self._refused))
    faults = list(found.faults)
    if not demands and not faults and found.config is not None:
      faults += self._type_faults(found)
    activations = found.activations
    if self._quantization is not None and self._quantization.method == "bitnet":
      # transformers, integrations/bitnet.py: every BitLinear rounds them, one scale per token.
      activations = "int8"
    return dataclasses.replace(
      found, demands=demands, faults=tuple(faults), activations=activations
    )

  def _type_faults(self, found: names.Interpretation) -> Iterator[str]:
    wanted = {stored.name for stored in found.tensors.values()}
    for name, weight in self._weights.all.items():
      if names.template_of(name) not in wanted and name not in wanted:
        continue
      unexplained = weight.kind == "scaled" and self._weights.quantization is None
      is_plain = weight.kind in ("plain", "scaled", "online")
      if unexplained or (is_plain and weight.info.type not in NUMBERS):
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

  def _parts(self, name: str, layer: int | None) -> list[Weight]:
    """The weight of a canonical name, or that of each expert."""
    stored = self._locate(name, layer)
    files = self._experts(stored) if stored.is_split else [stored.name]
    return [self._weights.all[file] for file in files]
