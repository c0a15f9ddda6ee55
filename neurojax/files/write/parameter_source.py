"""Presents the parameters of a training run, which are in memory, as a source for writers."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from neurojax.config import ModelConfig, Span
from neurojax.files import names
from neurojax.files.names.architecture import Activations
from neurojax.files.tensor_info import TensorInfo
from neurojax.forms import Form, Plain, Scales
from neurojax.model import params
from neurojax.model.neurollm import NeuroLLM
from neurojax.tokenizer.tokenizer_spec import TokenizerSpec
from neurojax.weights.codecs import check_codes, dequantize
from neurojax.weights.ternary import Mode, TernaryArray

_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_PLAIN: Mapping[str, Plain] = {"float16": Plain("float16"), "bfloat16": Plain("bfloat16")}


@dataclasses.dataclass(frozen=True)
class ParameterSource:
  """The parameters of a whole model by canonical name (a `WeightSource`). Tensors reach the host one
  at a time.

  Attributes:
    config: The architecture.
    arrays: One array per canonical name, with the axes that the name spells: floating point, or a
      TernaryArray of that shape. Arrays of layers are stacked on a leading axis L. NumPy must be able
      to read them: on a device, sharded, or on the host.
    tokenizer: The vocabulary that goes into the file.
    path: The folder that errors name.

  Raises: ValueError: a name is missing or is no parameter of this architecture, or has another
    shape or dtype.
  """

  config: ModelConfig
  arrays: Mapping[str, Any]
  tokenizer: TokenizerSpec | None = None
  path: Path = Path("parameters")

  format = "run"
  metadata: Mapping[str, object] = dataclasses.field(default_factory=dict, init=False)
  card: Mapping[str, str] = dataclasses.field(default_factory=dict, init=False)

  def __post_init__(self) -> None:
    known = self.names()
    if missing := [name for name in known if name not in self.arrays]:
      raise ValueError(f"{missing[0]} is missing: the model has {', '.join(known)}")
    if more := [name for name in self.arrays if name not in known]:
      raise ValueError(f"{more[0]!r} is no parameter of this model: it has {', '.join(known)}")
    for name in known:
      shape = self._shape(name)
      shape = (self.config.num_layers, *shape) if name in names.PER_LAYER else shape
      array = self.arrays[name]
      if tuple(array.shape) != shape:
        raise ValueError(f"{name} has the shape {tuple(array.shape)}, the model wants {shape}")
      if isinstance(array, TernaryArray):
        if not params.is_matrix(name):
          raise ValueError(f"{name} is ternary: norms are numbers")
      elif array.dtype.name not in _TYPES:
        raise ValueError(f"{name} is {array.dtype}: float16, bfloat16 or float32 are written")

  @classmethod
  def of(cls, model: NeuroLLM) -> "ParameterSource":
    """The parameters of a whole model, shared with it. Raises: ValueError: it is a part of one."""
    if len(model.span) != model.config.num_layers:
      raise ValueError(f"this model holds layers {model.span}: a whole one is written")
    pure = nnx.to_pure_dict(nnx.state(model))
    places = dict(params.outer_names(model.config, model.span))
    places |= dict(params.layer_names(model.config))
    return cls(model.config, {name: params.get(pure, path) for name, path in places.items()})

  def model(self, mode: Mode | None = None) -> NeuroLLM:
    """A NeuroLLM with these very numbers, without any file in between: activations in float32.

    Args:
      mode: The way in which activations enter products with ternary matrices, which then stay packed.
        None: all matrices are float32.
    """
    graph, state = nnx.split(NeuroLLM.abstract(self.config))
    places = dict(params.outer_names(self.config, Span.whole(self.config)))
    places |= dict(params.layer_names(self.config))
    pure: dict[str, Any] = {}
    for name, path in places.items():
      array = self.arrays[name]
      if not isinstance(array, TernaryArray):
        array = jnp.asarray(array, jnp.float32)
      else:
        array = jax.tree.map(jnp.asarray, array)
        array = array.dequantize() if mode is None else dataclasses.replace(array, mode=mode)
      params.put(pure, path, array)
    nnx.replace_by_pure_dict(state, pure)
    return nnx.merge(graph, state)

  def names(self) -> list[str]:
    """The canonical names of this architecture; those outside the layers come first."""
    outer = [name for name, _ in params.outer_names(self.config, Span.whole(self.config))]
    return outer + [name for name, _ in params.layer_names(self.config)]

  def places(self) -> Iterator[tuple[str, int | None]]:
    """Every tensor as (name, layer), layer by layer."""
    inner = {name for name, _ in params.layer_names(self.config)}
    yield from ((name, None) for name in self.names() if name not in inner)
    for layer in range(self.config.num_layers):
      yield from ((name, layer) for name in self.names() if name in inner)

  def ternary(self) -> dict[str, TernaryArray]:
    """The ternary matrices, all layers of each."""
    return {name: a for name, a in self.arrays.items() if isinstance(a, TernaryArray)}

  @property
  def activations(self) -> Activations | None:
    is_rounded = any(array.mode == "w2a8" for array in self.ternary().values())
    return "int8" if is_rounded else None

  def info(self, name: str, layer: int | None = None) -> TensorInfo:
    array = self._array(name, layer)
    kind = "ternary" if isinstance(array, TernaryArray) else _TYPES[array.dtype.name]
    nbytes = array.nbytes // (1 if layer is None else self.config.num_layers)
    return TensorInfo(name, kind, self._shape(name), 0, nbytes)

  def read(self, name: str, layer: int | None = None) -> np.ndarray:
    if not isinstance(self._array(name, layer), TernaryArray):
      return self.read_plain(name, layer).astype(np.float32)
    codes, scales, group_size = self.read_ternary(name, layer)
    contraction = self.arrays[name].contraction
    w_NxK = dequantize(codes, scales.astype(np.float32), group_size)[:, : contraction.k]
    is_last = self.arrays[name].contracted_axes < 0
    return (w_NxK if is_last else w_NxK.T).reshape(self._shape(name))

  def read_ternary(
    self, name: str, layer: int | None = None
  ) -> tuple[np.ndarray, np.ndarray, int | None]:
    array = self._array(name, layer)
    if not isinstance(array, TernaryArray):
      raise ValueError(f"{_where(name, layer)} is {array.dtype}, which is not ternary")
    codes, scales = self._host(array.codes, layer), self._host(array.scales, layer)
    try:
      check_codes(codes)
    except ValueError as error:
      raise ValueError(f"{_where(name, layer)}: {error}") from error
    _check_finite(scales, name, layer)
    return codes, scales, array.group_size

  def narrow_form(self, name: str, layer: int | None = None) -> Form | None:
    array = self._array(name, layer)
    if isinstance(array, TernaryArray):
      return Scales(array.group_size, array.scales.dtype.itemsize)
    return _PLAIN.get(array.dtype.name)

  def read_plain(self, name: str, layer: int | None = None) -> np.ndarray:
    array = self._array(name, layer)
    if isinstance(array, TernaryArray):
      raise ValueError(f"{_where(name, layer)} is ternary: these are no plain numbers")
    values = self._host(array, layer)
    _check_finite(values, name, layer)
    return values

  def check(self) -> None:
    """Nothing is left to check: every array was compared to the architecture when this was made."""

  def _array(self, name: str, layer: int | None) -> Any:
    if name not in self.arrays or (layer is None) != (name not in names.PER_LAYER):
      raise ValueError(f"{_where(name, layer)} is no parameter of this model")
    return self.arrays[name]

  def _host(self, leaf: Any, layer: int | None) -> np.ndarray:
    return np.asarray(leaf if layer is None else leaf[layer])

  def _shape(self, name: str) -> tuple[int, ...]:
    """The shape of a tensor of one layer, by the letters of its name."""
    sizes = self.config.sizes()
    return tuple(sizes[letter] for letter in name.rpartition("_")[2])


def _where(name: str, layer: int | None) -> str:
  return name if layer is None else f"{name} of layer {layer}"


def _check_finite(values: np.ndarray, name: str, layer: int | None) -> None:
  if not np.isfinite(values).all():
    raise ValueError(f"{_where(name, layer)} holds NaN or infinity: take an earlier checkpoint")
