"""The parts of the tables that readers and writers share, and the interpretation of a file by them.

A canonical name ends in the letters of its axes: D model width, F FFN width, N query heads,
K key-value heads, H head width, V vocabulary, E experts, W, M and C as `ModelConfig.sizes` says.
Names in `PER_LAYER` exist once per layer that has them and carry no layer axis.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from neurojax.config import LayerKind, ModelConfig
from neurojax.files.tensor_info import TensorInfo
from neurojax.model import params

WHOLE_MODEL = ("embedding_VD", "final_norm_D", "head_DV")
PER_LAYER = tuple(params.LAYER)


Activations = Literal["int8"]
"""The number format to which activations are rounded before ternary matrices, one scale per token."""


class Fault(Exception):
  """The file contradicts itself or lacks something."""


class Demand(Exception):
  """The file asks for what the model does not compute."""


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
  """The place of a tensor in a file.

  Attributes:
    name: The file's name, with {layer} where the layer's number goes, and {expert} where each expert
      has a tensor of its own.
    axes: The row-major axes, apart by spaces; letters within one axis are flattened together
      ("NH D" is a matrix of N*H rows and D columns), "1" is an axis of one. An axis E of experts that
      have tensors of their own is the first.
    shift: A number to add to the file's numbers. Gemma's norms multiply by 1 + w and its files keep w.
  """

  name: str
  axes: str
  shift: float = 0.0

  @property
  def is_split(self) -> bool:
    """Whether each expert has a tensor of its own."""
    return "{expert}" in self.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interpretation:
  """A file in the words of the model.

  Attributes:
    architecture: The name that the file gives, or None.
    config: The numbers as stated, even where the file is refused; None when they make no model.
    tensors: Canonical name to stored tensor; without "head_DV" when the embedding is tied, and
      without names that the architecture does not have. Which layers have one, the config says.
    demands: Sentences about features that the file asks for and the model does not compute.
    faults: Sentences about contradictions and gaps in the file.
    ignored: Parts of the file that text needs nothing of, such as a vision tower.
    activations: The rounding of activations that the file states, or None.
  """

  architecture: str | None
  config: ModelConfig | None
  tensors: Mapping[str, Stored]
  demands: tuple[str, ...] = ()
  faults: tuple[str, ...] = ()
  ignored: tuple[str, ...] = ()
  activations: Activations | None = None

  def model_config(self, where: str) -> ModelConfig:
    """The config of a file that is neither refused nor faulty; `where` names it in errors.

    Raises: NotImplementedError (demands) or ValueError (faults).
    """
    if self.demands:
      raise NotImplementedError(f"{where}: not supported: {'; '.join(self.demands)}")
    if self.faults or self.config is None:
      raise ValueError(f"{where}: {'; '.join(self.faults)}")
    return self.config


def layer_names(config: ModelConfig, layer: int) -> list[str]:
  """The canonical names that a layer has."""
  return kind_names(config)[config.kind_index(layer)]


def kind_names(config: ModelConfig) -> list[list[str]]:
  """The canonical names that a layer of each of `config.kinds` has."""
  return [
    [name for name, _ in params.stack_names(config, params.Stack("layers", (kind,), (), ()))]
    for kind in config.kinds
  ]


def of_config(stored: Mapping[str, Stored], config: ModelConfig | None) -> dict[str, Stored]:
  """The tensors of an architecture that a model with this configuration has."""
  if config is None:
    return dict(stored)
  known = {*WHOLE_MODEL, *(name for names in kind_names(config) for name in names)}
  return {name: one for name, one in stored.items() if name in known}


def locate(
  tensors: Mapping[str, Stored], name: str, layer: int | None, config: ModelConfig
) -> Stored:
  """The stored tensor of a canonical name, its layer filled in. Raises ValueError."""
  if name not in WHOLE_MODEL and name not in PER_LAYER:
    raise ValueError(
      f"{name!r} is no parameter; choose one of {', '.join(WHOLE_MODEL + PER_LAYER)}"
    )
  if name not in tensors:
    why = "the model ties it to its embedding: read 'embedding_VD'"
    raise ValueError(f"{name!r}: {why if name == 'head_DV' else 'this architecture has none'}")
  stored = tensors[name]
  if name in WHOLE_MODEL:
    if layer is not None:
      raise ValueError(f"layer = {layer!r}: {name!r} belongs to the whole model: leave it None")
    return stored
  if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < config.num_layers:
    raise ValueError(f"layer = {layer!r} of {name!r}: choose one of 0..{config.num_layers - 1}")
  if name not in layer_names(config, layer):
    raise ValueError(f"{name!r}: layer {layer} has none")
  return dataclasses.replace(stored, name=at_layer(stored.name, layer))


def at_layer(template: str, layer: int) -> str:
  """A file's name with the number of the layer in it; {expert} stays."""
  return template.replace("{layer}", str(layer))


def file_shape(axes: str, config: ModelConfig, layer: int | None = None) -> tuple[int, ...]:
  """The row-major shape of stored axes such as "NH D", of a layer where layers differ."""
  sizes = config.sizes(layer)
  return tuple(math.prod(sizes[letter] for letter in axis) for axis in axes.split())


def to_canonical(
  values: np.ndarray, name: str, axes: str, config: ModelConfig, layer: int | None = None
) -> np.ndarray:
  """A view of `values` (stored as `axes`) with the axes that the canonical name spells."""
  sizes = config.sizes(layer)
  wanted = name.rpartition("_")[2]
  letters = [letter for letter in axes.replace(" ", "") if letter != "1" or "1" in wanted]
  order = [letters.index(letter) for letter in wanted]
  return values.reshape([sizes[letter] for letter in letters]).transpose(order)


