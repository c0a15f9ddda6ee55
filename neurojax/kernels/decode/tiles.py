"""Pieces of a Triton kernel that multiplies two-bit rows by one int8 vector.

A tile is 2048 contracted elements of some rows: 512 bytes of codes a row, 16 of them to a lane, so
that each of a warp's 32 lanes holds one block of 64 elements and its scale. Inside a lane,
dp4a multiplies four codes by four activations.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plgpu

TILE = 2048
"""Contracted elements of a tile."""
_BYTES, _WORDS, _LANES = 512, 128, 32

# Between 2**23 and 2**24 the integers are all the float32 there are, so that adding this rounds
# half to even and leaves the integer in the lowest bits.
_ROUND = 12582912.0
_ROUND_BITS = 0x4B400000


def _dp4a_asm() -> str:
  """Four words of codes ($4..7), four planes of four activation words ($8..23).

  Output p is the sum over the words of the products of plane p. Codes of plane p are left where
  they stand, 2p bits up: the shift is done once, on the sum.
  """
  lines = [".reg .b32 codes;"]
  for plane in range(4):
    mask = f"0x{(3 << 2 * plane) * 0x01010101:08x}"
    for word in range(4):
      total = f"${plane}" if word else "0"
      lines.append(f"and.b32 codes, ${4 + word}, {mask};")
      lines.append(f"dp4a.u32.s32 ${plane}, codes, ${8 + 4 * plane + word}, {total};")
  return "{" + " ".join(lines) + "}"


_DP4A = _dp4a_asm()


@dataclasses.dataclass(frozen=True)
class Ops:
  """Operations that are inline assembly on the GPU and plain arithmetic in interpret mode."""

  interpret: bool

  def opaque(self, v: Array) -> Array:
    """Hide what v is from the compiler: its layout is then not derived from v's contents."""
    if self.interpret:
      return v
    return plgpu.elementwise_inline_asm(
      "mov.b32 $0, $1;",
      args=[v],
      constraints="=r,r",
      pack=1,
      result_shape_dtypes=[jax.ShapeDtypeStruct(v.shape, v.dtype)],
    )[0]

  def dot(self, w_RxW: Array, x: list[Array]) -> Array:
    """Sum codes times activations: int32 [R, 32], one for each block of 64 elements.

    Args:
      w_RxW: int32 [R, 128], four bytes of codes each.
      x: Four planes, int32 [R, 128], four activations to a word.
    """
    if self.interpret:
      total = jnp.zeros(w_RxW.shape, jnp.int32)
      for plane, x_RxW in enumerate(x):
        for byte in range(4):
          code = (w_RxW >> (8 * byte + 2 * plane)) & 3
          total += code * ((x_RxW << (24 - 8 * byte)) >> 24)
      return total.reshape(-1, _LANES, 4).sum(-1)
    [sums] = plgpu.elementwise_inline_asm(
      _DP4A,
      args=[w_RxW, *x],
      constraints="=&r,=&r,=&r,=&r" + ",r" * 20,
      pack=4,
      result_shape_dtypes=[jax.ShapeDtypeStruct(w_RxW.shape, jnp.int32)],
    )
    sums = sums.reshape(-1, _LANES, 4)
    return (sums >> (2 * lax.broadcasted_iota(jnp.int32, sums.shape, 2))).sum(-1)

  def block_sums(self, x: list[Array]) -> Array:
    """Sum the activations of each block of 64: int32 [R, 32], every row the same."""
    total = jnp.zeros_like(x[0])
    for plane in x:
      if self.interpret:
        total += sum((plane << (24 - 8 * byte)) >> 24 for byte in range(4))
      else:
        [total] = plgpu.elementwise_inline_asm(
          "dp4a.s32.s32 $0, $1, 0x01010101, $2;",
          args=[plane, total],
          constraints="=r,r,r",
          pack=1,
          result_shape_dtypes=[jax.ShapeDtypeStruct(total.shape, jnp.int32)],
        )
    return total.reshape(-1, _LANES, 4).sum(-1)


