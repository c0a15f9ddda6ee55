"""NeuroLLM: one decoder for every family, driven by ModelConfig.

Layers of one shape are stacked on a leading axis L, so that a stage is a slice: a NeuroLLM holds a
`Span` of layers, with the embedding if the span is the first and the head if it is the last.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from neurojax.config import ModelConfig, Span
from neurojax.model import ends, params
from neurojax.model.attention import AttentionKind
from neurojax.model.block import Block
from neurojax.model.cache import Cache, ConvState, KVCache, LayerCache, Rows
from neurojax.model.initial import normal
from neurojax.model.loops import ScanBody, loop_runs, scan_runs, unknown_count
from neurojax.model.norm import RMSNorm
from neurojax.model.order import rounds
from neurojax.weights import matrix
from neurojax.weights.matrix import InPlace, StackedLayer


class NeuroLLM(nnx.Module):
  """A decoder, or the span of its layers that one stage holds.

  Its layers are in `layers`, or in `layers_0`, `layers_1` and so on where not all have one shape: see
  `params.stacks`.

  Args:
    span: The layers; all of them if absent.
    dtype: Dtype of parameters, activations and cache; norms, softmax and logits are float32 inside.
    attention: The computation of attention over a whole sequence, see `attention.attend`.
  Raises: ValueError: the span is of another model, or JAX is set to 64-bit numbers.
  """

  def __init__(
    self,
    config: ModelConfig,
    *,
    span: Span | None = None,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
    attention: AttentionKind = "einsum",
  ):
    if jax.config.jax_enable_x64:
      raise ValueError(
        "jax_enable_x64 is set, and neurojax computes in 32 bits: put "
        "jax.config.update('jax_enable_x64', False) before it"
      )
    span = span or Span.whole(config)
    if span.num_layers != config.num_layers:
      raise ValueError(f"span {span} does not belong to a model of {config.num_layers} layers")
    self.config, self.span, self.dtype = config, span, jnp.dtype(dtype)
    for stack in self.stacks.values():
      setattr(self, stack.name, _stacked(config, stack, dtype, rngs, attention))
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
    slot_B: Int[Array, "B"] | None = None,
  ) -> tuple[Float[Array, "B T X"], Cache | None]:
    """Runs the span: from token ids if it is the first, else from activations.

    Args:
      cache: None: one causal pass over the T given positions, from position 0.
      start_B: Position of each row's first input; needed with a cache.
      count_B: Number of inputs of each row that are no padding; what padding leaves in the cache is never
        read. None: all.
      slot_B: Slot of each row in the cache; None: row b lies in slot b.
    Returns: float32 logits [B, T, V] if the span is the last, else activations [B, T, D]; and the
      cache with the new positions in it.
    """
    if (cache is None) != (start_B is None):
      raise ValueError("cache and start_B go together: give both or neither")
    x_BTD = self.embed(inputs) if self.span.is_first else inputs
    rows = None if start_B is None else Rows(start_B, count_B, slot_B)
    x_BTD, cache = self.run_layers(x_BTD, cache=cache, rows=rows)
    if not self.span.is_last:
      return x_BTD, cache
    return self.logits(x_BTD, in_place=cache is not None), cache

  def embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Looks up the embedding of each token."""
    table, scale = self.embedding_VD.get_value(), self.config.embedding_scale
    return ends.embed(table, tokens_BT, dtype=self.dtype, scale=scale)

  def run_layers(
    self,
    x_BTD: Float[Array, "B T D"],
    *,
    cache: Cache | None = None,
    rows: Rows | None = None,
    around: Callable[[ScanBody], ScanBody] | None = None,
    unroll: int = 1,
  ) -> tuple[Float[Array, "B T D"], Cache | None]:
    """Runs the layers of the span alone, without embedding or head.

    Args:
      cache: As in `__call__`.
      rows: Where the rows lie in the cache; needed with one.
      around: Changes the function of a layer, without a cache: training gathers what is sharded and
        keeps less for the backward pass.
      unroll: Layers that the compiler sees one after the other, without a cache.
    """
    rows = rows or Rows(jnp.zeros(x_BTD.shape[0], jnp.int32))
    start_B = rows.start_B
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
      return block(x_BTD, position_BT, cache, index, rows, which=which)

    if cache is None:
      states = {name: state for name, (_, state) in split.items()}

      def scanned(name: str) -> ScanBody:
        def one(x_BTD: jax.Array, given: tuple[jax.Array, nnx.State]) -> tuple[jax.Array, None]:
          index, numbers = given
          return layer(name, numbers, index, x_BTD, None)[0], None

        return one if around is None else around(one)

      for each in rounds(self.config, self.span):
        x_BTD = scan_runs(each, scanned, states, x_BTD, unroll=unroll)
      return x_BTD, None

    def looped(name: str) -> Any:
      return lambda index, carry: layer(name, _numbers(split[name][1], index), index, *carry)

    if "layers" in stacks:
      count = len(self.span) if len(self.span) > 1 else unknown_count(1, start_B[0])
      return lax.fori_loop(0, count, looped("layers"), (x_BTD, cache))
    caches = dict(cache)
    for each in rounds(self.config, self.span):
      x_BTD, caches = loop_runs(each, looped, start_B[0], x_BTD, caches)
    return x_BTD, caches

  def logits(
    self, x_BTD: Float[Array, "B T D"], *, in_place: bool = False
  ) -> Float[Array, "B T V"]:
    """Float32 logits of what the last layer gave.

    Args:
      in_place: The head may be multiplied by a kernel, whose bits do not depend on the number of rows but
        which has no derivative.
    """
    weight = getattr(self, ends.head_name(self.config)).get_value()
    if in_place and matrix.reads_in_place(weight):
      weight = InPlace(weight)
    return ends.head(self.normed(x_BTD), weight, self.config)

  def normed(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Normalises what the last layer gave."""
    return ends.final_norm(x_BTD, self.final_norm.scale_D[...], self.final_norm.eps)

  def new_cache(self, *, batch: int, capacity: int) -> Cache:
    """Makes an empty cache of `batch` slots for the layers of this span."""
    return empty_cache(self.config, self.span, slots=batch, capacity=capacity, dtype=self.dtype)

  @classmethod
  def abstract(
    cls,
    config: ModelConfig,
    *,
    span: Span | None = None,
    dtype: DTypeLike = jnp.float32,
    attention: AttentionKind = "einsum",
  ) -> "NeuroLLM":
    """Makes the module with shapes in place of arrays, which costs no memory."""
    return nnx.eval_shape(
      lambda: cls(config, span=span, dtype=dtype, rngs=nnx.Rngs(0), attention=attention)
    )


def empty_cache(
  config: ModelConfig, span: Span, *, slots: int, capacity: int, dtype: DTypeLike
) -> Cache:
  """Makes an empty cache of so many slots for a span of layers.

  Args:
    dtype: int8 rounds keys and values (`KVCache`); the state of convolutions is float32 then.
  Raises: ValueError: the capacity is no multiple of KEY_BLOCK.
  """
  caches = {
    stack.name: _empty(config, stack, slots, capacity, dtype)
    for stack in params.stacks(config, span)
  }
  return caches.get("layers", caches)


def _stacked(
  config: ModelConfig,
  stack: params.Stack,
  dtype: DTypeLike,
  rngs: nnx.Rngs,
  attention: AttentionKind,
) -> Block:
  @nnx.split_rngs(splits=len(stack.layers))
  @nnx.vmap(in_axes=0, out_axes=0)
  def made(rngs: nnx.Rngs) -> Block:
    return Block(config, kinds=stack.kinds, dtype=dtype, rngs=rngs, attention=attention)

  return made(rngs)


def _empty(
  config: ModelConfig, stack: params.Stack, slots: int, capacity: int, dtype: DTypeLike
) -> LayerCache:
  if stack.kind.mixer == "convolution":
    return ConvState.zeros(
      num_layers=len(stack.layers),
      slots=slots,
      width=config.conv_width,
      channels=config.model_dim,
      dtype=jnp.float32 if jnp.dtype(dtype) == jnp.int8 else dtype,
    )
  assert stack.kind.num_kv_heads is not None and stack.kind.head_dim is not None
  return KVCache.zeros(
    num_layers=len(stack.layers),
    slots=slots,
    num_kv_heads=stack.kind.num_kv_heads,
    capacity=capacity,
    head_dim=stack.kind.head_dim,
    dtype=dtype,
    window=stack.kind.sliding_window,
  )


def _numbers(stacked: nnx.State, index: jax.Array) -> nnx.State:
  """The parameters of one layer of a stack; experts stay in the stack, as few of them are read."""

  def one(path: tuple[Any, ...], param: nnx.Variable) -> nnx.Variable:
    value = param.get_value()
    name = path[-1].key
    if params.is_expert(name):
      return param.replace(StackedLayer(value, index))
    if params.is_multiplied(name):
      return param.replace(matrix.in_place(value, index))
    return param.replace(matrix.layer(value, index))

  return jax.tree_util.tree_map_with_path(
    one, stacked, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
  )
