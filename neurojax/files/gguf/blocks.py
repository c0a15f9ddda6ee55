"""Splits the quantized blocks of ggml into integers and scales, exactly, as `weights.grouped` keeps them.

Sources: ggml, ggml-common.h `block_*` and ggml-quants.c `dequantize_row_*`. Types whose codes index a
table of vectors (IQ1 to IQ3) are looked up by the gguf package, on blocks whose scales are set to one.
"""

import dataclasses
from collections.abc import Callable, Mapping

import gguf.quants
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from jaxtyping import UInt8

from neurojax.forms import Grouped
from neurojax.weights.rows import GroupedRows

# Elements worked on at a time: blocks and temporaries stay small.
_CHUNK_ELEMENTS = 1 << 18
_ONE = np.float16(1).tobytes()

_Parts = tuple[np.ndarray, ...]
"""The unpacked parts of M blocks: codes [M, block], then the arrays of the form in the order of
`GroupedRows`, each [M, groups]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
  """One quantized type of ggml.

  Attributes:
    type: The name of the type.
    block: Elements of a block.
    block_bytes: Bytes of a block.
    form: The form that its matrices have in memory.
    split: Splits blocks [M, bytes] into the arrays of the form.
  """

  type: str
  block: int
  block_bytes: int
  form: Grouped
  split: Callable[[UInt8[np.ndarray, "M bytes"]], _Parts]

  def rows(self, raw: UInt8[np.ndarray, "bytes"], n: int, k: int) -> GroupedRows:
    """Unpack a tensor's bytes to a matrix. They may be a map of a file: the result shares no memory with
    them.

    Raises: ValueError: not the bytes of n rows of k elements.
    """
    if k % self.block or raw.shape != (n * k // self.block * self.block_bytes,):
      raise ValueError(f"{raw.size} bytes are no {n} rows of {k} {self.type} elements")
    blocks = raw.reshape(-1, self.block_bytes)
    step = max(1, _CHUNK_ELEMENTS // self.block)
    wholes: list[np.ndarray] = []
    for first in range(0, len(blocks), step):
      # A damaged scale may be infinite or none: `GroupedRows.check_finite` says so, not a warning.
      with np.errstate(all="ignore"):
        parts = self.split(blocks[first : first + step])
      if not wholes:
        wholes = [np.empty((len(blocks), part.shape[1]), part.dtype) for part in parts]
      for whole, part in zip(wholes, parts, strict=True):
        whole[first : first + step] = part
    codes, scales, *more = (whole.reshape(n, -1) for whole in wholes)
    parents = more.pop(0) if self.form.parent else None
    minima = more.pop(0) if self.form.minima != "none" else None
    return GroupedRows(self.form, codes, scales, parents, minima, more.pop(0) if more else None)


def _half(stored: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(stored).view("<f2")


def _nibbles(stored: np.ndarray, run: int) -> np.ndarray:
  """Split runs of bytes into 4-bit numbers: the low halves of a run come before its high halves."""
  runs = stored.reshape(len(stored), -1, 1, run)
  both = np.concatenate([runs & np.uint8(15), runs >> np.uint8(4)], axis=2)
  return both.reshape(len(stored), -1)


def _fields(stored: np.ndarray, run: int, bits: int) -> np.ndarray:
  """Split runs of bytes into numbers of `bits`: the lowest bits of all bytes of a run come first."""
  shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
  runs = stored.reshape(len(stored), -1, 1, run) >> shifts & np.uint8((1 << bits) - 1)
  return runs.reshape(len(stored), -1)


def _fifth_bits(stored: np.ndarray) -> np.ndarray:
  """The fifth bits, worth 16: bit i of a little-endian uint32 belongs to element i."""
  return np.unpackbits(stored, axis=1, bitorder="little") << np.uint8(4)


def _q4_0(b: np.ndarray) -> _Parts:
  return _nibbles(b[:, 2:], 16), _half(b[:, :2])


def _q4_1(b: np.ndarray) -> _Parts:
  return _nibbles(b[:, 4:], 16), _half(b[:, :2]), _half(b[:, 2:4])


def _q5_0(b: np.ndarray) -> _Parts:
  return _nibbles(b[:, 6:], 16) | _fifth_bits(b[:, 2:6]), _half(b[:, :2])


def _q5_1(b: np.ndarray) -> _Parts:
  codes = _nibbles(b[:, 8:], 16) | _fifth_bits(b[:, 4:8])
  return codes, _half(b[:, :2]), _half(b[:, 2:4])


def _q8_0(b: np.ndarray) -> _Parts:
  # Adding 128 to an int8 turns its highest bit.
  return b[:, 2:] ^ np.uint8(128), _half(b[:, :2])


def _q8_k(b: np.ndarray) -> _Parts:
  return b[:, 4:260] ^ np.uint8(128), np.ascontiguousarray(b[:, :4]).view("<f4")


def _q1_0(b: np.ndarray) -> _Parts:
  # Codes 0 and 2 for -1 and 1.
  return np.unpackbits(b[:, 2:], axis=1, bitorder="little") << np.uint8(1), _half(b[:, :2])


def _q2_k(b: np.ndarray) -> _Parts:
  scales = b[:, :16]
  return (
    _fields(b[:, 16:80], 32, 2),
    (scales & np.uint8(15)).view(np.int8),
    _half(b[:, 80:82]),
    scales >> np.uint8(4),
    -_half(b[:, 82:84]),
  )


def _q3_k(b: np.ndarray) -> _Parts:
  high = _fields(b[:, :32], 32, 1)
  codes = _fields(b[:, 32:96], 32, 2) | high << np.uint8(2)
  packed = b[:, 96:108]
  scales = np.concatenate([packed[:, :8] & np.uint8(15), packed[:, :8] >> np.uint8(4)], axis=1)
  scales |= _fields(packed[:, 8:], 4, 2) << np.uint8(4)
  return codes, scales.astype(np.int8) - np.int8(32), _half(b[:, 108:110])


def _six_bits(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The 8 scales and 8 minima in 12 bytes of Q4_K and Q5_K."""
  low, middle, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
  six, four = np.uint8(63), np.uint8(15)
  scales = [low & six, high & four | low >> np.uint8(2) & np.uint8(48)]
  minima = [middle & six, high >> np.uint8(4) | middle >> np.uint8(2) & np.uint8(48)]
  return np.concatenate(scales, axis=1).view(np.int8), np.concatenate(minima, axis=1)


