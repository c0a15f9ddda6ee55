"""Grouped-query attention (arXiv:2305.13245) over a whole sequence or over the cache."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from neurojax.forms import KEY_BLOCK, PREFILL
from neurojax.kernels.gemm import api as gemm
from neurojax.kernels.rows import attend as rows
from neurojax.model.cache import KVCache

_MASKED = -1e30
"""Score of masked keys: below any other, yet finite, so that a row of masked keys gives no NaN."""

_FEWEST_KEYS = 64
"""The fewest keys that a single query reads; longer caches are read by powers of two of it."""


AttentionKind = Literal["einsum", "cudnn"]
"""The computation of attention over a whole sequence, see `attend`."""


@dataclasses.dataclass(frozen=True)
class Scores:
  """Settings of the scores of queries and keys.

  Attributes:
    scale: Factor of the scores; None: head_dim**-0.5.
    softcap: Bound that tanh bends the scores below; None: no bound.
  """

  scale: float | None = None
  softcap: float | None = None


def attend(
  q_BTNH: Float[Array, "B T N H"],
  k_BTKH: Float[Array, "B T K H"],
  v_BTKH: Float[Array, "B T K H"],
  *,
  kind: AttentionKind = "einsum",
  scores: Scores = Scores(),
  window: int | None = None,
) -> Float[Array, "B T N H"]:
  """Computes causal attention within one sequence: query t sees keys 0..t. Differentiable.

  Softmax in float32. Query head n uses key-value head n // G.

  Args:
    kind: "einsum" keeps the scores of all T x T pairs and runs anywhere; "cudnn" keeps none
      (FlashAttention, arXiv:2307.08691), on a CUDA GPU in bfloat16 or float16.
    window: Number of keys that a query sees at most, the last ones; None: all.
  Raises:
    NotImplementedError: cuDNN is asked for a soft cap, which it does not have.
    RuntimeError or ValueError, from JAX: cuDNN does not support this device, dtype or shape.
  """
  if kind == "cudnn":
    if scores.softcap is not None:
      raise NotImplementedError("attention 'cudnn' has no soft cap of scores: choose 'einsum'")
    local = {} if window is None else {"local_window_size": (window - 1, 0)}
    return jax.nn.dot_product_attention(
      q_BTNH, k_BTKH, v_BTKH, is_causal=True, scale=scores.scale, implementation="cudnn", **local
    )
  num_kv_heads = k_BTKH.shape[2]
  q_BTKGH = _scaled_groups(q_BTNH, num_kv_heads, scores)
  score_BKGTS = _capped(_dot("BTKGH,BSKH->BKGTS", q_BTKGH, k_BTKH), scores)
  position_T = jnp.arange(q_BTNH.shape[1])
  causal_TS = position_T[:, None] >= position_T[None, :]
  if window is not None:
    causal_TS &= position_T[None, :] > position_T[:, None] - window
  score_BKGTS = jnp.where(causal_TS[None, None, None], score_BKGTS, _MASKED)
  weight_BKGTS = jax.nn.softmax(score_BKGTS, axis=-1).astype(v_BTKH.dtype)
  out_BTKGH = _dot("BKGTS,BSKH->BTKGH", weight_BKGTS, v_BTKH)
  return out_BTKGH.reshape(q_BTNH.shape).astype(q_BTNH.dtype)


def attend_cache(
  q_BTNH: Float[Array, "B T N H"],
  cache: KVCache,
  layer: Int[Array, ""],
  start_B: Int[Array, "B"],
  *,
  scores: Scores = Scores(),
  window: int | None = None,
) -> Float[Array, "B T N H"]:
  """Computes attention of T new queries over the cache.

  Query t of row b sees the last `window` of keys 0..start_B[b]+t. Work and memory follow the positions
  in use, not the capacity of the cache, nor what lies in front of the window. Many queries visit keys in
  blocks with a running maximum and sum. A single query reads all its keys at once: its scores are few,
  and a loop over blocks would cost more than the scores themselves.

  Raises: ValueError: the cache keeps too few positions for so many queries and the window.
  Source: online softmax, arXiv:1805.02867; blocks as in arXiv:2205.14135.
  """
  if cache.is_ring and (window is None or window + q_BTNH.shape[1] > cache.capacity):
    raise ValueError(
      f"{q_BTNH.shape[1]} inputs at once and a window of {window}: the cache keeps {cache.capacity}"
      f" positions: give at most {PREFILL} inputs at a time"
    )
  if q_BTNH.shape[1] == 1:
    return _attend_one(q_BTNH, cache, layer, start_B, scores, window)
  batch, length, num_heads, head_dim = q_BTNH.shape
  num_kv_heads = cache.k_LBKSH.shape[2]
  q_BTKGH = _scaled_groups(q_BTNH, num_kv_heads, scores)
  q_BKGTH = q_BTKGH.transpose(0, 2, 3, 1, 4)
  last_BT = start_B[:, None] + jnp.arange(length, dtype=start_B.dtype)[None]

  def block(i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]):
    top_BKGT, total_BKGT, sum_BKGTH = state
    place = i * KEY_BLOCK
    at = (layer, 0, 0, place % cache.capacity if cache.is_ring else place, 0)
    size = (1, batch, num_kv_heads, KEY_BLOCK, head_dim)
    k_BKSH = lax.dynamic_slice(cache.k_LBKSH, at, size)[0]
    v_BKSH = lax.dynamic_slice(cache.v_LBKSH, at, size)[0]
    score_BKGTS = _capped(_dot("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH), scores)
    key_S = i * KEY_BLOCK + jnp.arange(KEY_BLOCK, dtype=start_B.dtype)
    seen_BTS = key_S[None, None, :] <= last_BT[:, :, None]
    if window is not None:
      seen_BTS &= key_S[None, None, :] > last_BT[:, :, None] - window
    score_BKGTS = jnp.where(seen_BTS[:, None, None], score_BKGTS, _MASKED)
    new_top_BKGT = jnp.maximum(top_BKGT, score_BKGTS.max(axis=-1))
    weight_BKGTS = jnp.exp(score_BKGTS - new_top_BKGT[..., None])
    shrink_BKGT = jnp.exp(top_BKGT - new_top_BKGT)
    total_BKGT = total_BKGT * shrink_BKGT + weight_BKGTS.sum(axis=-1)
    new_BKGTH = _dot("BKGTS,BKSH->BKGTH", weight_BKGTS.astype(v_BKSH.dtype), v_BKSH)
    return new_top_BKGT, total_BKGT, sum_BKGTH * shrink_BKGT[..., None] + new_BKGTH

  shape = (batch, num_kv_heads, num_heads // num_kv_heads, length)
  blocks = (start_B.max() + length + KEY_BLOCK - 1) // KEY_BLOCK
  state = (jnp.full(shape, _MASKED), jnp.zeros(shape), jnp.zeros((*shape, head_dim)))
  first = 0 if window is None else jnp.maximum(start_B.min() - window + 1, 0) // KEY_BLOCK
  _, total_BKGT, sum_BKGTH = lax.fori_loop(first, blocks, block, state)
  out_BKGTH = sum_BKGTH / total_BKGT[..., None]
  return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape).astype(q_BTNH.dtype)


def _attend_one(
  q_B1NH: Float[Array, "B 1 N H"],
  cache: KVCache,
  layer: Int[Array, ""],
  start_B: Int[Array, "B"],
  scores: Scores,
  window: int | None,
) -> Float[Array, "B 1 N H"]:
  """Computes `attend_cache` of one query: by a kernel, or over the least sufficient power of two of keys."""
  batch, _, _, head_dim = q_B1NH.shape
  num_kv_heads = cache.k_LBKSH.shape[2]
  q_BKGH = _scaled_groups(q_B1NH, num_kv_heads, scores)[:, 0]
  if rows.why_not(gemm.default_platform()) is None:
    out_BNH = rows.attend(
      q_BKGH.reshape(batch, -1, head_dim), cache.k_LBKSH, cache.v_LBKSH, layer, start_B,
      softcap=scores.softcap, window=window,
    )  # fmt: skip
    return out_BNH[:, None].astype(q_B1NH.dtype)
  # The first key that some row sees.
  first = None if window is None else jnp.maximum(start_B.min() - window + 1, 0)

  def over(count: int) -> jax.Array:
    # Not beyond the end: XLA would move the slice back there, and the positions would stay.
    begin = 0 if first is None else jnp.minimum(first, cache.capacity - count)
    at, size = (layer, 0, 0, begin, 0), (1, batch, num_kv_heads, count, head_dim)
    k_BKSH = lax.dynamic_slice(cache.k_LBKSH, at, size)[0]
    v_BKSH = lax.dynamic_slice(cache.v_LBKSH, at, size)[0]
    # Keys first: XLA:CPU copies the operand on the right into another layout.
    score_BKGS = _capped(_dot("BKSH,BKGH->BKSG", k_BKSH, q_BKGH).swapaxes(2, 3), scores)
    key_S = jnp.arange(count, dtype=start_B.dtype)
    if window is None:
      seen_BS = key_S[None] <= start_B[:, None]
    else:
      key_BS = jnp.broadcast_to(key_S + begin, (batch, count))
      if count == cache.capacity:
        # After positions have gone round, each place holds the last position not beyond the query.
        key_BS = start_B[:, None] - (start_B[:, None] - key_S[None]) % cache.capacity
      seen_BS = (key_BS >= 0) & (key_BS <= start_B[:, None])
      seen_BS &= key_BS > start_B[:, None] - window
    score_BKGS = jnp.where(seen_BS[:, None, None], score_BKGS, _MASKED)
    weight_BKGS = jnp.exp(score_BKGS - score_BKGS.max(axis=-1, keepdims=True))
    sum_BKGH = _dot("BKGS,BKSH->BKGH", weight_BKGS.astype(v_BKSH.dtype), v_BKSH)
    return sum_BKGH / weight_BKGS.sum(axis=-1)[..., None]

  counts = [min(_FEWEST_KEYS, cache.capacity)]
  while counts[-1] < cache.capacity:
    counts.append(min(2 * counts[-1], cache.capacity))
  last = start_B.max() if first is None else start_B.max() - first
  if cache.is_ring:
    last = jnp.where(start_B.max() < cache.capacity, last, cache.capacity - 1)
  enough = jnp.sum(jnp.array(counts, start_B.dtype) <= last)
  out_BKGH = lax.switch(enough, [functools.partial(over, count) for count in counts])
  return out_BKGH.reshape(q_B1NH.shape).astype(q_B1NH.dtype)


def _scaled_groups(q_BTNH: jax.Array, num_kv_heads: int, scores: Scores) -> jax.Array:
  batch, length, num_heads, head_dim = q_BTNH.shape
  scale = head_dim**-0.5 if scores.scale is None else scores.scale
  if scale != 1:
    q_BTNH = q_BTNH * jnp.asarray(scale, q_BTNH.dtype)
  return q_BTNH.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)


def _capped(score: jax.Array, scores: Scores) -> jax.Array:
  return score if scores.softcap is None else softcap(score, scores.softcap)


def softcap(x: jax.Array, cap: float) -> jax.Array:
  """Bounds x smoothly by +-cap; small x stay as they are. Gemma 2, arXiv:2408.00118, section 2.2."""
  return cap * jnp.tanh(x / cap)


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(spec, a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
