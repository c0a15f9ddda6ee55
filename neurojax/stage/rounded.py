"""Runs layers of "w2a8" whose activations are rounded by the kernels that make them, and chooses products.

A layer is nine kernels: four products, attention in two, and in front of each product one that rounds
its input. The sums of a product that parts of a contraction share are added by the kernel that reads them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from neurojax.kernels import gpus
from neurojax.kernels.decode.reference import Cache
from neurojax.kernels.decode.weights import LayerWeights
from neurojax.kernels.gemm import mosaic, tuned
from neurojax.kernels.gemm.levels import Levels, Order
from neurojax.stage.kernels import Kernels
from neurojax.weights.ternary import BLOCK, TernaryArray

By = Literal["triton", "mosaic"]

Attend = Callable[[Array, Cache, Array, Order], tuple[Levels, Cache]]
"""(heads of queries, keys and values [M, X], cache, layer, order) to (attended, rounded; cache)."""

_ORDERS: dict[By, Order] = {"triton": "planes", "mosaic": "blocks"}

_MOST_WHOLE_ROWS = 64
"""Most rows that Triton multiplies where sums must have one order: beyond, weights are written out."""


def takes(kernels: Kernels, *weights: TernaryArray) -> bool:
  """Tell whether the products by these weights get rounded activations."""
  return (
    kernels.rounds
    and (kernels.product, kernels.attention) == ("mosaic", "gpu")
    and all(w.mode == "w2a8" and _is_whole(w) for w in weights)
  )


def _is_whole(w: TernaryArray) -> bool:
  """Whether no code is padding, and Mosaic multiplies by w, whatever the number of rows."""
  n, k = w.contraction.n, w.contraction.k
  return k % BLOCK == 0 and mosaic.why_not(1, n, k, w) is None


def choose(
  m: int, w: TernaryArray, kernels: Kernels, *, parts: int = 1
) -> tuple[By, dict[str, Any]]:
  """Choose what multiplies m rows by w, and its arguments.

  Args:
    parts: Parts that share the contraction, where sums must have one order. A row's bits follow it.
  """
  n, k = w.contraction.n, w.contraction.k
  entry = None
  if kernels.device is not None:
    entry = tuned.find(tuned.load(kernels.device), w.mode, m, n, k)
  by = "triton" if entry is not None and entry.implementation == "triton" else "mosaic"
  # What was measured holds for its shape alone: another may not be divided so.
  found = dict(entry.parameters) if entry is not None and (entry.n, entry.k) == (n, k) else {}
  # Tables say of many rows what is fastest with activations that XLA rounds: written-out weights, and cuBLAS.
  if by == "triton" and m <= _MOST_WHOLE_ROWS:
    tiles = found.get("tiles")
    if not kernels.invariant and parts == 1:
      return by, {} if tiles is None else {"tiles": _tiles(tiles, m, parts=None)}
    whole = whole_tiles(m, w)
    if whole is not None:
      tiles = dataclasses.asdict(whole) if tiles is None else tiles
      return by, {"tiles": _tiles(tiles, m, parts=parts)}
  if by == "triton":
    found = {}
  cut = found.get("cut") or dataclasses.asdict(mosaic.tiling_for(m, n, k, w))
  return "mosaic", {"cut": _cut(cut, m, parts=parts)}


def whole_tiles(m: int, w: TernaryArray) -> Any:
  """Cut a product by Triton so that it has the bits of Mosaic's, or None where it cannot have them.

  Both add float32(sum of a group) * scale to a total by one fused operation, group after group. The
  sums of "w2a16" are no integers, and groups of 64 are added up in two columns.
  """
  if w.mode != "w2a8" or w.group_size == 64 or m > _MOST_WHOLE_ROWS:
    return None
  from neurojax.kernels.gemm import triton

  *_, n, y = w.codes.shape
  return triton.tiles_for(m, n, y, w.mode, w.group_size, whole=True)


def _tiles(tiles: dict[str, Any], m: int, *, parts: int | None) -> Any:
  from neurojax.kernels.gemm import triton_dot

  tiles = tiles | {"m": min(tiles["m"], max(8, 1 << (m - 1).bit_length()))}
  return triton_dot.Tiles(**(tiles if parts is None else tiles | {"split": parts}))


def _cut(cut: dict[str, Any], m: int, *, parts: int) -> mosaic.Tiling:
  return mosaic.Tiling(**(cut | {"m": min(cut["m"], -(-m // 8) * 8), "split": parts}))


def parts_for(n: int, k: int) -> int:
  """Parts of a contraction that the sums of a step are cut into: enough to fill the device.

  Widths alone decide, so that a row's sums have one order in a step of any number of rows.
  """
  blocks, parts = -(-n // 128), 1
  for more in (2, 3, 4, 6, 8):
    if blocks * more <= gpus.MULTIPROCESSORS and k % (512 * more) == 0:
      parts = more
  return parts


def levels(x_MK: Float[Array, "M K"], order: Order) -> Levels:
  """Round rows."""
  return _rounding().rounded(x_MK, order=order)


def attend(
  qkv_BX: Float[Array, "B X"],
  cache: Cache,
  layer: Int[Array, ""],
  position_B: Int[Array, "B"],
  slot_B: Int[Array, "B"] | None,
  rotation_B2H: Float[Array, "B 2 H"],
  norms: tuple[Float[Array, "L H"], Float[Array, "L H"]] | None,
  norm_eps: float,
  order: Order,
) -> tuple[Levels, Cache]:
  """Attend for one token of each sequence, as `attention.api.decode` does, and round."""
  from neurojax.kernels.attention import triton

  out, keys, values = triton.decode(
    qkv_BX, *cache, layer, position_B,
    slot_B=slot_B, rotation_B2H=rotation_B2H, norms=norms, norm_eps=norm_eps, order=order,
  )  # fmt: skip
  return out, (keys, values)


def run_layers(
  layers: LayerWeights,
  x_MD: Float32[Array, "M D"],
  cache: Cache,
  attend: Attend,
  kernels: Kernels,
  dtype: DTypeLike,
  loop: Callable[[Callable[[Array, Any], Any], Any], Any],
  *,
  is_step: bool,
) -> tuple[Float32[Array, "M D"], Cache]:
  """Run M tokens through all layers, as `decode.reference.run_layer` through each.

  Args:
    dtype: Dtype of what passes between the kernels of a layer.
    loop: Runs (index of a layer, carry) -> carry for each layer.
    is_step: Whether rows are single tokens of sequences: their contractions are then cut into parts.
  """
  m, eps = x_MD.shape[0], layers.shape.norm_eps

  def chosen(w: TernaryArray, is_added: bool) -> tuple[Order, Callable[..., Array]]:
    """The order that a product reads, and the product; parts of it only where a kernel adds them."""
    parts = parts_for(w.contraction.n, w.contraction.k) if is_added and is_step else 1
    by, arguments = choose(m, w, kernels, parts=parts)
    return _ORDERS[by], functools.partial(_product, by, arguments, w, is_added)

  qkv_order, qkv = chosen(layers.qkv, False)
  o_order, o = chosen(layers.o, True)
  gate_up_order, gate_up = chosen(layers.gate_up, False)
  down_order, down = chosen(layers.down, True)
  rounding = _rounding()

  def layer(i: Array, carry: tuple[Array, Array, Cache]) -> tuple[Array, Array, Cache]:
    x_MD, added_SMD, cache = carry
    x_MD, x = rounding.normalised(x_MD, added_SMD, layers.attn_norm, i, eps=eps, order=qkv_order)
    attended, cache = attend(qkv(x, i, dtype), cache, i, o_order)
    added_SMD = o(attended, i, jnp.float32)
    x_MD, x = rounding.normalised(x_MD, added_SMD, layers.ffn_norm, i, eps=eps, order=gate_up_order)
    hidden = rounding.gated(gate_up(x, i, dtype), dtype=dtype, order=down_order)
    return x_MD, down(hidden, i, jnp.float32), cache

  shape = jax.eval_shape(lambda: layer(jnp.int32(0), (x_MD, None, cache)))[1].shape
  x_MD, added_SMD, cache = loop(layer, (x_MD, jnp.zeros(shape, jnp.float32), cache))
  total_MD = added_SMD[0]
  for part_MD in added_SMD[1:]:
    total_MD += part_MD
  return x_MD + total_MD, cache


def logits(
  x_BD: Float[Array, "B D"],
  norm_D: Float[Array, "D"],
  head: TernaryArray,
  eps: float,
  kernels: Kernels,
) -> Float32[Array, "B V"]:
  """Compute logits from the last layer's output."""
  by, arguments = choose(x_BD.shape[0], head, kernels)
  _, x = _rounding().normalised(
    x_BD.astype(jnp.float32), None, norm_D[None], jnp.int32(0), eps=eps, order=_ORDERS[by]
  )
  return _product(by, arguments, head, False, x, None, jnp.float32)


def _product(
  by: By,
  arguments: dict[str, Any],
  w: TernaryArray,
  parts: bool,
  x: Levels,
  layer: Array | None,
  dtype: DTypeLike,
) -> Array:
  if by == "mosaic":
    return mosaic.matmul(x, w, layer, dtype=dtype, parts=parts, **arguments)
  from neurojax.kernels.gemm import triton

  return triton.matmul(x, w, layer=layer, parts=parts, **arguments).astype(dtype)


def _rounding() -> Any:
  # Imported when needed: it loads the GPU's compiler.
  from neurojax.kernels import rounding

  return rounding