def _q4_k(b: np.ndarray) -> _Parts:
  scales, minima = _six_bits(b[:, 4:16])
  return _nibbles(b[:, 16:], 32), scales, _half(b[:, :2]), minima, -_half(b[:, 2:4])


def _q5_k(b: np.ndarray) -> _Parts:
  scales, minima = _six_bits(b[:, 4:16])
  codes = _nibbles(b[:, 48:], 32) | _fields(b[:, 16:48], 32, 1) << np.uint8(4)
  return codes, scales, _half(b[:, :2]), minima, -_half(b[:, 2:4])


def _q6_k(b: np.ndarray) -> _Parts:
  codes = _nibbles(b[:, :128], 64) | _fields(b[:, 128:192], 32, 2) << np.uint8(4)
  return codes, b[:, 192:208].view(np.int8), _half(b[:, 208:210])


_IQ4 = np.array(
  [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8
).view(np.uint8) ^ np.uint8(128)
# Twice the values of E2M1, 12 above zero.
_FP4 = (12 + np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])).astype(np.uint8)


def _iq4_nl(b: np.ndarray) -> _Parts:
  return _IQ4[_nibbles(b[:, 2:], 16)], _half(b[:, :2])


def _iq4_xs(b: np.ndarray) -> _Parts:
  low = np.stack([b[:, 4:8] & np.uint8(15), b[:, 4:8] >> np.uint8(4)], axis=2).reshape(-1, 8)
  high = b[:, 2:4, None] >> np.arange(0, 8, 2, dtype=np.uint8) & np.uint8(3)
  scales = low | high.reshape(-1, 8) << np.uint8(4)
  return _IQ4[_nibbles(b[:, 8:], 16)], scales.astype(np.int8) - np.int8(32), _half(b[:, :2])


def _mxfp4(b: np.ndarray) -> _Parts:
  # Half of 2**(e - 127), which for e < 2 is a subnormal.
  e = b[:, :1].astype(np.uint32)
  bits = np.where(e < 2, np.uint32(0x00200000) << np.minimum(e, 1), np.maximum(e, 1) - 1 << 23)
  return _FP4[_nibbles(b[:, 1:], 16)], bits.astype(np.uint32).view(np.float32)


