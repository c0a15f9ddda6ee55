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
from neurojax.kernels.rows import attend as kernel
from neurojax.model.cache import KVCache, Rows
from neurojax.model.loops import unknown_count

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
  rows: Rows,
  *,
  scores: Scores = Scores(),
  window: int | None = None,
) -> Float[Array, "B T N H"]:
  """Computes attention of T new queries of each row over the row's slot of the cache.

  Query t of row b sees the last `window` of keys 0..start_B[b]+t. Work and memory follow the positions
  in use, not the capacity of the cache, nor what lies in front of the window. Rows are computed one after
  the other, or by a kernel for single queries, so that no row's bits depend on the others. Many queries visit keys in blocks with a running
  maximum and sum. A single query reads all its keys at once: its scores are few, and a loop over blocks
  would cost more than the scores themselves. Rows without input give zeros.

  Raises: ValueError: the cache keeps too few positions for so many queries and the window.
  Source: online softmax, arXiv:1805.02867; blocks as in arXiv:2205.14135.
  """
  batch, length, num_heads, head_dim = q_BTNH.shape
  if cache.is_ring and (window is None or window + length > cache.capacity):
    raise ValueError(
      f"{length} inputs at once and a window of {window}: the cache keeps {cache.capacity}"
      f" positions: give at most {PREFILL} inputs at a time"
    )
  q_BTKGH = _scaled_groups(q_BTNH, cache.k_LPKSH.shape[2], scores)
  if length == 1 and cache.k_scale_LPKS is None and not kernel.why_not(gemm.default_platform()):
    position_B = rows.start_B if rows.live_B is None else jnp.where(rows.live_B, rows.start_B, -1)
    out_BNH = kernel.attend(
      q_BTKGH.reshape(batch, num_heads, head_dim), cache.k_LPKSH, cache.v_LPKSH, layer, position_B,
      slot_B=rows.slots, softcap=scores.softcap, window=window,
    )  # fmt: skip
    return out_BNH[:, None].astype(q_BTNH.dtype)
  one = _attend_one if length == 1 else _attend_blocks
  slot_B = rows.slots

  def row(b: jax.Array | int, out_BTNH: jax.Array) -> jax.Array:
    q_TKGH = lax.dynamic_index_in_dim(q_BTKGH, b, keepdims=False)
    out_TKGH = one(q_TKGH, cache, layer, slot_B[b], rows.start_B[b], scores, window)
    out_TNH = out_TKGH.reshape(length, num_heads, head_dim).astype(out_BTNH.dtype)
    return lax.dynamic_update_index_in_dim(out_BTNH, out_TNH, b, 0)

  # A count that XLA knows to be 1 would change how it rounds.
  count = (
    unknown_count(batch, jnp.maximum(rows.start_B[0], 0))
    if rows.live_B is None
    else jnp.sum(rows.live_B.astype(jnp.int32))
  )
  return lax.fori_loop(0, count, row, jnp.zeros_like(q_BTNH))