def kinds_of_layers(
  kinds: Sequence[LayerKind], of_layer: Sequence[int]
) -> tuple[tuple[LayerKind, ...], tuple[int, ...]]:
  """`layer_kinds` and `layer_pattern` of a model whose layer i is `kinds[of_layer[i]]`: equal kinds
  once, in the order of their layers, and the shortest pattern that repeats."""
  used = list(dict.fromkeys(kinds[i] for i in of_layer))
  pattern = [used.index(kinds[i]) for i in of_layer]
  count = len(pattern)
  period = next(p for p in range(1, count + 1) if pattern[p:] == pattern[: count - p])
  return tuple(used), tuple(pattern[:period])


def with_kinds(
  kinds: Sequence[LayerKind], of_layer: Sequence[int], rope_base: float
) -> dict[str, object]:
  """The fields of a ModelConfig that say how its layers differ; none of kinds where they do not.

  Args:
    kinds: With numbers that are not the model's own alone; their rope_base is given.
    rope_base: The model's own.
  """
  own = [
    dataclasses.replace(kind, rope_base=None) if kind.rope_base == rope_base else kind
    for kind in kinds
  ]
  layer_kinds, pattern = kinds_of_layers(own, of_layer)
  (first, *more) = layer_kinds
  plain = LayerKind(rope_scaling=first.rope_scaling, sliding_window=first.sliding_window)
  if not more and first == plain:
    return {"rope_scaling": first.rope_scaling, "sliding_window": first.sliding_window}
  return {"layer_kinds": layer_kinds, "layer_pattern": pattern}


def template_of(name: str) -> str:
  """A tensor's name with {layer} and {expert} in place of its first two numbers."""
  with_layer = re.sub(r"\.(0|[1-9][0-9]{0,8})\.", ".{layer}.", name, count=1)
  return re.sub(r"\.(0|[1-9][0-9]{0,8})\.", ".{expert}.", with_layer, count=1)


def tensor_demands(
  stored: Iterable[Stored], tensors: Iterable[str], reasons: Sequence[tuple[str, str]]
) -> Iterator[str]:
  """A sentence for each kind of tensor that no stored one names.

  Args:
    reasons: Parts of names and what such a tensor is; the first match counts.
  """
  known = {one.name for one in stored}
  groups: dict[str, list[str]] = {}
  for name in tensors:
    template = template_of(name)
    if template not in known and name not in known:
      groups.setdefault(template, []).append(name)
  for names in groups.values():
    first = names[0]
    why = next((why for part, why in reasons if part in first), "no place in this architecture")
    more = f" and {len(names) - 1} more like it" if len(names) > 1 else ""
    yield f"tensor {short(first)}{more}: {why}"


def tensor_faults(
  stored: Mapping[str, Stored], tensors: Mapping[str, TensorInfo], config: ModelConfig
) -> Iterator[str]:
  """The first tensor that is missing, or of another shape than the configuration asks for, or of a
  layer beyond it."""
  expected: dict[str, tuple[str, int | None]] = {}
  for name in WHOLE_MODEL:
    if name in stored:
      expected[stored[name].name] = (stored[name].axes, None)
  # A hostile number of layers or experts must not cost time: the first absent tensor ends the loop.
  of_kind = kind_names(config)
  for name in expected:
    if name not in tensors:
      yield f"the tensor {name!r} is missing: the file is incomplete"
      return
  for layer in range(config.num_layers):
    for canonical in of_kind[config.kind_index(layer)]:
      one = stored.get(canonical)
      if one is None:
        yield f"the format has no tensor for {canonical!r} of layer {layer}"
        return
      for file_name, axes in _files(one, layer, config):
        if file_name not in tensors:
          yield f"the tensor {file_name!r} is missing: the file is incomplete"
          return
        expected[file_name] = (axes, layer)
  templates = {one.name for one in stored.values()}
  for name, info in tensors.items():
    if name in expected:
      axes, place = expected[name]
      shape = file_shape(axes, config, place)
      if info.shape != shape:
        yield f"tensor {name!r} has the shape {info.shape}, its metadata ask for {shape}"
        return
    elif re.sub(r"\.[0-9]+\.", ".{layer}.", name, count=1) in templates or (
      template_of(name) in templates
    ):
      where = f"the {config.num_layers} layers of the metadata"
      if _layer_of(name) < config.num_layers:
        where = "what the metadata say of its layer"
      yield f"tensor {short(name)} is beyond {where}"
      return


def short(value: object) -> str:
  """A value as Python spells it, cut where a hostile file made it long."""
  text = repr(value[:8]) if isinstance(value, str | list) and len(value) > 80 else repr(value)
  return text if len(text) <= 120 else text[:117] + "..."


def _files(one: Stored, layer: int, config: ModelConfig) -> Iterator[tuple[str, str]]:
  """The tensors of a layer that a stored one consists of: name and axes of each."""
  name = at_layer(one.name, layer)
  if not one.is_split:
    yield name, one.axes
    return
  for expert in range(config.num_experts):
    yield name.replace("{expert}", str(expert)), one.axes.partition(" ")[2]


def _layer_of(name: str) -> int:
  number = re.search(r"\.([0-9]+)\.", name)
  return int(number[1]) if number else 0