def _nvfp4(b: np.ndarray) -> _Parts:
  # Unsigned E4M3, halved; 0x7F, and zero, stand for zero. The sign bit is not looked at.
  exponent, mantissa = b[:, :4] >> 3 & 15, (b[:, :4] & 7).astype(np.float32)
  normal = (8 + mantissa) * np.exp2(exponent.astype(np.float32) - 11)
  scales = np.where(exponent == 0, mantissa * np.float32(2**-10), normal)
  scales = np.where((b[:, :4] == 0) | (b[:, :4] == 0x7F), 0, scales)
  return _FP4[_nibbles(b[:, 4:], 8)], scales.astype(np.float16)


def _looked_up(
  kind: str, unit: int, offset: int, unscaled: Callable[[np.ndarray], None]
) -> Callable[[np.ndarray], np.ndarray]:
  """Make the function that looks up the codes of a type with the gguf package's decoder.

  `unscaled` sets a block's scale to one and the scales of its groups to the smallest; the decoder
  then gives multiples of 1 / unit, which `unit` and `offset` turn into codes.
  """
  qtype = GGMLQuantizationType[kind]

  def codes(b: np.ndarray) -> np.ndarray:
    ones = b.copy()
    unscaled(ones)
    return (gguf.quants.dequantize(ones, qtype) * unit + offset).astype(np.uint8)

  return codes


