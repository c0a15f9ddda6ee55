"""One layer: attention or a convolution, then a feed-forward network, each added to its input."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from neurojax.config import LayerKind, ModelConfig
from neurojax.model.attention import AttentionKind, Scores, attend, attend_cache
from neurojax.model.cache import KVCache, LayerCache, Rows
from neurojax.model.convolution import Convolution
from neurojax.model.ffn import FFN, Experts
from neurojax.model.initial import normal, zeros
from neurojax.model.norm import RMSNorm, normalised
from neurojax.model.project import project, project_all
from neurojax.model.rope import frequencies, rotate


class Attention(nnx.Module):
  """Grouped-query attention with rotary positions, causal.

  Args:
    kinds: Kinds of the layers that have this shape; with several, a call says `which`.
    attention: The computation of attention over a whole sequence, see `attention.attend`.
  """

  def __init__(
    self,
    config: ModelConfig,
    *,
    kinds: tuple[LayerKind, ...],
    dtype: DTypeLike,
    rngs: nnx.Rngs,
    attention: AttentionKind = "einsum",
  ):
    d, n, eps = config.model_dim, config.num_heads, config.norm_eps
    h, k, has_values = kinds[0].head_dim, kinds[0].num_kv_heads, not kinds[0].shared_kv
    assert h is not None and k is not None
    self.kind, self.kinds, self.rope_style = attention, kinds, config.rope_style
    self.scores = Scores(config.attention_scale, config.attention_softcap)
    self.v_norm_eps = eps if config.v_norm else None
    self.q_DNH = normal(rngs, (d, n, h), dtype)
    self.k_DKH = normal(rngs, (d, k, h), dtype)
    self.v_DKH = normal(rngs, (d, k, h), dtype) if has_values else None
    self.o_NHD = normal(rngs, (n, h, d), dtype)
    self.q_bias_NH = zeros((n, h), dtype) if config.qkv_bias else None
    self.k_bias_KH = zeros((k, h), dtype) if config.qkv_bias else None
    self.v_bias_KH = zeros((k, h), dtype) if config.qkv_bias and has_values else None
    self.q_norm = RMSNorm(h, eps=eps, dtype=dtype) if config.qk_norm else None
    self.k_norm = RMSNorm(h, eps=eps, dtype=dtype) if config.qk_norm else None
    self.sub_norm = RMSNorm(n, h, eps=eps, dtype=dtype) if config.sub_norm else None

  def __call__(
    self,
    x_BTD: Float[Array, "B T D"],
    position_BT: Int[Array, "B T"],
    cache: KVCache | None,
    layer: Int[Array, ""],
    rows: Rows,
    which: Int[Array, ""] | None = None,
  ) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """Runs over T positions; arguments as in `Block`."""
    products = [("BTD,DNH->BTNH", self.q_DNH), ("BTD,DKH->BTKH", self.k_DKH)]
    if self.v_DKH is not None:
      products.append(("BTD,DKH->BTKH", self.v_DKH))
    q_BTNH, k_BTKH, *values = project_all(x_BTD, *products)
    q_BTNH, k_BTKH = _biased(q_BTNH, self.q_bias_NH), _biased(k_BTKH, self.k_bias_KH)
    v_BTKH = _biased(values[0], self.v_bias_KH) if values else k_BTKH
    if self.q_norm is not None and self.k_norm is not None:
      q_BTNH, k_BTKH = _each_head(self.q_norm, q_BTNH), _each_head(self.k_norm, k_BTKH)
    if self.v_norm_eps is not None:
      v_BTKH = normalised(v_BTKH, self.v_norm_eps)
    frequency, factor, window = self._positions(which)
    q_BTNH = rotate(q_BTNH, position_BT, frequency, style=self.rope_style, factor=factor)
    k_BTKH = rotate(k_BTKH, position_BT, frequency, style=self.rope_style, factor=factor)
    if cache is None:
      out_BTNH = attend(q_BTNH, k_BTKH, v_BTKH, kind=self.kind, scores=self.scores, window=window)
    else:
      cache = cache.write(layer, k_BTKH, v_BTKH, rows)
      out_BTNH = attend_cache(q_BTNH, cache, layer, rows, scores=self.scores, window=window)
    if self.sub_norm is not None:
      out_BTNH = self.sub_norm(out_BTNH)
    return project("BTNH,NHD->BTD", out_BTNH, self.o_NHD), cache

  def _positions(
    self, which: Int[Array, ""] | None
  ) -> tuple[Array | np.ndarray, Array | float, int | None]:
    """Frequencies of the rotation, their factor, and the window.

    All three are constants where the layers are of one kind; else the first two are looked up.
    """
    tables = [frequencies(k.head_dim, k.rope_base, k.rope_scaling) for k in self.kinds]
    window = self.kinds[0].sliding_window
    if len(self.kinds) == 1:
      return *tables[0], window
    assert which is not None
    frequency = jnp.asarray(np.stack([frequency for frequency, _ in tables]), jnp.float32)[which]
    factors = [factor for _, factor in tables]
    factor = factors[0] if len(set(factors)) == 1 else jnp.asarray(factors, jnp.float32)[which]
    return frequency, factor, window


class Block(nnx.Module):
  """One pre-norm layer.

  Args:
    kinds: Kinds of the layers that have this shape; absent: those of a model whose layers all have it.
    attention: The computation of attention over a whole sequence, see `attention.attend`.
  """

  def __init__(
    self,
    config: ModelConfig,
    *,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
    kinds: tuple[LayerKind, ...] | None = None,
    attention: AttentionKind = "einsum",
  ):
    d, eps, kinds = config.model_dim, config.norm_eps, kinds or config.kinds
    is_conv = kinds[0].mixer == "convolution"
    self.attn_norm = RMSNorm(d, eps=eps, dtype=dtype)
    self.convolution = Convolution(config, dtype=dtype, rngs=rngs) if is_conv else None
    self.attention = (
      None
      if is_conv
      else Attention(config, kinds=kinds, dtype=dtype, rngs=rngs, attention=attention)
    )
    self.ffn_norm = RMSNorm(d, eps=eps, dtype=dtype)
    self.ffn = (Experts if config.num_experts else FFN)(config, dtype=dtype, rngs=rngs)
    self.attn_post_norm = RMSNorm(d, eps=eps, dtype=dtype) if config.post_norm else None
    self.ffn_post_norm = RMSNorm(d, eps=eps, dtype=dtype) if config.post_norm else None
    self.scale_1 = nnx.Param(jnp.ones(1, dtype)) if config.layer_scale else None

  def __call__(
    self,
    x_BTD: Float[Array, "B T D"],
    position_BT: Int[Array, "B T"],
    cache: LayerCache | None,
    layer: Int[Array, ""],
    rows: Rows,
    *,
    which: Int[Array, ""] | None = None,
  ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
    """Runs over T positions.

    Args:
      cache: Cache of all layers of this shape.
      layer: Index of this layer among them.
      rows: Where the rows lie in the cache.
      which: Index of this layer's kind in `kinds`, if there are several.
    """
    normed_BTD = self.attn_norm(x_BTD)
    if self.convolution is not None:
      mixed_BTD, cache = self.convolution(normed_BTD, cache, layer, rows)
    else:
      assert self.attention is not None
      mixed_BTD, cache = self.attention(normed_BTD, position_BT, cache, layer, rows, which)
    if self.attn_post_norm is not None:
      mixed_BTD = self.attn_post_norm(mixed_BTD)
    x_BTD = x_BTD + mixed_BTD
    out_BTD = self.ffn(self.ffn_norm(x_BTD))
    if self.ffn_post_norm is not None:
      out_BTD = self.ffn_post_norm(out_BTD)
    x_BTD = x_BTD + out_BTD
    if self.scale_1 is not None:
      x_BTD = x_BTD * self.scale_1[...].astype(x_BTD.dtype)[None, None]
    return x_BTD, cache


def _biased(x_BTNH: jax.Array, bias_NH: nnx.Param | None) -> jax.Array:
  return x_BTNH if bias_NH is None else x_BTNH + bias_NH[...].astype(x_BTNH.dtype)[None, None]


def _each_head(norm: RMSNorm, x_BTNH: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
  b, t, n, h = x_BTNH.shape
  return norm(x_BTNH.reshape(b, t * n, h)).reshape(b, t, n, h)
