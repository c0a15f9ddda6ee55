"""The caches of layers: keys and values of earlier positions, or the last inputs of a convolution.

A cache has P slots, one for each sequence that it holds. The rows of a step say in which slots they lie.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from neurojax.forms import KEY_BLOCK, kept_positions

_INT8_MOST = 127.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """Where the rows of a step lie.

  Attributes:
    start_B: Position of each row's first input, int32.
    count_B: Number of inputs of each row that are no padding, int32; None: all of every row. A row without
      any leaves no trace in a cache. Such rows come after all others.
    slot_B: Slot of each row, int32; None: row b lies in slot b.
  """

  start_B: Any
  count_B: Any = None
  slot_B: Any = None

  @property
  def slots(self) -> Int[Array, "B"]:
    """The slot of each row."""
    if self.slot_B is not None:
      return self.slot_B
    return jnp.arange(self.start_B.shape[0], dtype=jnp.int32)

  @property
  def live_B(self) -> Bool[Array, "B"] | None:
    """Whether each row has any input; None: all have."""
    return None if self.count_B is None else self.count_B > 0

  def counts(self, length: int) -> Int[Array, "B"]:
    """The number of inputs of each row, of `length` at most."""
    if self.count_B is not None:
      return self.count_B
    return jnp.full(self.start_B.shape[0], length, jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values of a range of layers, already rotated.

  Position s of slot p is valid once a token was written there; attention looks at no position
  beyond its query's own, so what lies past the end of a sequence is never read.

  Attributes:
    k_LPKSH, v_LPKSH: Keys and values, of the dtype of the cache or int8.
    k_scale_LPKS, v_scale_LPKS: float32 factors of int8 keys and values, one for each position and head;
      None for caches of other dtypes.
    is_ring: Whether position s is kept in place s modulo the capacity, as layers with a window read only
      the last positions.
  """

  # Any, because tree maps put shapes, shardings and None in an array's place.
  k_LPKSH: Any
  v_LPKSH: Any
  k_scale_LPKS: Any = None
  v_scale_LPKS: Any = None
  is_ring: bool = dataclasses.field(default=False, metadata={"static": True})

  @classmethod
  def zeros(
    cls,
    *,
    num_layers: int,
    slots: int,
    num_kv_heads: int,
    capacity: int,
    head_dim: int,
    dtype: DTypeLike,
    window: int | None = None,
  ) -> "KVCache":
    """Makes an empty cache.

    Args:
      dtype: int8 rounds keys and values, each position and head by a factor of its own.
      window: Number of keys that a query sees at most; None: all. A window smaller than the capacity
        leaves room for the window and `forms.PREFILL` new inputs.
    """
    if capacity % KEY_BLOCK:
      raise ValueError(f"capacity = {capacity}: it must be a multiple of {KEY_BLOCK}")
    kept = kept_positions(capacity, window)
    shape = (num_layers, slots, num_kv_heads, kept, head_dim)
    scales = [None, None]
    if jnp.dtype(dtype) == jnp.int8:
      scales = [jnp.zeros(shape[:-1], jnp.float32) for _ in scales]
    return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), *scales, is_ring=kept < capacity)

  @property
  def capacity(self) -> int:
    """Number of positions per sequence (S) that are kept."""
    return self.k_LPKSH.shape[3]

  def write(
    self,
    layer: Int[Array, ""],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    rows: Rows,
  ) -> "KVCache":
    """Stores T positions of one layer in each row's slot, from the row's start on.

    What padding leaves behind the inputs of a row with several is never read.

    Raises: ValueError: the positions do not fit. Under `jit` the start is unknown and a write past
      the end would be moved back by XLA, so whoever compiles must check first: `check_room`.
    """
    last_start = rows.start_B.max()
    if not self.is_ring and not isinstance(last_start, jax.core.Tracer):
      check_room(int(last_start), k_BTKH.shape[1], self.capacity)
    k, k_scale = self._held(k_BTKH)
    v, v_scale = self._held(v_BTKH)
    return dataclasses.replace(
      self,
      k_LPKSH=self._put(self.k_LPKSH, k, layer, rows),
      v_LPKSH=self._put(self.v_LPKSH, v, layer, rows),
      k_scale_LPKS=self._put(self.k_scale_LPKS, k_scale, layer, rows),
      v_scale_LPKS=self._put(self.v_scale_LPKS, v_scale, layer, rows),
    )

  def read(
    self, layer: Int[Array, ""], slot: Int[Array, ""], place: Int[Array, ""] | int, count: int
  ) -> tuple[Float[Array, "K S H"], Float[Array, "K S H"]]:
    """Reads keys and values of `count` places of one slot, from `place` on."""

    def part(array: jax.Array, scale: jax.Array | None) -> jax.Array:
      _, _, heads, _, width = array.shape
      at, size = (layer, slot, 0, place, 0), (1, 1, heads, count, width)
      x_KSH = lax.dynamic_slice(array, at, size)[0, 0]
      if scale is None:
        return x_KSH
      return (
        x_KSH.astype(jnp.float32) * lax.dynamic_slice(scale, at[:-1], size[:-1])[0, 0, ..., None]
      )

    return part(self.k_LPKSH, self.k_scale_LPKS), part(self.v_LPKSH, self.v_scale_LPKS)

  def _held(self, x_BTKH: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """The form in which keys or values are kept, and their factors."""
    if self.k_scale_LPKS is None:
      return x_BTKH.astype(self.k_LPKSH.dtype), None
    x_BTKH = x_BTKH.astype(jnp.float32)
    scale_BTK = jnp.max(jnp.abs(x_BTKH), axis=-1) / _INT8_MOST
    inverse_BTK = jnp.where(scale_BTK > 0, 1 / scale_BTK, 0)
    return jnp.round(x_BTKH * inverse_BTK[..., None]).astype(jnp.int8), scale_BTK

  def _put(
    self, array: jax.Array | None, new: jax.Array | None, layer: jax.Array, rows: Rows
  ) -> jax.Array | None:
    """Stores new [B, T, K, ...] in an array [L, P, K, S, ...]."""
    if array is None or new is None:
      return None
    batch, length = new.shape[:2]
    if length == 1 and batch > 1:
      return self._put_ones(array, new[:, 0], layer, rows)
    if self.is_ring and length > 1:
      return self._put_around(array, new, layer, rows)
    # Unrolled slices of whole rows: XLA writes them in place.
    start_B = rows.start_B % self.capacity if self.is_ring else rows.start_B
    new = new.swapaxes(1, 2)
    for b in range(batch):
      update, slot = new[None, b : b + 1], b if rows.slot_B is None else rows.slot_B[b]
      at = (layer, slot, 0, start_B[b], *(0 for _ in new.shape[3:]))
      if rows.count_B is not None and length == 1:
        kept = lax.dynamic_slice(array, at, update.shape)
        update = jnp.where(rows.count_B[b] > 0, update, kept)
      array = lax.dynamic_update_slice(array, update, at)
    return array

  def _put_ones(self, array: jax.Array, new: jax.Array, layer: jax.Array, rows: Rows) -> jax.Array:
    """Stores one position of several rows; those without input are sent past the end."""
    place_B = rows.start_B % self.capacity if self.is_ring else rows.start_B
    if (live_B := rows.live_B) is not None:
      place_B = jnp.where(live_B, place_B, self.capacity)
    return array.at[layer, rows.slots, :, place_B].set(new, mode="drop")

  def _put_around(
    self, array: jax.Array, new: jax.Array, layer: jax.Array, rows: Rows
  ) -> jax.Array:
    """Stores several positions of a ring: those of padding too, as they are overwritten before they are read."""
    length = new.shape[1]
    place_BT = (rows.start_B[:, None] + jnp.arange(length, dtype=jnp.int32)[None]) % self.capacity
    for b in range(new.shape[0]):
      # The index in front of a slice puts T first.
      array = array.at[layer, rows.slots[b], :, place_BT[b]].set(new[b])
    return array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConvState:
  """Inputs of the convolutions of a range of layers at the last X positions.

  Unlike keys and values it cannot be read again from an earlier position: a sequence goes on from its end
  only. Positions before 0 read as zeros.
  """

  # Any, because tree maps put shapes, shardings and None in an array's place.
  u_LPXM: Any

  @classmethod
  def zeros(
    cls, *, num_layers: int, slots: int, width: int, channels: int, dtype: DTypeLike
  ) -> "ConvState":
    """Makes an empty state. width: Number of positions that the convolution sees, its own included."""
    return cls(jnp.zeros((num_layers, slots, width - 1, channels), dtype))

  def read(self, layer: Int[Array, ""], rows: Rows) -> Float[Array, "B X M"]:
    """Reads the X positions before each row's start."""
    u_BXM = self.u_LPXM[layer, rows.slots]
    before = u_BXM.shape[1]
    position_BX = rows.start_B[:, None] - before + jnp.arange(before, dtype=jnp.int32)[None]
    return jnp.where((position_BX >= 0)[..., None], u_BXM, 0)

  def write(self, layer: Int[Array, ""], all_BSM: Float[Array, "B S M"], rows: Rows) -> "ConvState":
    """Stores the last X positions.

    Args:
      all_BSM: The X positions that were read, then the new ones.
    """
    before = self.u_LPXM.shape[2]
    count_B, slot_B = rows.counts(all_BSM.shape[1] - before), rows.slots
    new_BXM = jax.vmap(lambda u_SM, n: lax.dynamic_slice_in_dim(u_SM, n, before))(all_BSM, count_B)
    # Rows without input are sent past the end, as another row may lie in the slot that they name.
    slot_B = jnp.where(count_B > 0, slot_B, self.u_LPXM.shape[1])
    new_BXM = new_BXM.astype(self.u_LPXM.dtype)
    return dataclasses.replace(self, u_LPXM=self.u_LPXM.at[layer, slot_B].set(new_BXM, mode="drop"))


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