def _words(b: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(b).view("<u4")


def _odd(scales: np.ndarray) -> np.ndarray:
  """The factors 2 s + 1 of the block's scale that stored group scales s stand for."""
  return (2 * scales.astype(np.int8) + 1).astype(np.int8)


def _parent(stored: np.ndarray, factor: float) -> np.ndarray:
  return _half(stored).astype(np.float32) * np.float32(factor)


def _pairs(stored: np.ndarray) -> np.ndarray:
  """Split each byte into its low half and its high half, in this order."""
  halves = [stored & np.uint8(15), stored >> np.uint8(4)]
  return np.stack(halves, axis=2).reshape(len(stored), -1)


def _set_one(b: np.ndarray) -> None:
  b[:, :2] = np.frombuffer(_ONE, np.uint8)


def _clear_tops(first: int, step: int) -> Callable[[np.ndarray], None]:
  """Make the function that clears group scales in the highest four bits of every `step` bytes."""

  def unscaled(b: np.ndarray) -> None:
    _set_one(b)
    b[:, first + step - 1 :: step] &= np.uint8(15)

  return unscaled


def _clear(start: int, stop: int) -> Callable[[np.ndarray], None]:
  def unscaled(b: np.ndarray) -> None:
    _set_one(b)
    b[:, start:stop] = 0

  return unscaled


def _clear_iq3_xxs(b: np.ndarray) -> None:
  _set_one(b)
  b[:, 69::4] &= np.uint8(15)


def _clear_iq1_s(b: np.ndarray) -> None:
  _set_one(b)
  b[:, 35::2] &= np.uint8(0x8F)


def _clear_iq1_m(b: np.ndarray) -> None:
  # The float16 stands in the highest four bits of four words of group scales, its lowest bits first.
  b[:, 48:56] = np.array([0x0000, 0x0000, 0xC000, 0x3000], "<u2").view(np.uint8)


_IQ2_XXS = _looked_up("IQ2_XXS", 8, 128, _clear_tops(2, 8))
_IQ2_XS = _looked_up("IQ2_XS", 8, 128, _clear(66, 74))
_IQ2_S = _looked_up("IQ2_S", 8, 128, _clear(74, 82))
_IQ3_XXS = _looked_up("IQ3_XXS", 4, 128, _clear_iq3_xxs)
_IQ3_S = _looked_up("IQ3_S", 1, 128, _clear(106, 110))
_IQ1_S = _looked_up("IQ1_S", 8, 16, _clear_iq1_s)
_IQ1_M = _looked_up("IQ1_M", 8, 16, _clear_iq1_m)


def _iq2_xxs(b: np.ndarray) -> _Parts:
  scales = (_words(b[:, 2:])[:, 1::2] >> 28).astype(np.uint8)
  return _IQ2_XXS(b), _odd(scales), _parent(b[:, :2], 1 / 8)


def _iq2_xs(b: np.ndarray) -> _Parts:
  return _IQ2_XS(b), _odd(_pairs(b[:, 66:74])), _parent(b[:, :2], 1 / 8)


def _iq2_s(b: np.ndarray) -> _Parts:
  return _IQ2_S(b), _odd(_pairs(b[:, 74:82])), _parent(b[:, :2], 1 / 8)


def _iq3_xxs(b: np.ndarray) -> _Parts:
  scales = (_words(b[:, 66:]) >> 28).astype(np.uint8)
  return _IQ3_XXS(b), _odd(scales), _parent(b[:, :2], 1 / 4)


def _iq3_s(b: np.ndarray) -> _Parts:
  return _IQ3_S(b), _odd(_pairs(b[:, 106:110])), _half(b[:, :2])


def _iq1_s(b: np.ndarray) -> _Parts:
  return _IQ1_S(b), _odd(b[:, 35::2] >> np.uint8(4) & np.uint8(7)), _parent(b[:, :2], 1 / 8)


def _iq1_m(b: np.ndarray) -> _Parts:
  words = np.ascontiguousarray(b[:, 48:56]).view("<u2")
  shifts = np.array([0, 4, 8, 12], np.uint16)
  parent = np.bitwise_or.reduce(words >> np.uint16(12) << shifts, axis=1, keepdims=True)
  scales = words[:, :, None] >> np.array([0, 3, 6, 9], np.uint16) & np.uint16(7)
  return (
    _IQ1_M(b),
    _odd(scales.reshape(-1, 16)),
    _parent(parent.astype("<u2").view(np.uint8), 1 / 8),
  )


def _blocks(
  kind: str, bits: int, offset: int, group: int, split: Callable, **form: object
) -> Blocks:
  # A type that the package counts wrongly: a block of it has two float16 beside its codes.
  block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
  wanted = Grouped(
    bits=bits,
    offset=offset,
    group_size=group,
    **({"scale": "float16"} | form),  # type: ignore[arg-type]
  )
  return Blocks(type=kind, block=block, block_bytes=block_bytes, form=wanted, split=split)


BLOCKS: Mapping[str, Blocks] = {
  blocks.type: blocks
  for blocks in (
    _blocks("Q4_0", 4, 8, 32, _q4_0),
    _blocks("Q4_1", 4, 0, 32, _q4_1, minima="minimum"),
    _blocks("Q5_0", 5, 16, 32, _q5_0),
    _blocks("Q5_1", 5, 0, 32, _q5_1, minima="minimum"),
    _blocks("Q8_0", 8, 128, 32, _q8_0),
    _blocks("Q8_K", 8, 128, 256, _q8_k, scale="float32"),
    _blocks("Q1_0", 2, 1, 128, _q1_0),
    _blocks("Q2_K", 2, 0, 16, _q2_k, parent=True, minima="minimum"),
    _blocks("Q3_K", 3, 4, 16, _q3_k, parent=True),
    _blocks("Q4_K", 4, 0, 32, _q4_k, parent=True, minima="minimum"),
    _blocks("Q5_K", 5, 0, 32, _q5_k, parent=True, minima="minimum"),
    _blocks("Q6_K", 6, 32, 16, _q6_k, parent=True),
    _blocks("IQ4_NL", 8, 128, 32, _iq4_nl),
    _blocks("IQ4_XS", 8, 128, 32, _iq4_xs, parent=True),
    _blocks("IQ2_XXS", 8, 128, 32, _iq2_xxs, parent=True, scale="float32"),
    _blocks("IQ2_XS", 8, 128, 16, _iq2_xs, parent=True, scale="float32"),
    _blocks("IQ2_S", 8, 128, 16, _iq2_s, parent=True, scale="float32"),
    _blocks("IQ3_XXS", 8, 128, 32, _iq3_xxs, parent=True, scale="float32"),
    _blocks("IQ3_S", 8, 128, 32, _iq3_s, parent=True),
    _blocks("IQ1_S", 5, 16, 32, _iq1_s, parent=True, scale="float32"),
    _blocks("IQ1_M", 5, 16, 16, _iq1_m, parent=True, scale="float32"),
    _blocks("MXFP4", 5, 12, 32, _mxfp4, scale="float32"),
    _blocks("NVFP4", 5, 12, 16, _nvfp4),
  )
}
"""Quantized types by name. ggml's other types are plain numbers, or ternary: `weights.codecs`."""
