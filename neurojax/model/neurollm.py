"""NeuroLLM: one decoder for every family, driven by ModelConfig.

Layers are stacked on a leading axis L, so that a stage is a slice: a NeuroLLM holds a `Span` of
layers, with the embedding if the span is the first and the head if it is the last.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from neurojax.config import ModelConfig, Span
from neurojax.kernels.gemm.layer import TernaryLayer
from neurojax.model.attention import Kind, attend, attend_cache
from neurojax.model.cache import KVCache
from neurojax.model.project import Matrix, project, project_all
from neurojax.model.rope import rotate
from neurojax.ternary.array import TernaryArray

_INIT_STD = 0.02


class RMSNorm(nnx.Module):
  """x / sqrt(mean(x**2) + eps) * scale, in float32 whatever the dtype of x. arXiv:1910.07467."""

  def __init__(self, *dims: int, eps: float, dtype: DTypeLike):
    """Over as many trailing axes as there are `dims`."""
    self.eps = eps
    self.scale_D = nnx.Param(jnp.ones(dims, dtype))

  def __call__(self, x_BTD: Float[Array, "B T *D"]) -> Float[Array, "B T *D"]:
    x = x_BTD.astype(jnp.float32)
    axes = tuple(range(2, x.ndim))
    x = x * lax.rsqrt(jnp.mean(x * x, axis=axes, keepdims=True) + self.eps)
    return (x * self.scale_D[...].astype(jnp.float32)[None, None]).astype(x_BTD.dtype)


class Attention(nnx.Module):
  """Grouped-query attention with rotary positions; causal, no biases. Heads of queries and keys, and
  what all heads give together, are normalised where the configuration says so."""

  def __init__(
    self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs, attention: Kind = "einsum"
  ):
    d, n, k, h = config.model_dim, config.num_heads, config.num_kv_heads, config.head_dim
    self.rope_base, self.rope_style = config.rope_base, config.rope_style
    self.kind = attention
    self.q_DNH = _normal(rngs, (d, n, h), dtype)
    self.k_DKH = _normal(rngs, (d, k, h), dtype)
    self.v_DKH = _normal(rngs, (d, k, h), dtype)
    self.o_NHD = _normal(rngs, (n, h, d), dtype)
    self.q_norm = RMSNorm(h, eps=config.norm_eps, dtype=dtype) if config.qk_norm else None
    self.k_norm = RMSNorm(h, eps=config.norm_eps, dtype=dtype) if config.qk_norm else None
    self.sub_norm = RMSNorm(n, h, eps=config.norm_eps, dtype=dtype) if config.sub_norm else None

  def __call__(
    self,
    x_BTD: Float[Array, "B T D"],
    position_BT: Int[Array, "B T"],
    cache: KVCache | None,
    layer: Int[Array, ""],
  ) -> tuple[Float[Array, "B T D"], KVCache | None]:
    q_BTNH, k_BTKH, v_BTKH = project_all(
      x_BTD,
      ("BTD,DNH->BTNH", self.q_DNH),
      ("BTD,DKH->BTKH", self.k_DKH),
      ("BTD,DKH->BTKH", self.v_DKH),
    )
    if self.q_norm is not None and self.k_norm is not None:
      q_BTNH, k_BTKH = _each_head(self.q_norm, q_BTNH), _each_head(self.k_norm, k_BTKH)
    q_BTNH = rotate(q_BTNH, position_BT, base=self.rope_base, style=self.rope_style)
    k_BTKH = rotate(k_BTKH, position_BT, base=self.rope_base, style=self.rope_style)
    if cache is None:
      out_BTNH = attend(q_BTNH, k_BTKH, v_BTKH, kind=self.kind)
    else:
      start_B = position_BT[:, 0]
      cache = cache.write(layer, k_BTKH, v_BTKH, start_B)
      out_BTNH = attend_cache(q_BTNH, cache, layer, start_B)
    if self.sub_norm is not None:
      out_BTNH = self.sub_norm(out_BTNH)
    return project("BTNH,NHD->BTD", out_BTNH, self.o_NHD), cache


def _each_head(norm: RMSNorm, x_BTNH: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
  b, t, n, h = x_BTNH.shape
  return norm(x_BTNH.reshape(b, t * n, h)).reshape(b, t, n, h)


class SwiGLU(nnx.Module):
  """down(silu(gate(x)) * up(x)), arXiv:2002.05202, section 2; the product is normalised where the
  configuration says so."""

  def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
    d, f = config.model_dim, config.ffn_dim
    self.gate_DF = _normal(rngs, (d, f), dtype)
    self.up_DF = _normal(rngs, (d, f), dtype)
    self.down_FD = _normal(rngs, (f, d), dtype)
    self.sub_norm = RMSNorm(f, eps=config.norm_eps, dtype=dtype) if config.sub_norm else None

  def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    gate_BTF, up_BTF = project_all(
      x_BTD, ("BTD,DF->BTF", self.gate_DF), ("BTD,DF->BTF", self.up_DF)
    )
    inner_BTF = jax.nn.silu(gate_BTF) * up_BTF
    if self.sub_norm is not None:
      inner_BTF = self.sub_norm(inner_BTF)
    return project("BTF,FD->BTD", inner_BTF, self.down_FD)


class Block(nnx.Module):
  """One pre-norm layer.

  Args:
    attention: How a whole sequence attends to itself, see `attention.attend`.
  """

  def __init__(
    self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs, attention: Kind = "einsum"
  ):
    self.attn_norm = RMSNorm(config.model_dim, eps=config.norm_eps, dtype=dtype)
    self.attention = Attention(config, dtype=dtype, rngs=rngs, attention=attention)
    self.ffn_norm = RMSNorm(config.model_dim, eps=config.norm_eps, dtype=dtype)
    self.ffn = SwiGLU(config, dtype=dtype, rngs=rngs)

  def __call__(
    self,
    x_BTD: Float[Array, "B T D"],
    position_BT: Int[Array, "B T"],
    cache: KVCache | None,
    layer: Int[Array, ""],
  ) -> tuple[Float[Array, "B T D"], KVCache | None]:
    attended_BTD, cache = self.attention(self.attn_norm(x_BTD), position_BT, cache, layer)
    x_BTD = x_BTD + attended_BTD
    return x_BTD + self.ffn(self.ffn_norm(x_BTD)), cache


class NeuroLLM(nnx.Module):
  """A decoder, or the span of its layers that one stage holds.

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

    @nnx.split_rngs(splits=len(span))
    @nnx.vmap(in_axes=0, out_axes=0)
    def stacked(rngs: nnx.Rngs) -> Block:
      return Block(config, dtype=dtype, rngs=rngs)

    self.layers = stacked(rngs)
    if span.is_first or (span.is_last and config.tied_embedding):
      self.embedding_VD = _normal(rngs, (config.vocab_size, config.model_dim), dtype)
    if span.is_last:
      self.final_norm = RMSNorm(config.model_dim, eps=config.norm_eps, dtype=dtype)
      if not config.tied_embedding:
        self.head_DV = _normal(rngs, (config.model_dim, config.vocab_size), dtype)

  def __call__(
    self,
    inputs: Int[Array, "B T"] | Float[Array, "B T D"],
    *,
    cache: KVCache | None = None,
    start_B: Int[Array, "B"] | None = None,
  ) -> tuple[Float[Array, "B T X"], KVCache | None]:
    """Run the span: from token ids if it is the first, else from activations.

    Args:
      cache: Absent: one causal pass over the T given positions, from position 0.
      start_B: Position of each row's first input; needed with a cache.
    Returns: float32 logits [B, T, V] if the span is the last, else activations [B, T, D]; and the
      cache with the new positions in it.
    """
    x_BTD = self.embed(inputs) if self.span.is_first else inputs
    x_BTD, cache = self.run_layers(x_BTD, cache=cache, start_B=start_B)
    return (self.logits(x_BTD) if self.span.is_last else x_BTD), cache

  def embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    table: jax.Array | Matrix = self.embedding_VD.get_value()
    if isinstance(table, jax.Array):
      return table[tokens_BT].astype(self.dtype)
    return table.take(tokens_BT).astype(self.dtype)

  def run_layers(
    self,
    x_BTD: Float[Array, "B T D"],
    *,
    cache: KVCache | None = None,
    start_B: Int[Array, "B"] | None = None,
  ) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """The layers of the span alone, without embedding or head. Arguments as in `__call__`."""
    if (cache is None) != (start_B is None):
      raise ValueError("cache and start_B go together: give both or neither")
    if start_B is None:
      start_B = jnp.zeros(x_BTD.shape[0], jnp.int32)
    position_BT = start_B[:, None] + jnp.arange(x_BTD.shape[1], dtype=jnp.int32)[None]
    graph, stacked = nnx.split(self.layers)

    if cache is not None:

      def step(index: jax.Array, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
        params = jax.tree.map(functools.partial(_layer, index=index), stacked, is_leaf=_is_ternary)
        return nnx.merge(graph, params)(carry[0], position_BT, carry[1], index)

      # XLA dissolves a loop of one round into what surrounds it, with other roundings, and a stage of
      # one layer would not give the whole model's bits: its count is one that XLA cannot know.
      count = len(self.span) if len(self.span) > 1 else jnp.minimum(start_B[0] + 1, 1)
      return lax.fori_loop(0, count, step, (x_BTD, cache))

    def one(carry: tuple[jax.Array, KVCache | None], layer: tuple[jax.Array, nnx.State]):
      x_BTD, cache = carry
      index, params = layer
      return nnx.merge(graph, params)(x_BTD, position_BT, cache, index), None

    index_L = jnp.arange(len(self.span), dtype=jnp.int32)
    (x_BTD, cache), _ = lax.scan(one, (x_BTD, cache), (index_L, stacked))
    return x_BTD, cache

  def logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    x_BTD = self.final_norm(x_BTD)
    if self.config.tied_embedding:
      return project("BTD,VD->BTV", x_BTD, self.embedding_VD, dtype=jnp.float32)
    return project("BTD,DV->BTV", x_BTD, self.head_DV, dtype=jnp.float32)

  def new_cache(self, *, batch: int, capacity: int) -> KVCache:
    """An empty cache for the layers of this span."""
    return KVCache.zeros(
      num_layers=len(self.span),
      batch=batch,
      num_kv_heads=self.config.num_kv_heads,
      capacity=capacity,
      head_dim=self.config.head_dim,
      dtype=self.dtype,
    )

  @classmethod
  def abstract(
    cls, config: ModelConfig, *, span: Span | None = None, dtype: DTypeLike = jnp.float32
  ) -> "NeuroLLM":
    """The module with shapes in place of arrays: costs no memory."""
    return nnx.eval_shape(lambda: cls(config, span=span, dtype=dtype, rngs=nnx.Rngs(0)))


def _is_ternary(leaf: object) -> bool:
  return isinstance(leaf, TernaryArray)


def _layer(leaf: object, index: jax.Array) -> object:
  """One layer of stacked parameters; a ternary matrix is not copied out of its stack."""
  if isinstance(leaf, TernaryArray):
    return TernaryLayer(leaf, index)
  return lax.dynamic_index_in_dim(leaf, index, keepdims=False)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: DTypeLike) -> nnx.Param:
  return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(_INIT_STD, dtype))
