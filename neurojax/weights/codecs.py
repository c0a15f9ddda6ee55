"""The bit layouts in which files keep ternary weights, both ways, exactly, in NumPy.

Each codec turns the bytes of a tensor into rows of the packing that `weights.ternary` defines, and back.
Nothing passes through floating point: scales keep their bits, and a tensor that decodes encodes
to the bytes it came from.

Sources: ggml, ggml-common.h `block_*` and ggml-quants.c `dequantize_row_*` (TQ1_0, TQ2_0, Q2_0);
microsoft/BitNet, ggml-bitnet-mad.cpp (I2_S); PrismML's llama.cpp, ggml-common.h (PQ2_0, and the
group of 128 under the number of Q2_0).
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float, Float32, UInt8

# Code bytes worked on at a time: chunk and temporaries stay in a core's cache.
_CHUNK_BYTES = 1 << 18
_HALF = np.dtype("<f2")
_SINGLE = np.dtype("<f4")


class _Stray(Exception):
  """A byte of a block that no encoder writes."""

  def __init__(self, block: int, what: str) -> None:
    self.block, self.what = block, what


@dataclasses.dataclass(frozen=True)
class Codec:
  """One ternary type of ggml. A tensor of N rows and K columns is N * K / block blocks.

  Attributes:
    name: The name that ggml gives, with the group where two types share a number.
    type_id: The number in the file.
    block: Elements per block; K is a multiple of it.
    scale_at: Byte of the block where its float16 scale begins; None: the blocks hold codes alone,
      and one float32 scale stands behind all of them.
    code_at, code_bytes: Offset and size of the codes in a block.
    decode: Code bytes [blocks, code_bytes] to ours [blocks, block / 4], or a `_Stray`; a code 3 is
      for the caller to find.
    encode: Its inverse on codes 0, 1 and 2.
  """

  name: str
  type_id: int
  block: int
  scale_at: int | None
  code_at: int
  code_bytes: int
  decode: Callable[[np.ndarray], np.ndarray]
  encode: Callable[[np.ndarray], np.ndarray]

  @property
  def group_size(self) -> int | None:
    """Number of elements that share a scale; None if all of the tensor do."""
    return None if self.scale_at is None else self.block

  @property
  def scale_dtype(self) -> np.dtype:
    return _SINGLE if self.scale_at is None else _HALF

  @property
  def block_bytes(self) -> int:
    return self.code_bytes + (0 if self.scale_at is None else _HALF.itemsize)

  def nbytes(self, rows: int, k: int) -> int:
    """Number of bytes of a tensor. Raises: ValueError: k is not a multiple of the block."""
    if k < 1 or k % self.block:
      raise ValueError(f"rows of {k} elements are no whole {self.name} blocks of {self.block}")
    tail = _SINGLE.itemsize if self.scale_at is None else 0
    return rows * k // self.block * self.block_bytes + tail

  def unpack(
    self, raw: UInt8[np.ndarray, "bytes"], rows: int, k: int
  ) -> tuple[UInt8[np.ndarray, "N Y"], Float[np.ndarray, "#N Q"]]:
    """Unpacks the codes and scales of a tensor, a few rows at a time.

    Args:
      raw: The tensor's bytes, exactly `nbytes(rows, k)`; need not be aligned.
    Returns: Codes [rows, k / 4], and scales: float16 [rows, k / block], or float32 [1, 1].
    Raises: ValueError: another number of bytes, a code that is not ternary, or a scale that is not
      finite; it names the row and the element.
    """
    nbytes = self.nbytes(rows, k)
    if raw.shape != (nbytes,):
      raise ValueError(f"{raw.size} bytes: {rows} rows of {k} {self.name} elements are {nbytes}")
    blocks = raw[: rows * k // self.block * self.block_bytes].reshape(rows, -1, self.block_bytes)
    scales = self._scales(raw, blocks)
    codes = np.empty((rows, k // 4), np.uint8)
    step = max(1, _CHUNK_BYTES // (k // 4))
    for first in range(0, rows, step):
      chunk = slice(first, first + step)
      theirs = blocks[chunk, :, self.code_at : self.code_at + self.code_bytes]
      try:
        ours = self.decode(theirs.reshape(-1, self.code_bytes)).reshape(-1, k // 4)
      except _Stray as stray:
        row, block = divmod(first * (k // self.block) + stray.block, k // self.block)
        raise ValueError(f"row {row}, block {block}: {stray.what}") from None
      check_codes(ours, first)
      codes[chunk] = ours
    return codes, scales

  def pack(
    self, codes: UInt8[np.ndarray, "N Y"], scales: Float[np.ndarray, "#N Q"]
  ) -> UInt8[np.ndarray, "bytes"]:
    """Packs a tensor whose rows have K = 4 Y elements into bytes: the inverse of `unpack`.

    Raises: ValueError: rows that are no whole blocks, scales of another dtype or grouping or not
      finite, or a code that is not ternary.
    """
    rows, k = codes.shape[0], 4 * codes.shape[1]
    raw = np.empty(self.nbytes(rows, k), np.uint8)
    wanted = (1, 1) if self.scale_at is None else (rows, k // self.block)
    if scales.shape != wanted or scales.dtype != self.scale_dtype:
      raise ValueError(
        f"scales are {scales.dtype} {scales.shape}: {rows} rows of {k} {self.name} elements have"
        f" {self.scale_dtype} {wanted}"
      )
    _check_scales(scales, self.group_size)
    blocks = raw[: rows * k // self.block * self.block_bytes].reshape(rows, -1, self.block_bytes)
    if self.scale_at is None:
      raw[-_SINGLE.itemsize :] = scales.reshape(1).view(np.uint8)
    else:
      stored = np.ascontiguousarray(scales).view(np.uint8).reshape(rows, -1, _HALF.itemsize)
      blocks[:, :, self.scale_at : self.scale_at + _HALF.itemsize] = stored
    step = max(1, _CHUNK_BYTES // (k // 4))
    for first in range(0, rows, step):
      chunk = slice(first, first + step)
      check_codes(codes[chunk], first)
      theirs = self.encode(np.ascontiguousarray(codes[chunk]).reshape(-1, self.block // 4))
      into = blocks[chunk, :, self.code_at : self.code_at + self.code_bytes]
      into[...] = theirs.reshape(into.shape)
    return raw

  def _scales(self, raw: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    if self.scale_at is None:
      scales = raw[-_SINGLE.itemsize :].copy().view(_SINGLE).reshape(1, 1)
    else:
      stored = blocks[:, :, self.scale_at : self.scale_at + _HALF.itemsize]
      # A copy even of a single block: `raw` may be a map of a file.
      scales = stored.copy(order="C").view(_HALF)[..., 0]
    _check_scales(scales, self.group_size)
    return scales


def check_codes(codes: UInt8[np.ndarray, "N Y"], first_row: int = 0) -> None:
  """Raises: ValueError: a code is 3; rows are counted from `first_row`."""
  # Y is a multiple of 16, see `weights.ternary`.
  words = np.ascontiguousarray(codes).view(np.uint64)
  if (words & words >> np.uint64(1) & np.uint64(0x5555555555555555)).any():
    row, byte = np.argwhere(codes & codes >> 1 & 0x55)[0]
    field = next(j for j in range(4) if codes[row, byte] >> 2 * j & 3 == 3)
    raise ValueError(
      f"row {first_row + row}, element {4 * byte + field}: the code 3 is not ternary: 0, 1 and 2 are"
    )


def dequantize(
  codes: UInt8[np.ndarray, "N Y"], scales: Float[np.ndarray, "#N Q"], group_size: int | None
) -> Float32[np.ndarray, "N K"]:
  """Dequantises whole rows to float32, padding included (K = 4 Y)."""
  w = _VALUES[codes].reshape(len(codes), -1)
  s = scales.astype(np.float32)
  if group_size is None:
    w *= s
  else:
    # A last group may reach beyond the padding.
    whole = w.shape[1] // group_size * group_size
    w[:, :whole].reshape(len(w), -1, group_size)[...] *= s[:, : whole // group_size, None]
    w[:, whole:] *= s[:, whole // group_size :]
  return w


def _check_scales(scales: np.ndarray, group_size: int | None) -> None:
  if not np.isfinite(scales).all():
    row, group = np.argwhere(~np.isfinite(scales))[0]
    where = "the tensor" if group_size is None else f"row {row}, elements from {group * group_size}"
    raise ValueError(f"{where}: the scale is {scales[row, group]}: it must be finite")


def gather(fields: np.ndarray) -> np.ndarray:
  """Packs bytes [..., 4 n] that hold one code each into bytes [..., n] that hold four."""
  words = fields.view("<u4")
  # Field s moves from bit 8 s to bit 24 + 2 s; no two of the products share a bit.
  return (words * np.uint32(1 << 24 | 1 << 18 | 1 << 12 | 1 << 6) >> np.uint32(24)).astype(np.uint8)


def spread(codes: np.ndarray) -> np.ndarray:
  """Unpacks four codes from each byte: the inverse of `gather`."""
  words = codes.astype("<u4")
  words = (words | words << np.uint32(12)) & np.uint32(0x000F000F)
  words = (words | words << np.uint32(6)) & np.uint32(0x03030303)
  return words.view(np.uint8)


def _planar(shifts: tuple[int, ...]) -> tuple[Callable, Callable]:
  """Lays out 128 elements in 32 bytes: element 32 p + j is in byte j at bit shifts[p]."""

  def decode(theirs: np.ndarray) -> np.ndarray:
    words = np.ascontiguousarray(theirs).reshape(-1, 32).view("<u4")
    planes = [
      (words >> np.uint32(shift) & np.uint32(0x03030303)).view(np.uint8) for shift in shifts
    ]
    return np.stack([gather(plane) for plane in planes], axis=1)

  def encode(ours: np.ndarray) -> np.ndarray:
    planes = spread(ours.reshape(-1, 32)).reshape(-1, 4, 32)
    return np.bitwise_or.reduce([planes[:, p] << shift for p, shift in enumerate(shifts)])

  return decode, encode


# TQ1_0 keeps 240 elements as digits of base 3, five to a byte, and 16 as four to a byte. Of a run of
# W bytes with P digits each, element p W + j is digit p of byte j: (first byte, W, P).
_RUNS = ((0, 32, 5), (32, 16, 5), (48, 4, 4))
# For each p, where its digits stand among four times four bytes of theirs, and among ours.
_PLANES = tuple(
  tuple(
    (slice(first // 4, (first + w) // 4), slice(at + p * w // 4, at + (p + 1) * w // 4))
    for (first, w, count), at in zip(_RUNS, (0, 40, 60), strict=True)
    if p < count
  )
  for p in range(5)
)


def _decode_base3(theirs: np.ndarray) -> np.ndarray:
  """A byte x = ceil(256 v / 243) holds the digits of v, the highest first: digit p is the whole part
  of 3 * (x * 3**p mod 256) / 256."""
  x = theirs.copy(order="C")
  ours = np.empty((len(x), 64), np.uint8)
  for plane in _PLANES:
    # 3 x reaches 256 at 86 and 512 at 171.
    digits = (x > 85).view(np.uint8) + (x > 170).view(np.uint8)
    packed = gather(digits)
    for in_theirs, in_ours in plane:
      ours[:, in_ours] = packed[:, in_theirs]
    x *= np.uint8(3)
  # x, times 3**5 by now, is the distance from 256 v / 243 in 243rds; behind the four digits of the
  # last run stands a zero.
  stray = x >= 243
  stray[:, 48:] |= digits[:, 48:] > 0
  if stray.any():
    block, byte = (int(i) for i in np.argwhere(stray)[0])
    count = 5 if byte < 48 else 4
    raise _Stray(
      block, f"byte {byte} is {theirs[block, byte]}, which encodes no {count} digits of base 3"
    )
  return ours


def _encode_base3(ours: np.ndarray) -> np.ndarray:
  value = np.zeros((len(ours), 52), np.uint8)
  for plane in _PLANES:
    packed = np.zeros((len(ours), 13), np.uint8)
    for in_theirs, in_ours in plane:
      packed[:, in_theirs] = ours[:, in_ours]
    value *= np.uint8(3)
    value += spread(packed)
  return _CEILING[value]


def _same(codes: np.ndarray) -> np.ndarray:
  return codes


_CEILING = ((np.arange(256) * 256 + 242) // 243).astype(np.uint8)
_VALUES = np.stack([(np.arange(256) >> 2 * j & 3) - 1 for j in range(4)], axis=1).astype(np.float32)

CODECS: Mapping[str, Codec] = {
  codec.name: codec
  for codec in (
    Codec("TQ1_0", 34, 256, 52, 0, 52, _decode_base3, _encode_base3),
    Codec("TQ2_0", 35, 256, 64, 0, 64, *_planar((0, 2, 4, 6))),
    # The layout that microsoft/BitNet writes on x86; its ARM layout has the same number and no mark.
    Codec("I2_S", 36, 128, None, 0, 32, *_planar((6, 4, 2, 0))),
    Codec("Q2_0 (group 64)", 42, 64, 0, 2, 16, _same, _same),
    Codec("Q2_0 (group 128)", 42, 128, 0, 2, 32, _same, _same),
    Codec("PQ2_0", 142, 128, 0, 2, 32, _same, _same),
  )
}
"""Codecs by the name of the type. Only the tensor's size tells the two types of number 42 apart."""
