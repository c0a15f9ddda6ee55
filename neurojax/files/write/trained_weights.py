"""The parameters of a model on their way into a file, one tensor in host memory at a time."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from neurojax.config import ModelConfig, RopeStyle, Span
from neurojax.files import names
from neurojax.model import params
from neurojax.model.neurollm import NeuroLLM
from neurojax.weights.codecs import check_codes
from neurojax.weights.ternary import Mode, TernaryArray

_TURNED = ("q_DNH", "k_DKH", "q_norm_H", "k_norm_H")
"""What is multiplied by rotary positions, in the order of a head's elements."""


@dataclasses.dataclass(frozen=True)
class Weights:
  """A whole model by canonical name.

  Attributes:
    config: The architecture.
    arrays: One entry per name of `names()`: an array with the axes that the name spells, floating
      point, or a TernaryArray of that shape. Those of layers are stacked on a leading axis L.
      Anything NumPy can read: on a device, sharded, or on the host.

  Raises: ValueError: a name is missing or is no parameter of this architecture, or has another
    shape or dtype.
  """

  config: ModelConfig
  arrays: Mapping[str, Any]

  def __post_init__(self) -> None:
    known = self.names()
    if missing := [name for name in known if name not in self.arrays]:
      raise ValueError(f"{missing[0]} is missing: the model has {', '.join(known)}")
    if more := [name for name in self.arrays if name not in known]:
      raise ValueError(f"{more[0]!r} is no parameter of this model: it has {', '.join(known)}")
    sizes = self.config.sizes()
    for name in known:
      shape = tuple(sizes[letter] for letter in name.rpartition("_")[2])
      shape = (self.config.num_layers, *shape) if name in names.PER_LAYER else shape
      array = self.arrays[name]
      if tuple(array.shape) != shape:
        raise ValueError(f"{name} has the shape {tuple(array.shape)}, the model wants {shape}")
      if isinstance(array, TernaryArray):
        if not params.is_matrix(name):
          raise ValueError(f"{name} is ternary: norms are numbers")
      elif array.dtype.name not in ("float16", "bfloat16", "float32"):
        raise ValueError(f"{name} is {array.dtype}: float16, bfloat16 or float32 are written")

  @classmethod
  def of(cls, model: NeuroLLM) -> "Weights":
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
      mode: How activations are multiplied by ternary matrices, which then stay packed; None: all
        matrices as float32.
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
    """The canonical names of this architecture, those of the whole model first."""
    outer = [name for name, _ in params.outer_names(self.config, Span.whole(self.config))]
    return outer + [name for name, _ in params.layer_names(self.config)]

  def places(self) -> Iterator[tuple[str, int | None]]:
    """Every tensor as (name, layer), layer by layer."""
    inner = {name for name, _ in params.layer_names(self.config)}
    yield from ((name, None) for name in self.names() if name not in inner)
    for layer in range(self.config.num_layers):
      yield from ((name, layer) for name in self.names() if name in inner)

  def ternary(self) -> dict[str, TernaryArray]:
    """The matrices that are ternary, all layers of each."""
    return {name: a for name, a in self.arrays.items() if isinstance(a, TernaryArray)}

  def read(
    self, name: str, layer: int | None, rope_style: RopeStyle | None = None
  ) -> np.ndarray | TernaryArray:
    """One tensor on the host.

    Args:
      rope_style: How heads of queries and keys are to be ordered; the model's own if None. Their
        elements change places, so products of queries and keys stay what they are.
    Raises: ValueError: it holds NaN, infinity or a code that is not ternary.
    """
    array = self.arrays[name]
    host = jax.tree.map(lambda leaf: np.asarray(leaf if layer is None else leaf[layer]), array)
    where = name if layer is None else f"{name} of layer {layer}"
    if isinstance(host, TernaryArray):
      try:
        check_codes(host.codes)
      except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not np.isfinite(_numbers(host)).all():
      raise ValueError(f"{where} holds NaN or infinity: take an earlier checkpoint")
    if name in _TURNED and rope_style not in (None, self.config.rope_style):
      return _turn(host, name, self.config)
    return host


def stored(values: np.ndarray, name: str, axes: str, config: ModelConfig) -> np.ndarray:
  """Canonical `values` as rows in a file's order `axes`: the inverse of `names.to_canonical`."""
  letters = name.rpartition("_")[2]
  order = [letters.index(letter) for letter in axes.replace(" ", "")]
  return np.ascontiguousarray(values.transpose(order)).reshape(names.file_shape(axes, config))


def _numbers(host: np.ndarray | TernaryArray) -> np.ndarray:
  values = host.scales if isinstance(host, TernaryArray) else host
  # NumPy knows no bfloat16 of its own; float32 holds all of it.
  return values.astype(np.float32, copy=False)


def _turn(
  host: np.ndarray | TernaryArray, name: str, config: ModelConfig
) -> np.ndarray | TernaryArray:
  """Heads in the other rotary order: pairs (i, i + H/2) to (2i, 2i + 1), or back."""
  h = config.head_dim
  rows = (2, h // 2) if config.rope_style == "half" else (h // 2, 2)
  order_H = np.arange(h).reshape(rows).T.ravel()
  if not isinstance(host, TernaryArray):
    return np.take(host, order_H, axis=-1)
  heads = host.weight_shape[1]
  of_rows = (np.arange(heads)[:, None] * h + order_H[None]).ravel()
  scales = host.scales if host.group_size is None else host.scales[of_rows]
  return dataclasses.replace(host, codes=host.codes[of_rows], scales=scales)
