"""Computes attention over the cache on a GPU, in Pallas kernels for Triton.

The cache arrives whole, with the number of a layer: kernels index it, nothing is sliced or copied.
Scores, softmax and sums are float32; factors of products have the dtype of the cache.

Decode cuts the keys of each sequence and key-value head into runs, one program each, and a second
kernel merges their averages. The length of a run follows the sequence's own length, so that time
follows lengths and not the capacity of the cache.
Sources: FlashAttention-2, arXiv:2307.08691; flash-decoding, pytorch.org/blog/flash-decoding.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from neurojax.config import RopeStyle
from neurojax.kernels import gpus, rounding
from neurojax.kernels.attention.reference import MASKED, partner
from neurojax.kernels.attention.tuned import LEAST_ROWS, Tiling, decode_tiling, prefill_tiling
from neurojax.kernels.gemm.levels import Levels, Order, count_of


def decode(
  qkv_BX: Float[Array, "B X"],
  k_LPKSH: Float[Array, "L P K S H"],
  v_LPKSH: Float[Array, "L P K S H"],
  layer: Int[Array, ""] | int,
  position_B: Int[Array, "B"],
  *,
  slot_B: Int[Array, "B"] | None = None,
  rotation_B2H: Float[Array, "B 2 H"] | None = None,
  rope_style: RopeStyle = "half",
  norms: tuple[Float[Array, "*L H"], Float[Array, "*L H"]] | None = None,
  norm_eps: float = 1e-6,
  order: Order | None = None,
  tiling: Tiling | None = None,
  interpret: bool = False,
) -> tuple[Float[Array, "B Y"] | Levels, Float[Array, "L P K S H"], Float[Array, "L P K S H"]]:
  """Attend for one new token of each sequence, see `api.decode`; two kernels.

  Args:
    norms: Scales of one layer as there, or of all layers [L, H].
    order: Round the result to int8 in this order, in the kernel that merges runs.
  Raises: NotImplementedError: a shape, dtype or version that these kernels do not take.
  """
  batch, num_kv_heads, width = qkv_BX.shape[0], k_LPKSH.shape[2], k_LPKSH.shape[4]
  x_BMH = qkv_BX.reshape(batch, -1, width)
  _check(x_BMH.shape[1] - 2 * num_kv_heads, k_LPKSH, tiling, interpret)
  out, k_LPKSH, v_LPKSH = _split_and_merge(
    x_BMH,
    (k_LPKSH, v_LPKSH),
    _as_array(layer),
    position_B,
    slot_B,
    rotation_B2H,
    norms or (None, None),
    fused=True,
    rope_style=rope_style,
    norm_eps=norm_eps,
    order=order,
    tiling=tiling,
    interpret=interpret,
  )
  return out if order else out.reshape(batch, -1), k_LPKSH, v_LPKSH


def attend_one(
  q_BNH: Float[Array, "B N H"],
  k_LPKSH: Float[Array, "L P K S H"],
  v_LPKSH: Float[Array, "L P K S H"],
  layer: Int[Array, ""] | int,
  length_B: Int[Array, "B"],
  *,
  slot_B: Int[Array, "B"] | None = None,
  tiling: Tiling | None = None,
  interpret: bool = False,
) -> Float[Array, "B N H"]:
  """Attend with one query per row over keys 0..length_B[b]-1; zeros where there is none.

  Raises: NotImplementedError: a shape, dtype or version that these kernels do not take.
  """
  _check(q_BNH.shape[1], k_LPKSH, tiling, interpret)
  [out_BNH] = _split_and_merge(
    q_BNH,
    (k_LPKSH, v_LPKSH),
    _as_array(layer),
    length_B,
    slot_B,
    tiling=tiling,
    interpret=interpret,
  )
  return out_BNH


@functools.partial(
  jax.jit, static_argnames=("fused", "rope_style", "norm_eps", "order", "tiling", "interpret")
)
def _split_and_merge(
  x_BMH: jax.Array,
  caches: tuple[jax.Array, jax.Array],
  layer_1: jax.Array,
  count_B: jax.Array,
  slot_B: jax.Array | None,
  rotation_B2H: jax.Array | None = None,
  norms: tuple[jax.Array | None, jax.Array | None] = (None, None),
  *,
  fused: bool = False,
  rope_style: RopeStyle = "half",
  norm_eps: float = 0.0,
  order: Order | None = None,
  tiling: Tiling | None,
  interpret: bool,
) -> list[Any]:
  """Run the one or two kernels of a step: [out_BNH], or levels in an order; and the new caches if fused.

  Args:
    x_BMH: Queries, and with them new keys and values if fused.
    count_B: Keys of each row in the cache.
    slot_B: The slot of each row; None: row b has slot b.

  It is jitted, so that a step of many layers traces it once.
  """
  (num_layers, num_slots, num_kv_heads, capacity, width), batch = caches[0].shape, x_BMH.shape[0]
  num_heads = x_BMH.shape[1] - (2 * num_kv_heads if fused else 0)
  tiling = tiling or decode_tiling(num_kv_heads, capacity, width)
  parts = (tiling.splits, batch, num_heads)
  # The average over a single run is the result itself.
  part_dtype = x_BMH.dtype if tiling.splits == 1 else jnp.float32
  everything = pl.BlockSpec()
  cache_spec = pl.BlockSpec(
    (num_layers, num_slots, None, capacity, width), lambda k, run, b: (0, 0, k, 0, 0)
  )
  row_spec = pl.BlockSpec((None, *x_BMH.shape[1:]), lambda k, run, b: (b, 0, 0))
  rotation_spec = pl.BlockSpec((None, 2, width), lambda k, run, b: (b, 0, 0))
  kernel = functools.partial(
    _part_kernel, tiling=tiling, heads=(num_heads, num_kv_heads), style=rope_style, eps=norm_eps
  )
  first_cache = 3 if slot_B is None else 4
  part_PBNH, lse_PBN, *new_caches = pl.pallas_call(
    kernel,
    grid=(num_kv_heads, tiling.splits, batch),
    in_specs=[
      everything,
      everything,
      None if slot_B is None else everything,
      row_spec,
      (cache_spec, cache_spec),
      None if rotation_B2H is None else rotation_spec,
      tuple(None if scale_H is None else everything for scale_H in norms),
    ],
    out_specs=[
      pl.BlockSpec((None, None, num_heads, width), lambda k, run, b: (run, b, 0, 0)),
      pl.BlockSpec((None, None, num_heads), lambda k, run, b: (run, b, 0)),
      *([cache_spec, cache_spec] if fused else []),
    ],
    out_shape=[
      jax.ShapeDtypeStruct((*parts, width), part_dtype),
      jax.ShapeDtypeStruct(parts, jnp.float32),
      *([jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in caches] if fused else []),
    ],
    input_output_aliases={first_cache: 2, first_cache + 1: 3} if fused else {},
    compiler_params=plgpu.CompilerParams(num_warps=tiling.num_warps, num_stages=tiling.num_stages),
    interpret=interpret,
    name="attention_part",
  )(layer_1, count_B, slot_B, x_BMH, caches, rotation_B2H, norms)
  if order:
    levels = _merge_levels(part_PBNH, lse_PBN, count_B, order, tiling, capacity, interpret)
    return [levels, *new_caches]
  if tiling.splits == 1:
    return [part_PBNH[0], *new_caches]
  out_BNH = pl.pallas_call(
    functools.partial(_merge_kernel, tiling=tiling, capacity=capacity),
    grid=(num_heads, batch),
    in_specs=[
      everything,
      pl.BlockSpec((tiling.splits, None, None, width), lambda n, b: (0, b, n, 0)),
      pl.BlockSpec((tiling.splits, None, None), lambda n, b: (0, b, n)),
    ],
    out_specs=pl.BlockSpec((None, None, width), lambda n, b: (b, n, 0)),
    out_shape=jax.ShapeDtypeStruct((batch, num_heads, width), x_BMH.dtype),
    compiler_params=plgpu.CompilerParams(num_warps=4 if tiling.splits * width > 1024 else 1),
    interpret=interpret,
    name="attention_merge",
  )(count_B, part_PBNH, lse_PBN)
  return [out_BNH, *new_caches]


def _part_kernel(
  layer_ref,
  count_ref,
  slot_ref,
  x_ref,
  cache_refs,
  rotation_ref,
  norm_refs,
  part_ref,
  lse_ref,
  *new_refs,
  tiling: Tiling,
  heads: tuple[int, int],
  style: RopeStyle,
  eps: float,
):
  """Averages the values of one run by softmax of their scores; log2 of the sum of exp beside it.

  With `new_refs`, x_ref holds a new key and value too: run 0 begins with them and stores them. The
  new key is one more row beside the queries, to be normalised, turned and multiplied with them.
  """
  k, run, b = (pl.program_id(axis) for axis in range(3))
  (num_heads, num_kv_heads), (capacity, width) = heads, cache_refs[0].shape[2:]
  group, fused, dtype = num_heads // num_kv_heads, bool(new_refs), cache_refs[0].dtype
  rows = max(LEAST_ROWS, pl.next_power_of_2(group + fused))
  place, position = (layer_ref[0], _slot(slot_ref, b)), count_ref[b]
  count = jnp.clip(position, 0, capacity)
  row_R = lax.iota(jnp.int32, rows)
  query_R, key_R = row_R < group, (row_R == group) & fused
  head_R = jnp.where(query_R, k * group + row_R, num_heads + k)
  prepare = functools.partial(
    _prepare, x_ref, rotation_ref, norm_refs, layer_ref[0], style=style, eps=eps
  )
  x_RH = prepare(head_R, query_R, key_R).astype(dtype)
  state = _nothing(rows, tiling.block, width)
  if fused:
    is_first = run == 0
    value_R = jnp.full(rows, num_heads + num_kv_heads + k)
    v_RH = _load_rows(x_ref, (value_R,), (query_R | key_R) & is_first).astype(dtype)
    score_RR = plgpu.dot(x_RH, x_RH.T) * _scale(width)
    score_R = jnp.sum(jnp.where(key_R[None], score_RR, 0.0), axis=1)
    first_S = lax.iota(jnp.int32, tiling.block) == 0
    total_RS = jnp.broadcast_to((first_S & is_first)[None], (rows, tiling.block))
    top_R = jnp.where(is_first, score_R, MASKED)
    state = top_R, total_RS.astype(jnp.float32), v_RH.astype(jnp.float32)
    stored_R = key_R & is_first & (position >= 0) & (position < capacity)
    # The interpreter scatters all rows, masked or not: those not stored are sent past the end.
    at = *(jnp.full(rows, i) for i in place), jnp.where(stored_R, position, capacity)
    for ref, new_RH in zip(new_refs, (x_RH, v_RH), strict=True):
      _store_rows(ref, at, stored_R, new_RH)
  blocks, share, used = _runs(count, tiling)
  step = functools.partial(
    _step, x_RH, cache_refs, place, tiling.block, seen=(jnp.full(rows, count), count)
  )
  first = run * share
  state = lax.fori_loop(first, jnp.minimum(first + share, blocks), step, state)
  average_RH, lse_R = _average(state)
  query_R &= run < used
  _store_rows(part_ref, (head_R,), query_R, average_RH)
  plgpu.store(lse_ref.at[head_R], lse_R, mask=query_R)


def _runs(count, tiling: Tiling) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Cut `count` keys: blocks of all, blocks of a run, and runs that have any, at least one.

  It follows from the row's own length, so that its sums have one order in any batch.
  """
  blocks = pl.cdiv(count, tiling.block)
  share = pl.cdiv(blocks, tiling.splits)
  return blocks, share, jnp.maximum(pl.cdiv(blocks, jnp.maximum(share, 1)), 1)