def words(bytes_: Array) -> Array:
  """Pack four uint8 or int8 into an int32, the first lowest; the GPU needs no instruction for it."""
  *lead, count = bytes_.shape
  v = bytes_.astype(jnp.int32).reshape(*lead, count // 4, 4) & 255
  return jnp.sum(v << (8 * lax.broadcasted_iota(jnp.int32, v.shape, v.ndim - 1)), axis=-1)


def round_bits(v: Array) -> Array:
  """Round float32 |v| < 2**22 half to even: an int32 whose low byte is the result, if it fits int8."""
  return lax.bitcast_convert_type(v + _ROUND, jnp.int32) - _ROUND_BITS


@dataclasses.dataclass(frozen=True)
class Unit:
  """The rows and tiles that a program multiplies at once, as the rows of one array.

  Row v of the array is tile `v // rows % tiles` of row `v % rows` of part `v // (rows * tiles)`: each
  warp has all tiles and parts of its rows, so that adding them up needs no other warp.
  """

  rows: int
  tiles: int
  parts: int = 1

  @property
  def count(self) -> int:
    return self.rows * self.tiles * self.parts

  def row(self) -> Array:
    return lax.rem(jnp.arange(self.count), self.rows)

  def tile(self) -> Array:
    return lax.rem(lax.div(jnp.arange(self.count), self.rows), self.tiles)

  def part(self) -> Array:
    return lax.div(jnp.arange(self.count), self.rows * self.tiles)

  def add_up(self, v: Array) -> Array:
    """Add [count, 32] up to [parts, rows]; tiles come first, as a lane adds those alone."""
    return v.reshape(self.parts, self.tiles, self.rows, _LANES).sum(1).sum(-1)

  def load(
    self, codes_ref, scales_ref, layer: Array, first: Array, end: int, tile: Array, group: int
  ) -> tuple[Array, Array]:
    """Load codes int32 [count, 128] and scales [count, 32].

    Args:
      first: The first row of part 0; part 1 has row `first + end` first, and so on.
      end: Rows of a part: from there on nothing is read and sums are garbage.
      tile: The first tile. Elements past the matrix's width are read as zeros.
    """
    width = codes_ref.shape[-1]
    inside = first + self.row() < end
    row = (first + self.row() + self.part() * end)[:, None]
    column = ((tile + self.tile()) * _BYTES)[:, None] + jnp.arange(_BYTES)[None, :]
    block = ((tile + self.tile()) * _LANES)[:, None] + jnp.arange(_LANES)[None, :]
    used = jnp.broadcast_to(inside[:, None], column.shape)
    used_scale = jnp.broadcast_to(inside[:, None], block.shape)
    other = None
    if width % (_BYTES * self.tiles):
      used, used_scale, other = used & (column < width), used_scale & (block * 16 < width), 0
    codes = plgpu.load(
      codes_ref.at[layer, row, column], mask=used, other=other, eviction_policy="evict_first"
    )
    scales = plgpu.load(
      scales_ref.at[layer, row, block * 64 // group], mask=used_scale, other=other
    )
    return words(codes), scales

  def load_planes(self, ref, program: Array) -> list[Array]:
    """Load the activations that `store_planes` kept: for each plane int32 [count, 128].

    Loaded in the shape of the codes: every lane gets what it multiplies, and nothing has to be
    exchanged between lanes.
    """
    start = (self.tile() * TILE)[:, None] + jnp.arange(_BYTES)[None, :]
    return [words(plgpu.load(ref.at[program, start + plane * _BYTES])) for plane in range(4)]


def store_planes(ref, program: Array, q_K: Array) -> None:
  """Keep activations, int32 in int8's range, tile by tile and in a tile plane by plane."""
  i = jnp.arange(q_K.shape[0])
  within = lax.rem(i, TILE)
  at = i - within + lax.rem(within, 4) * _BYTES + lax.div(within, 4)
  plgpu.store(ref.at[program, at], q_K.astype(jnp.int8))
