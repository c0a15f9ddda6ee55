"""The parameters of a model in training: a flat dict by canonical name, layers stacked on L.

There are three kinds of one tree: the float32 master weights that the optimizer moves; the effective
parameters that a step multiplies by, made from them once a step; and the layers of the model filled with
those.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Float32

from neurojax import layout
from neurojax.config import ModelConfig, Span
from neurojax.model import params
from neurojax.model.attention import AttentionKind
from neurojax.model.initial import STD
from neurojax.model.neurollm import NeuroLLM
from neurojax.train.config import Quantization, TrainConfig
from neurojax.weights import aware
from neurojax.weights.aware import AwareMatrix

Params = dict[str, Float32[Array, "..."]]
"""Master weights: "embedding_VD" [V, D], "q_DNH" [L, D, N, H] and so on."""

_SEEDS = {
  "embedding_VD": 0, "head_DV": 2, "q_DNH": 4, "k_DKH": 5, "v_DKH": 6, "o_NHD": 10, "gate_DF": 12,
  "up_DF": 13, "down_FD": 15,
}  # fmt: skip
"""Numbers that are folded into a run's key, one for each matrix. They never change: with another number
the same seed would give other initial weights."""


def names(config: ModelConfig) -> list[str]:
  """Names of all parameters, those outside the layers first."""
  outer = [name for name, _ in params.outer_names(config, Span.whole(config))]
  return outer + [name for name, _ in params.layer_names(config)]


def is_projection(name: str) -> bool:
  """Tells whether a parameter is a matrix of a layer: those become ternary, and Muon moves them."""
  return name in params.LAYER and params.is_matrix(name)


def letters(name: str) -> str:
  """Letters of the axes of a master weight: "LDF" for "up_DF"."""
  return ("L" if name in params.LAYER else "") + name.rpartition("_")[2]


def shape(config: ModelConfig, name: str) -> tuple[int, ...]:
  sizes = config.sizes()
  return tuple(sizes[letter] for letter in letters(name))


def where(mesh: Mesh, name: str) -> NamedSharding:
  """Places a parameter: matrices by their letters; norms whole, as each device needs all of them."""
  return layout.sharding(mesh, letters(name)) if params.is_matrix(name) else layout.replicated(mesh)


def initial(config: ModelConfig, seed: int) -> Params:
  """Draws normal weights of standard deviation 0.02; norms are 1.

  Matrices that write to the residual stream are smaller by sqrt(2 L). Each weight depends on its name and
  the seed, and on no mesh. Source: GPT-2 (Radford et al. 2019, section 2.3).
  """
  key = jax.random.key(seed)

  def one(name: str) -> Array:
    if not params.is_matrix(name):
      return jnp.ones(shape(config, name), jnp.float32)
    std = STD
    if name in ("o_NHD", "down_FD"):
      std /= (2 * config.num_layers) ** 0.5
    return std * jax.random.normal(jax.random.fold_in(key, _SEEDS[name]), shape(config, name))

  return {name: one(name) for name in names(config)}


def effective(master: Params, config: TrainConfig) -> dict[str, Any]:
  """Makes the parameters that a step multiplies by and a model file will hold.

  Projections become `AwareMatrix`; the embedding and an untied head are rounded as the export will
  be, yet stay float32, as a lookup's gradient is summed in float32; norms stay.
  """
  recipe = config.quantization

  def one(name: str, w: Array) -> Any:
    if is_projection(name):
      return AwareMatrix(_values(name, w, config), recipe.activations)
    return _outer(w, recipe) if params.is_matrix(name) else w

  return {name: one(name, w) for name, w in master.items()}


def _values(name: str, w_L: Array, config: TrainConfig) -> Array:
  recipe, dtype = config.quantization, jnp.dtype(config.compute_dtype)
  if recipe.weights == "none":
    return w_L.astype(dtype)
  return ternary(name, w_L, recipe, dtype)[0]


def ternary(
  name: str, w_L: Float32[Array, "L ..."], recipe: Quantization, dtype: jnp.dtype
) -> tuple[Float[Array, "L ..."], Float32[Array, "L ..."]]:
  """Rounds a stacked matrix to values and scales: see `aware.absmean`."""
  axes = params.contracted(name)
  return jax.vmap(lambda w: aware.absmean(w, axes, group_size=recipe.group_size, dtype=dtype))(w_L)


def _outer(w: Array, recipe: Quantization) -> Array:
  if recipe.outer == "float32":
    return w
  return lax.reduce_precision(w, exponent_bits=8, mantissa_bits=7)


def layers(
  config: ModelConfig, dtype: str, attention: AttentionKind
) -> tuple[nnx.GraphDef, nnx.State]:
  """Makes the layers of a model without numbers: their structure, and the state that `fill` fills."""
  whole = NeuroLLM.abstract(config, dtype=jnp.dtype(dtype), attention=attention)
  # Embedding and head are sharded, and multiplied by, in ways of training's own.
  del whole.embedding_VD, whole.final_norm
  if not config.tied_embedding:
    del whole.head_DV
  return nnx.split(whole)


def fill(state: nnx.State, values: Mapping[str, Any]) -> nnx.State:
  """Fills the state of `layers` with stacked parameters, given by canonical name."""
  pure: dict[str, Any] = {}
  for name, value in values.items():
    if name in params.LAYER:
      params.put(pure, params.LAYER[name], value)
  filled = jax.tree.map(lambda leaf: leaf, state)
  nnx.replace_by_pure_dict(filled, pure)
  return filled


_NAMES = {path[1:]: name for name, path in params.LAYER.items()}


def map_layer(change: Callable[[str, Any], Any], numbers: nnx.State) -> nnx.State:
  """Replaces each parameter of a layer by `change(canonical name, value)`."""

  def one(path: tuple[Any, ...], param: nnx.Variable) -> nnx.Variable:
    return param.replace(change(_NAMES[tuple(key.key for key in path)], param.get_value()))

  return jax.tree_util.tree_map_with_path(
    one, numbers, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
  )
