"""File layouts of ternary weights against their descriptions written out byte by byte, and gguf's."""

import tracemalloc

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurojax.weights import codecs
from neurojax.weights.codecs import CODECS, Codec
from neurojax.weights.quantize import pack_rows, unpack_rows
from tests.weights.literal import read_literally, weights

every = pytest.mark.parametrize("codec", CODECS.values(), ids=lambda codec: codec.name)


@every
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 5), blocks=st.integers(1, 3), seed=st.integers(0, 999))
def test_packed_bytes_mean_what_the_format_says(codec: Codec, rows: int, blocks: int, seed: int):
  w_NxK, scales = weights(codec, rows, blocks, seed)
  raw = codec.pack(pack_rows(w_NxK), scales)
  assert raw.size == codec.nbytes(*w_NxK.shape)
  found = read_literally(codec.name, raw.tobytes(), w_NxK.size)
  assert [element for element, _ in found] == w_NxK.ravel().tolist()
  spread = (
    np.broadcast_to(scales, w_NxK.shape)
    if codec.group_size is None
    else np.repeat(scales, codec.block, 1)
  )
  assert [scale for _, scale in found] == spread.astype(np.float64).ravel().tolist()


@every
@settings(max_examples=15, deadline=None)
@given(
  rows=st.integers(1, 9),
  blocks=st.integers(1, 3),
  seed=st.integers(0, 999),
  chunk=st.sampled_from([1, 100, 1 << 18]),
)
def test_round_trips_keep_every_bit(codec: Codec, rows: int, blocks: int, seed: int, chunk: int):
  w_NxK, scales = weights(codec, rows, blocks, seed)
  codes = pack_rows(w_NxK)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(codecs, "_CHUNK_BYTES", chunk)
    raw = codec.pack(codes, scales)
    # As it lies in a file: read-only, at an odd address.
    shifted = np.frombuffer(b"x" + raw.tobytes(), np.uint8)[1:]
    codes_again, scales_again = codec.unpack(shifted, *w_NxK.shape)
    np.testing.assert_array_equal(codec.pack(codes_again, scales_again), raw)
  np.testing.assert_array_equal(codes_again, codes)
  np.testing.assert_array_equal(unpack_rows(codes_again, w_NxK.shape[1]), w_NxK)
  assert scales_again.dtype == scales.dtype and scales_again.tobytes() == scales.tobytes()


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
def test_bytes_and_values_are_those_of_the_gguf_package(name: str):
  codec, kind = CODECS[name], gguf.GGMLQuantizationType[name]
  w_NxK, scales = weights(codec, 7, 3, 0)
  w_NxK[:, ::256] = 1
  codes, scales = pack_rows(w_NxK), np.abs(scales)
  values = codecs.dequantize(codes, scales, codec.group_size)
  theirs = gguf.quantize(values, kind)
  np.testing.assert_array_equal(codec.pack(codes, scales).reshape(theirs.shape), theirs)
  np.testing.assert_array_equal(gguf.dequantize(theirs, kind), values)


