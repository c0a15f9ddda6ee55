"""The caches of layers: keys and values of earlier positions, or the last inputs of a convolution."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from neurojax.forms import KEY_BLOCK, kept_positions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values of a range of layers, already rotated.

  Position s of row b is valid once a token was written there; attention looks at no position
  beyond its query's own, so what lies past the end of a sequence is never read.

  Attributes:
    k_LBKSH, v_LBKSH: Keys and values of the dtype of the cache.
    is_ring: Whether position s is kept in place s modulo the capacity, as layers with a window read only
      the last positions.
  """

  # Any, because tree maps put shapes, shardings and None in an array's place.
  k_LBKSH: Any
  v_LBKSH: Any
  is_ring: bool = dataclasses.field(default=False, metadata={"static": True})

  @classmethod
  def zeros(
    cls,
    *,
    num_layers: int,
    batch: int,
    num_kv_heads: int,
    capacity: int,
    head_dim: int,
    dtype: DTypeLike,
    window: int | None = None,
  ) -> "KVCache":
    """Makes an empty cache.

    Args:
      window: Number of keys that a query sees at most; None: all. A window smaller than the capacity
        leaves room for the window and `forms.PREFILL` new inputs.
    """
    if capacity % KEY_BLOCK:
      raise ValueError(f"capacity = {capacity}: it must be a multiple of {KEY_BLOCK}")
    kept = kept_positions(capacity, window)
    shape = (num_layers, batch, num_kv_heads, kept, head_dim)
    return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), kept < capacity)

  @property
  def capacity(self) -> int:
    """Number of positions per sequence (S) that are kept."""
    return self.k_LBKSH.shape[3]

  def write(
    self,
    layer: Int[Array, ""],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    start_B: Int[Array, "B"],
  ) -> "KVCache":
    """Stores T positions of one layer, row b from `start_B[b]` on.

    Raises: ValueError: the positions do not fit. Under `jit` the start is unknown and a write past
      the end would be moved back by XLA, so whoever compiles must check first: `check_room`.
    """
    if self.is_ring:
      return self._write_around(layer, k_BTKH, v_BTKH, start_B)
    if not isinstance(start_B, jax.core.Tracer):
      check_room(int(start_B.max()), k_BTKH.shape[1], self.capacity)

    def put(cache_LBKSH: jax.Array, new_BTKH: jax.Array) -> jax.Array:
      new_BKTH = new_BTKH.astype(cache_LBKSH.dtype).swapaxes(1, 2)
      for b in range(new_BKTH.shape[0]):
        update = new_BKTH[None, b : b + 1]
        cache_LBKSH = lax.dynamic_update_slice(cache_LBKSH, update, (layer, b, 0, start_B[b], 0))
      return cache_LBKSH

    return dataclasses.replace(
      self, k_LBKSH=put(self.k_LBKSH, k_BTKH), v_LBKSH=put(self.v_LBKSH, v_BTKH)
    )

  def _write_around(
    self,
    layer: Int[Array, ""],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    start_B: Int[Array, "B"],
  ) -> "KVCache":
    length, capacity = k_BTKH.shape[1], self.capacity
    place_BT = (start_B[:, None] + jnp.arange(length, dtype=start_B.dtype)[None]) % capacity

    def put(cache_LBKSH: jax.Array, new_BTKH: jax.Array) -> jax.Array:
      new_BTKH = new_BTKH.astype(cache_LBKSH.dtype)
      for b in range(new_BTKH.shape[0]):
        if length == 1:
          update, at = new_BTKH[None, b : b + 1].swapaxes(2, 3), (layer, b, 0, place_BT[b, 0], 0)
          cache_LBKSH = lax.dynamic_update_slice(cache_LBKSH, update, at)
        else:
          # The index in front of a slice puts T first.
          cache_LBKSH = cache_LBKSH.at[layer, b, :, place_BT[b]].set(new_BTKH[b])
      return cache_LBKSH

    return dataclasses.replace(
      self, k_LBKSH=put(self.k_LBKSH, k_BTKH), v_LBKSH=put(self.v_LBKSH, v_BTKH)
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConvState:
  """Inputs of the convolutions of a range of layers at the last X positions.

  Unlike keys and values it cannot be read again from an earlier position: a sequence goes on from its end
  only. Positions before 0 read as zeros.
  """

  # Any, because tree maps put shapes, shardings and None in an array's place.
  u_LBXM: Any

  @classmethod
  def zeros(
    cls, *, num_layers: int, batch: int, width: int, channels: int, dtype: DTypeLike
  ) -> "ConvState":
    """Makes an empty state. width: Number of positions that the convolution sees, its own included."""
    return cls(jnp.zeros((num_layers, batch, width - 1, channels), dtype))

  def read(self, layer: Int[Array, ""], start_B: Int[Array, "B"]) -> Float[Array, "B X M"]:
    """Reads the X positions before `start_B`."""
    u_BXM = lax.dynamic_index_in_dim(self.u_LBXM, layer, keepdims=False)
    before = u_BXM.shape[1]
    position_BX = start_B[:, None] - before + jnp.arange(before, dtype=start_B.dtype)[None]
    return jnp.where((position_BX >= 0)[..., None], u_BXM, 0)

  def write(
    self, layer: Int[Array, ""], all_BSM: Float[Array, "B S M"], count_B: Int[Array, "B"]
  ) -> "ConvState":
    """Stores the last X positions.

    Args:
      all_BSM: The X positions that were read, then the new ones.
      count_B: Number of new positions of each row that are no padding.
    """
    before = self.u_LBXM.shape[2]
    new_BXM = jax.vmap(lambda u_SM, n: lax.dynamic_slice_in_dim(u_SM, n, before))(all_BSM, count_B)
    new_LBXM = lax.dynamic_update_slice(
      self.u_LBXM, new_BXM[None].astype(self.u_LBXM.dtype), (layer, 0, 0, 0)
    )
    return ConvState(new_LBXM)


LayerCache = KVCache | ConvState
"""The cache of all layers of one shape."""

Cache = LayerCache | dict[str, LayerCache]
"""The cache of a span: one for each stack, by name, if the model has several (`params.stacks`)."""


def check_room(start: int, length: int, capacity: int) -> None:
  """Raises: ValueError: positions start .. start+length-1 do not lie within the cache."""
  if start < 0 or start + length > capacity:
    raise ValueError(
      f"positions {start}..{start + length - 1} do not fit a cache of {capacity} positions: "
      "ask for a longer context or a shorter sequence"
    )
