"""NeuroLLM: one decoder for every family, driven by ModelConfig.

Layers of one shape are stacked on a leading axis L, so that a stage is a slice: a NeuroLLM holds a
`Span` of layers, with the embedding if the span is the first and the head if it is the last.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from neurojax.config import ModelConfig, Span
from neurojax.kernels.gemm.layer import TernaryLayer
from neurojax.model import params
from neurojax.model.attention import softcap
from neurojax.model.block import Block
from neurojax.model.cache import Cache, ConvState, KVCache, LayerCache
from neurojax.model.initial import normal
from neurojax.model.norm import RMSNorm
from neurojax.model.order import Rounds, rounds
from neurojax.model.project import Matrix, StackedLayer, project
from neurojax.weights.ternary import TernaryArray


class NeuroLLM(nnx.Module):
  """A decoder, or the span of its layers that one stage holds.

  Its layers are in `layers`, or in `layers_0`, `layers_1` and so on where not all have one shape: see
  `params.stacks`.

  Args:
    span: Which layers; all of them if absent.
    dtype: Of parameters, activations and cache; norms, softmax and logits are float32 inside.
  """

  def __init__(
    self,
    config: ModelConfig,
    *,
    span: Span | None = None,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    span = span or Span.whole(config)
    if span.num_layers != config.num_layers:
      raise ValueError(f"span {span} does not belong to a model of {config.num_layers} layers")
    self.config, self.span, self.dtype = config, span, jnp.dtype(dtype)
    for stack in self.stacks.values():
      setattr(self, stack.name, _stacked(config, stack, dtype, rngs))
    if span.is_first or (span.is_last and config.tied_embedding):
      self.embedding_VD = normal(rngs, (config.vocab_size, config.model_dim), dtype)
    if span.is_last:
      self.final_norm = RMSNorm(config.model_dim, eps=config.norm_eps, dtype=dtype)
      if not config.tied_embedding:
        self.head_DV = normal(rngs, (config.model_dim, config.vocab_size), dtype)

  @property
  def stacks(self) -> dict[str, params.Stack]:
    """The stacks of layers, by their attribute's name."""
    return {stack.name: stack for stack in params.stacks(self.config, self.span)}

  def __call__(
    self,
    inputs: Int[Array, "B T"] | Float[Array, "B T D"],
    *,
    cache: Cache | None = None,
    start_B: Int[Array, "B"] | None = None,
    count_B: Int[Array, "B"] | None = None,
  ) -> tuple[Float[Array, "B T X"], Cache | None]:
    """Run the span: from token ids if it is the first, else from activations.

    Args:
      cache: Absent: one causal pass over the T given positions, from position 0.
      start_B: Position of each row's first input; needed with a cache.
      count_B: How many of each row's inputs mean something; the others are padding, and what they
        leave in the cache is not read. None: all.
    Returns: float32 logits [B, T, V] if the span is the last, else activations [B, T, D]; and the
      cache with the new positions in it.
    """
    x_BTD = self.embed(inputs) if self.span.is_first else inputs
    x_BTD, cache = self.run_layers(x_BTD, cache=cache, start_B=start_B, count_B=count_B)
    return (self.logits(x_BTD) if self.span.is_last else x_BTD), cache

  def embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    table: jax.Array | Matrix = self.embedding_VD.get_value()
    rows = table[tokens_BT] if isinstance(table, jax.Array) else table.take(tokens_BT)
    x_BTD = rows.astype(self.dtype)
    if self.config.embedding_scale == 1:
      return x_BTD
    return x_BTD * jnp.asarray(self.config.embedding_scale, self.dtype)

  def run_layers(
    self,
    x_BTD: Float[Array, "B T D"],
    *,
    cache: Cache | None = None,
    start_B: Int[Array, "B"] | None = None,
    count_B: Int[Array, "B"] | None = None,
  ) -> tuple[Float[Array, "B T D"], Cache | None]:
    """The layers of the span alone, without embedding or head. Arguments as in `__call__`."""
    if (cache is None) != (start_B is None):
      raise ValueError("cache and start_B go together: give both or neither")
    if start_B is None:
      start_B = jnp.zeros(x_BTD.shape[0], jnp.int32)
    position_BT = start_B[:, None] + jnp.arange(x_BTD.shape[1], dtype=jnp.int32)[None]
    stacks = self.stacks
    split = {name: nnx.split(getattr(self, name)) for name in stacks}

    def layer(
      name: str, numbers: nnx.State, index: jax.Array, x_BTD: jax.Array, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
      block = nnx.merge(split[name][0], numbers)
      which = None
      if len(stacks[name].kinds) > 1:
        which = jnp.asarray(stacks[name].which, jnp.int32)[index]
      return block(x_BTD, position_BT, cache, index, which=which, count_B=count_B)

    if cache is None:
      for each in rounds(self.config, self.span):
        x_BTD = _scan_runs(each, layer, {name: state for name, (_, state) in split.items()}, x_BTD)
      return x_BTD, None

    def body(name: str) -> Any:
      return lambda index, carry: layer(name, _numbers(split[name][1], index), index, *carry)

    if "layers" in stacks:
      # XLA dissolves a loop of one round into what surrounds it, with other roundings, and a stage of
      # one layer would not give the whole model's bits: its count is one that XLA cannot know.
      count = len(self.span) if len(self.span) > 1 else jnp.minimum(start_B[0] + 1, 1)
      return lax.fori_loop(0, count, body("layers"), (x_BTD, cache))
    caches = dict(cache)
    for each in rounds(self.config, self.span):
      x_BTD, caches = _loop_runs(each, body, start_B[0], x_BTD, caches)
    return x_BTD, caches

  def logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    x_BTD = self.final_norm(x_BTD)
    if self.config.tied_embedding:
      logits_BTV = project("BTD,VD->BTV", x_BTD, self.embedding_VD, dtype=jnp.float32)
    else:
      logits_BTV = project("BTD,DV->BTV", x_BTD, self.head_DV, dtype=jnp.float32)
    cap = self.config.logit_softcap
    return logits_BTV if cap is None else softcap(logits_BTV, cap)

  def new_cache(self, *, batch: int, capacity: int) -> Cache:
    """An empty cache for the layers of this span."""
    return empty_cache(self.config, self.span, batch=batch, capacity=capacity, dtype=self.dtype)

  @classmethod
  def abstract(
    cls, config: ModelConfig, *, span: Span | None = None, dtype: DTypeLike = jnp.float32
  ) -> "NeuroLLM":
    """The module with shapes in place of arrays: costs no memory."""
    return nnx.eval_shape(lambda: cls(config, span=span, dtype=dtype, rngs=nnx.Rngs(0)))


def empty_cache(
  config: ModelConfig, span: Span, *, batch: int, capacity: int, dtype: DTypeLike
) -> Cache:
  """A cache for a span of layers, with nothing in it.

  Raises: ValueError: the capacity is no multiple of KEY_BLOCK.
  """
  caches = {
    stack.name: _empty(config, stack, batch, capacity, dtype)
    for stack in params.stacks(config, span)
  }
  return caches.get("layers", caches)


def _stacked(config: ModelConfig, stack: params.Stack, dtype: DTypeLike, rngs: nnx.Rngs) -> Block:
  @nnx.split_rngs(splits=len(stack.layers))
  @nnx.vmap(in_axes=0, out_axes=0)
  def made(rngs: nnx.Rngs) -> Block:
    return Block(config, kinds=stack.kinds, dtype=dtype, rngs=rngs)

  return made(rngs)


def _empty(
  config: ModelConfig, stack: params.Stack, batch: int, capacity: int, dtype: DTypeLike
) -> LayerCache:
  if stack.kind.mixer == "convolution":
    return ConvState.zeros(
      num_layers=len(stack.layers),
      batch=batch,
      width=config.conv_width,
      channels=config.model_dim,
      dtype=dtype,
    )
  assert stack.kind.num_kv_heads is not None and stack.kind.head_dim is not None
  return KVCache.zeros(
    num_layers=len(stack.layers),
    batch=batch,
    num_kv_heads=stack.kind.num_kv_heads,
    capacity=capacity,
    head_dim=stack.kind.head_dim,
    dtype=dtype,
    window=stack.kind.sliding_window,
  )


def _loop_runs(
  each: Rounds, body: Any, start: jax.Array, x_BTD: jax.Array, caches: dict[str, LayerCache]
) -> tuple[jax.Array, dict[str, LayerCache]]:
  """With caches: each run is a loop of its own, of a count that XLA cannot know, as above."""

  def once(turn: jax.Array | int, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
    x_BTD, caches = carry[0], dict(carry[1])
    for run in each.runs:
      first, count = run.first + turn * run.stride, jnp.minimum(start + run.count, run.count)
      carried = (x_BTD, caches[run.stack])
      x_BTD, caches[run.stack] = lax.fori_loop(first, first + count, body(run.stack), carried)
    return x_BTD, caches

  if each.count == 1:
    return once(0, (x_BTD, caches))
  return lax.fori_loop(0, each.count, once, (x_BTD, caches))


def _scan_runs(each: Rounds, layer: Any, states: dict[str, nnx.State], x_BTD: jax.Array):
  """Without a cache: differentiable, layer by layer of each run."""
  for turn in range(each.count):
    for run in each.runs:
      first = run.first + turn * run.stride
      stacked, places = states[run.stack], slice(first, first + run.count)
      if run.count != jax.tree.leaves(stacked)[0].shape[0]:
        stacked = jax.tree.map(lambda leaf, places=places: leaf[places], stacked)

      def one(x_BTD: jax.Array, given: tuple[jax.Array, nnx.State], name: str = run.stack):
        index, numbers = given
        return layer(name, numbers, index, x_BTD, None)[0], None

      index_L = jnp.arange(first, first + run.count, dtype=jnp.int32)
      x_BTD, _ = lax.scan(one, x_BTD, (index_L, stacked))
  return x_BTD


def _numbers(stacked: nnx.State, index: jax.Array) -> nnx.State:
  """The parameters of one layer of a stack; those of experts are not taken out, few of them are read."""

  def one(leaf: Any) -> Any:
    if isinstance(leaf, TernaryArray):
      return TernaryLayer(leaf, index)
    return lax.dynamic_index_in_dim(leaf, index, keepdims=False)

  def variable(path: tuple[Any, ...], param: Any) -> Any:
    if params.is_expert(path[-1].key):
      return param.replace(StackedLayer(param.get_value(), index))
    return jax.tree.map(one, param, is_leaf=lambda leaf: isinstance(leaf, TernaryArray))

  return jax.tree_util.tree_map_with_path(
    variable, stacked, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
  )