def _attend_blocks(
  q_TKGH: Float[Array, "T K G H"],
  cache: KVCache,
  layer: Int[Array, ""],
  slot: Int[Array, ""],
  start: Int[Array, ""],
  scores: Scores,
  window: int | None,
) -> Float[Array, "T K G H"]:
  """Computes `attend_cache` of several queries of one row, over blocks of keys."""
  length, num_kv_heads, group, head_dim = q_TKGH.shape
  q_KGTH = q_TKGH.transpose(1, 2, 0, 3)
  last_T = start + jnp.arange(length, dtype=start.dtype)

  def block(i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]):
    top_KGT, total_KGT, sum_KGTH = state
    place = i * KEY_BLOCK
    place = place % cache.capacity if cache.is_ring else place
    k_KSH, v_KSH = cache.read(layer, slot, place, KEY_BLOCK)
    score_KGTS = _capped(_dot("KGTH,KSH->KGTS", q_KGTH, k_KSH), scores)
    key_S = i * KEY_BLOCK + jnp.arange(KEY_BLOCK, dtype=start.dtype)
    seen_TS = key_S[None] <= last_T[:, None]
    if window is not None:
      seen_TS &= key_S[None] > last_T[:, None] - window
    score_KGTS = jnp.where(seen_TS[None, None], score_KGTS, _MASKED)
    new_top_KGT = jnp.maximum(top_KGT, score_KGTS.max(axis=-1))
    weight_KGTS = jnp.exp(score_KGTS - new_top_KGT[..., None])
    shrink_KGT = jnp.exp(top_KGT - new_top_KGT)
    total_KGT = total_KGT * shrink_KGT + weight_KGTS.sum(axis=-1)
    new_KGTH = _dot("KGTS,KSH->KGTH", weight_KGTS.astype(v_KSH.dtype), v_KSH)
    return new_top_KGT, total_KGT, sum_KGTH * shrink_KGT[..., None] + new_KGTH

  shape = (num_kv_heads, group, length)
  blocks = (start + length + KEY_BLOCK - 1) // KEY_BLOCK
  state = (jnp.full(shape, _MASKED), jnp.zeros(shape), jnp.zeros((*shape, head_dim)))
  first = 0 if window is None else jnp.maximum(start - window + 1, 0) // KEY_BLOCK
  _, total_KGT, sum_KGTH = lax.fori_loop(first, blocks, block, state)
  return (sum_KGTH / total_KGT[..., None]).transpose(2, 0, 1, 3)


def _attend_one(
  q_1KGH: Float[Array, "1 K G H"],
  cache: KVCache,
  layer: Int[Array, ""],
  slot: Int[Array, ""],
  start: Int[Array, ""],
  scores: Scores,
  window: int | None,
) -> Float[Array, "1 K G H"]:
  """Computes `attend_cache` of one query, over the least sufficient power of two of keys."""
  q_KGH = q_1KGH[0]
  # The first key that the query sees.
  first = None if window is None else jnp.maximum(start - window + 1, 0)

  def over(count: int) -> jax.Array:
    # Not beyond the end: XLA would move the slice back there, and the positions would stay.
    begin = 0 if first is None else jnp.minimum(first, cache.capacity - count)
    k_KSH, v_KSH = cache.read(layer, slot, begin, count)
    # Keys first: XLA:CPU copies the operand on the right into another layout.
    score_KGS = _capped(_dot("KSH,KGH->KSG", k_KSH, q_KGH).swapaxes(1, 2), scores)
    key_S = jnp.arange(count, dtype=start.dtype)
    if window is None:
      seen_S = key_S <= start
    else:
      key_S = key_S + begin
      if count == cache.capacity:
        # After positions have gone round, each place holds the last position not beyond the query.
        key_S = start - (start - jnp.arange(count, dtype=start.dtype)) % cache.capacity
      seen_S = (key_S >= 0) & (key_S <= start) & (key_S > start - window)
    score_KGS = jnp.where(seen_S[None, None], score_KGS, _MASKED)
    weight_KGS = jnp.exp(score_KGS - score_KGS.max(axis=-1, keepdims=True))
    sum_KGH = _dot("KGS,KSH->KGH", weight_KGS.astype(v_KSH.dtype), v_KSH)
    return sum_KGH / weight_KGS.sum(axis=-1)[..., None]

  counts = [min(_FEWEST_KEYS, cache.capacity)]
  while counts[-1] < cache.capacity:
    counts.append(min(2 * counts[-1], cache.capacity))
  last = start if first is None else start - first
  if cache.is_ring:
    last = jnp.where(start < cache.capacity, last, cache.capacity - 1)
  enough = jnp.sum(jnp.array(counts, start.dtype) <= last)
  return lax.switch(enough, [functools.partial(over, count) for count in counts])[None]


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