@every
def test_values_are_codes_times_scales(codec: Codec):
  w_NxK, scales = weights(codec, 3, 2, 1)
  values = codecs.dequantize(pack_rows(w_NxK), scales, codec.group_size)
  for row, k in np.ndindex(*w_NxK.shape):
    scale = scales[0, 0] if codec.group_size is None else scales[row, k // codec.block]
    assert values[row, k] == np.float32(w_NxK[row, k]) * np.float32(scale)


@every
def test_strange_scales_are_kept_unless_they_are_not_finite(codec: Codec):
  w_NxK, scales = weights(codec, 2, 3, 2)
  codes = pack_rows(w_NxK)
  smallest = np.finfo(codec.scale_dtype).smallest_subnormal
  for scale in (-0.0, -1.5, smallest, np.finfo(codec.scale_dtype).max):
    scales[-1, -1] = scale
    kept = codec.unpack(codec.pack(codes, scales), *w_NxK.shape)[1]
    assert kept.tobytes() == scales.tobytes()
  raw = codec.pack(codes, scales)
  where = "the tensor" if codec.group_size is None else f"row 1, elements from {2 * codec.block}"
  for bad in (np.nan, np.inf, -np.inf):
    scales[-1, -1] = bad
    with pytest.raises(ValueError, match=f"{where}: the scale is {bad}"):
      codec.pack(codes, scales)
    at = raw.size - 4 if codec.scale_at is None else raw.size - codec.block_bytes + codec.scale_at
    spoiled = raw.copy()
    spoiled[at : at + scales.itemsize] = scales[-1:, -1:].view(np.uint8)
    with pytest.raises(ValueError, match=f"{where}: the scale is {bad}"):
      codec.unpack(spoiled, *w_NxK.shape)


@every
@settings(max_examples=20, deadline=None)
@given(row=st.integers(0, 4), data=st.data())
def test_a_code_that_is_not_ternary_is_found_where_it_is(
  codec: Codec, row: int, data: st.DataObject
):
  w_NxK, scales = weights(codec, 5, 2, 3)
  k = data.draw(st.integers(0, w_NxK.shape[1] - 1))
  codes = pack_rows(w_NxK)
  codes[row, k // 4] |= 3 << 2 * (k % 4)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(codecs, "_CHUNK_BYTES", 200)
    with pytest.raises(ValueError, match=f"row {row}, element {k}: the code 3"):
      codec.pack(codes, scales)
    if codec.name == "TQ1_0":
      return
    # The two-bit formats have room for it.
    patch.setattr(codecs, "check_codes", lambda *_: None)
    raw = codec.pack(codes, scales)
    patch.undo()
    with pytest.raises(ValueError, match=f"row {row}, element {k}: the code 3"):
      codec.unpack(raw, *w_NxK.shape)


def test_only_what_encodes_base_3_digits_is_read_as_tq1_0():
  codec = CODECS["TQ1_0"]
  w_NxK, scales = weights(codec, 2, 2, 4)
  raw = codec.pack(pack_rows(w_NxK), scales)
  five = {-(-v * 256 // 243) for v in range(243)}
  four = {-(-3 * v * 256 // 243) for v in range(81)}
  assert len(five) == 243 and len(four) == 81
  for at, valid in ((0, five), (31, five), (47, five), (48, four), (51, four)):
    for byte in range(256):
      spoiled = raw.copy()
      spoiled[3 * 54 + at] = byte
      if byte in valid:
        codes, kept = codec.unpack(spoiled, *w_NxK.shape)
        np.testing.assert_array_equal(codec.pack(codes, kept), spoiled)
      else:
        with pytest.raises(ValueError, match=f"row 1, block 1: byte {at} is {byte}, "):
          codec.unpack(spoiled, *w_NxK.shape)


@every
def test_wrong_sizes_are_refused_by_name(codec: Codec):
  w_NxK, scales = weights(codec, 2, 2, 5)
  codes = pack_rows(w_NxK)
  raw = codec.pack(codes, scales)
  for bad in (raw[:-1], np.append(raw, np.uint8(0)), raw[:0]):
    with pytest.raises(ValueError, match=rf"{bad.size} bytes: 2 rows .* are {raw.size}"):
      codec.unpack(bad, *w_NxK.shape)
  for k in (0, codec.block - 1, codec.block // 2):
    with pytest.raises(ValueError, match=f"rows of {k} elements are no whole"):
      codec.unpack(raw, 2, k)
  for bad_scales in (scales.astype(np.float64), scales[:, :0]):
    with pytest.raises(ValueError, match="scales are"):
      codec.pack(codes, bad_scales)


def test_numbers_are_told_apart_by_size_alone():
  by_id: dict[int, set[float]] = {}
  for codec in CODECS.values():
    by_id.setdefault(codec.type_id, set()).add(codec.nbytes(64, 256))
  assert {type_id for type_id, sizes in by_id.items() if len(sizes) > 1} == {42}
  assert by_id[42] == {64 * 4 * 18, 64 * 2 * 34}


@every
def test_memory_is_that_of_the_result_and_some_rows(codec: Codec, monkeypatch):
  monkeypatch.setattr(codecs, "_CHUNK_BYTES", 1 << 14)
  w_NxK, scales = weights(codec, 4000, 2048 // codec.block, 6)
  codes = pack_rows(w_NxK)
  raw = codec.pack(codes, scales)
  some = 24 * codecs._CHUNK_BYTES
  for work, result in (
    (lambda: codec.unpack(raw, *w_NxK.shape), codes.nbytes + scales.nbytes),
    (lambda: codec.pack(codes, scales), raw.nbytes),
  ):
    tracemalloc.start()
    work()
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < result + scales.nbytes + some < 1.5 * result