def _merge_kernel(count_ref, part_ref, lse_ref, out_ref, *, tiling: Tiling, capacity: int):
  """Merges the averages over each run that has keys into the average over all."""
  count = jnp.clip(count_ref[pl.program_id(1)], 0, capacity)
  run_P = lax.iota(jnp.int32, tiling.splits)
  used_P = run_P < _runs(count, tiling)[2]
  lse_P = plgpu.load(lse_ref.at[run_P], mask=used_P, other=MASKED)
  weight_P = jnp.exp2(lse_P - jnp.max(lse_P))
  part_PH = _load_rows(part_ref, (run_P,), used_P)
  out_H = jnp.sum(weight_P[:, None] * part_PH, axis=0) / jnp.sum(weight_P)
  out_ref[...] = out_H.astype(out_ref.dtype)


def _merge_levels(part_PBNH, lse_PBN, count_B, order, tiling, capacity, interpret) -> Levels:
  """Merge the averages over runs as `_merge_kernel` does, and round each row of all heads."""
  runs, batch, _, width = part_PBNH.shape
  part_PBY = part_PBNH.reshape(runs, batch, -1)
  columns = part_PBY.shape[2]
  if runs == 1:
    return rounding.rounded(part_PBY[0], order=order, interpret=interpret)

  def kernel(count_ref, part_ref, lse_ref, values_ref, steps_ref):
    row, column, inside = rounding.row_of_program((batch, columns))
    count = count_ref[jnp.minimum(pl.program_id(0), batch - 1)]
    used = _runs(jnp.clip(count, 0, capacity), tiling)[2]
    lses, parts = [], []
    for run in range(runs):
      seen = inside & (run < used)
      at = (jnp.full(row.shape, run), row)
      lses.append(plgpu.load(lse_ref.at[*at, column // width], mask=seen, other=MASKED))
      parts.append(plgpu.load(part_ref.at[*at, column], mask=seen, other=0.0))
    top = functools.reduce(jnp.maximum, lses)
    weights = [jnp.exp2(lse - top) for lse in lses]
    total = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    out = jnp.where(inside, total / sum(weights), 0.0)
    rounding.store_levels(out, row, column, inside, values_ref, steps_ref, order, interpret)

  values, steps = pl.pallas_call(
    kernel,
    grid=(count_of(batch, order),),
    out_shape=rounding.level_shapes(batch, columns, order),
    compiler_params=plgpu.CompilerParams(num_warps=min(16, 2 * rounding.warps_for(columns))),
    interpret=interpret,
    name="attention_merge_levels",
  )(count_B, part_PBY, lse_PBN)
  return Levels(values, steps, batch, order)


@functools.partial(jax.jit, static_argnames=("tiling", "interpret"))
def attend_cache(
  q_BTNH: Float[Array, "B T N H"],
  k_LPKSH: Float[Array, "L P K S H"],
  v_LPKSH: Float[Array, "L P K S H"],
  layer: Int[Array, ""] | int,
  start_B: Int[Array, "B"],
  *,
  slot_B: Int[Array, "B"] | None = None,
  tiling: Tiling | None = None,
  interpret: bool = False,
) -> Float[Array, "B T N H"]:
  """Attend with T queries over the cache: query t of row b sees keys 0..start_B[b]+t.

  Query heads of one key-value head share a program, and so each block of keys that it reads.

  Raises: NotImplementedError: a shape, dtype or version that these kernels do not take.
  """
  batch, length, num_heads, width = q_BTNH.shape
  _check(num_heads, k_LPKSH, tiling, interpret)
  num_layers, num_slots, num_kv_heads, capacity, _ = k_LPKSH.shape
  group = num_heads // num_kv_heads
  tiling = tiling or prefill_tiling(length, group, capacity, width)
  everything = pl.BlockSpec()
  row_spec = pl.BlockSpec((None, length, num_heads, width), lambda i, k, b: (b, 0, 0, 0))
  cache_spec = pl.BlockSpec(
    (num_layers, num_slots, None, capacity, width), lambda i, k, b: (0, 0, k, 0, 0)
  )
  return pl.pallas_call(
    functools.partial(_chunk_kernel, tiling=tiling, group=group),
    grid=(pl.cdiv(length * group, tiling.rows), num_kv_heads, batch),
    in_specs=[
      everything,
      everything,
      None if slot_B is None else everything,
      row_spec,
      (cache_spec, cache_spec),
    ],
    out_specs=row_spec,
    out_shape=jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
    compiler_params=plgpu.CompilerParams(num_warps=tiling.num_warps, num_stages=tiling.num_stages),
    interpret=interpret,
    name="attention_chunk",
  )(_as_array(layer), start_B, slot_B, q_BTNH, (k_LPKSH, v_LPKSH))


def _chunk_kernel(
  layer_ref, start_ref, slot_ref, q_ref, cache_refs, out_ref, *, tiling: Tiling, group: int
):
  """Attends with rows of queries: position after position, each with all heads of the group."""
  k, b = pl.program_id(1), pl.program_id(2)
  # The last rows see the most keys: their programs start first.
  first_row = (pl.num_programs(0) - 1 - pl.program_id(0)) * tiling.rows
  (length, _, width), capacity = q_ref.shape, cache_refs[0].shape[2]
  row_R = first_row + lax.iota(jnp.int32, tiling.rows)
  t_R, head_R, live_R = row_R // group, k * group + row_R % group, row_R < length * group
  place, start = (layer_ref[0], _slot(slot_ref, b)), start_ref[b]
  q_RH = _load_rows(q_ref, (t_R, head_R), live_R).astype(cache_refs[0].dtype)
  step = functools.partial(_step, q_RH, cache_refs, place, tiling.block)
  seen_by_all = jnp.clip(start + first_row // group + 1, 0, capacity)
  last_t = jnp.minimum((first_row + tiling.rows - 1) // group, length - 1)
  limit = jnp.minimum(start + last_t + 1, capacity)
  whole = seen_by_all // tiling.block
  state = lax.fori_loop(0, whole, step, _nothing(tiling.rows, tiling.block, width))
  masked = functools.partial(step, seen=(start + t_R + 1, limit))
  state = lax.fori_loop(whole, pl.cdiv(limit, tiling.block), masked, state)
  average_RH, _ = _average(state)
  _store_rows(out_ref, (t_R, head_R), live_R, average_RH)


def _slot(slot_ref, b):
  """The slot of row b: its own number, unless slots are named."""
  return b if slot_ref is None else slot_ref[b]


def _step(q_RH, cache_refs, place, block, i, state, *, seen=None):
  """Adds block i of keys to the running maximum, sums of exp2 and sum of values of each row.

  Sums of exp2 are kept apart for each column of a block: adding them up can wait.

  Args:
    place: The indices of the layer and of the slot.
    seen: How many keys each row sees, and the most that any does. None: all of the block.
  """
  (k_ref, v_ref), (top_R, total_RS, sum_RH) = cache_refs, state
  at = pl.ds(i * block, block)
  score_RS = plgpu.dot(q_RH, k_ref[*place, at, :].T) * _scale(q_RH.shape[1])
  if seen is None:
    v_SH = v_ref[*place, at, :]
  else:
    seen_R, limit = seen
    key_S = i * block + lax.iota(jnp.int32, block)
    score_RS = jnp.where(key_S[None] < seen_R[:, None], score_RS, MASKED)
    # A weight of zero does not silence a NaN: values that no row sees are not read.
    exists_SH = jnp.broadcast_to((key_S < limit)[:, None], (block, q_RH.shape[1]))
    v_SH = plgpu.load(v_ref.at[*place, at, :], mask=exists_SH, other=0.0)
  new_top_R = jnp.maximum(top_R, jnp.max(score_RS, axis=1))
  weight_RS = jnp.exp2(score_RS - new_top_R[:, None])
  shrink_R1 = jnp.exp2(top_R - new_top_R)[:, None]
  sum_RH = sum_RH * shrink_R1 + plgpu.dot(weight_RS.astype(v_SH.dtype), v_SH)
  return new_top_R, total_RS * shrink_R1 + weight_RS, sum_RH


def _nothing(rows: int, block: int, width: int):
  """The state before the first key."""
  top_R = jnp.full(rows, MASKED, jnp.float32)
  return top_R, jnp.zeros((rows, block), jnp.float32), jnp.zeros((rows, width), jnp.float32)


def _average(state):
  """Compute the average of values, and log2 of the sum of exp2 of scores."""
  top_R, total_RS, sum_RH = state
  total_R = jnp.maximum(jnp.sum(total_RS, axis=1), 1e-30)
  return sum_RH / total_R[:, None], top_R + jnp.log2(total_R)


def _scale(width: int) -> float:
  """The factor of scores for a softmax to the base 2, which the hardware has."""
  return width**-0.5 * math.log2(math.e)


def _prepare(
  x_ref, rotation_ref, norm_refs, layer, head_R, query_R, key_R, *, style: RopeStyle, eps: float
) -> jax.Array:
  """Normalise and turn heads of queries and of keys: float32 [R, H], zeros elsewhere."""

  def read(element_H: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_RH = _load_rows(x_ref, (head_R,), query_R | key_R, element_H)
    if norm_refs[0] is None:
      return x_RH, x_RH
    # Scales are spread over rows by loading them so: in registers it would take shared memory.
    index = () if len(norm_refs[0].shape) == 1 else (jnp.full(head_R.shape, layer),)
    scale_RH = _load_rows(norm_refs[0], index, query_R, element_H)
    return x_RH, x_RH * (scale_RH + _load_rows(norm_refs[1], index, key_R, element_H))

  width = x_ref.shape[-1]
  element_H = lax.iota(jnp.int32, width)
  x_RH, out_RH = read(element_H)
  if rotation_ref is not None:
    # Partners are loaded, as registers are not shuffled at will.
    _, other_RH = read(partner(element_H, width, style))
    cos_RH, sin_RH = (
      _load_rows(rotation_ref, (jnp.full(head_R.shape, i),), query_R | key_R) for i in range(2)
    )
    out_RH = out_RH * cos_RH + other_RH * sin_RH
  if norm_refs[0] is not None:
    out_RH *= lax.rsqrt(jnp.sum(x_RH * x_RH, axis=1) / width + eps)[:, None]
  return out_RH


def _load_rows(ref, index, live_R, element_H=None) -> jax.Array:
  """Load float32 [R, H], row r from `ref[index[0][r], ...]`; zeros where not live."""
  element_H = lax.iota(jnp.int32, ref.shape[-1]) if element_H is None else element_H
  at, live_RH = _spread(index, live_R, element_H)
  return plgpu.load(ref.at[at], mask=live_RH, other=0.0).astype(jnp.float32)


def _store_rows(ref, index, live_R, x_RH) -> None:
  at, live_RH = _spread(index, live_R, lax.iota(jnp.int32, ref.shape[-1]))
  plgpu.store(ref.at[at], x_RH.astype(ref.dtype), mask=live_RH)


def _spread(index, live_R, element_H) -> tuple[tuple[jax.Array, ...], jax.Array]:
  shape = (*live_R.shape, *element_H.shape)
  *index, live_RH = (jnp.broadcast_to(i_R[:, None], shape) for i_R in (*index, live_R))
  return (*index, jnp.broadcast_to(element_H[None], shape)), live_RH


def _as_array(layer: jax.Array | int) -> jax.Array:
  return jnp.asarray(layer, jnp.int32).reshape(1)


def _check(num_heads: int, k_LPKSH: jax.Array, tiling: Tiling | None, interpret: bool) -> None:
  _, _, num_kv_heads, capacity, width = k_LPKSH.shape
  if num_heads < 1 or num_heads % num_kv_heads:
    raise ValueError(f"{num_heads} query heads over {num_kv_heads} key-value heads: use a multiple")
  if width & (width - 1) or not LEAST_ROWS <= width <= 256:
    raise NotImplementedError(f"head width {width}: these kernels take powers of two, 16 to 256")
  if capacity % (tiling.block if tiling else LEAST_ROWS):
    raise NotImplementedError(f"cache capacity {capacity}: use a multiple of 128")
  if k_LPKSH.dtype not in (jnp.bfloat16, jnp.float16):
    raise NotImplementedError(f"cache of {k_LPKSH.dtype}: these kernels take bfloat16 and float16")
  if not interpret and (reason := gpus.why_not_jax()):
    raise NotImplementedError(reason)
