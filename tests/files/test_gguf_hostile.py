"""Damaged and malicious GGUF files: an error that names the place, never a crash, never memory."""

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurojax.files import inspect, names
from neurojax.files.gguf.file import GgufFile
from neurojax.files.open import open_model
from tests.files import tiny

EVERY_KIND = [
  tiny.key("general.architecture", 8, tiny.text("llama")),
  tiny.key("general.alignment", 4, struct.pack("<I", 32)),
  tiny.key("a.u8", 0, b"\x01"),
  tiny.key("a.bool", 7, b"\x01"),
  tiny.key("a.f64", 12, struct.pack("<d", 0.5)),
  tiny.key("a.ints", 9, tiny.array(5, 3, struct.pack("<3i", 1, 2, 3))),
  tiny.key("a.bools", 9, tiny.array(7, 2, b"\x01\x00")),
  tiny.key("tokenizer.ggml.tokens", 9, tiny.array(8, 3, b"".join(map(tiny.text, ["a", "ä", ""])))),
  tiny.key(
    "a.nested", 9, tiny.array(9, 2, tiny.array(8, 1, tiny.text("x")) + tiny.array(0, 2, b"\1\2"))
  ),
]


def small(keys: list[bytes] = EVERY_KIND) -> bytes:
  tensors = [tiny.tensor("a", (3, 8), 0, 0), tiny.tensor("b", (2, 32), 2, 96)]
  return tiny.with_data(tiny.header(keys, tensors), 96 + 36)


def use(path: Path) -> None:
  """Everything a program does with a file."""
  with open_model(path) as model:
    dict(model.metadata)
    inspect.describe(model)
    for name in model.interpretation.tensors:
      layer = 0 if name in names.PER_LAYER else None
      model.stored_bytes(name, layer)
      model.read(name, layer)


def refused(tmp_path: Path, data: bytes, *parts: str, error: type[Exception] = ValueError) -> None:
  path = tmp_path / "hostile.gguf"
  path.write_bytes(data)
  with pytest.raises(error) as caught:
    GgufFile(path)
  for part in (str(path), *parts):
    assert part in str(caught.value)


def test_the_small_file_is_fine(tmp_path: Path) -> None:
  path = tmp_path / "m.gguf"
  path.write_bytes(small())
  with GgufFile(path) as model:
    assert {name: info.shape for name, info in model.tensors.items()} == {"a": (3, 8), "b": (2, 32)}
    assert model.metadata["tokenizer.ggml.tokens"] == ["a", "ä", ""]
    assert model.metadata["a.nested"] == [["x"], [1, 2]]
    assert model.metadata["a.bools"] == [True, False]


def test_truncation_at_every_byte(tmp_path: Path) -> None:
  data = small()
  for length in range(len(data)):
    path = tmp_path / "m.gguf"
    path.write_bytes(data[:length])
    with pytest.raises(ValueError, match=r"truncated|ends within|do not fit|empty|unknown format"):
      open_model(path)


def test_truncated_data_says_how_much_is_missing(tmp_path: Path) -> None:
  refused(tmp_path, small()[:-5], "5 bytes are missing", "download it again")


@pytest.mark.parametrize(
  ("version", "part"),
  [
    (struct.pack(">I", 3), "big-endian"),
    (struct.pack(">I", 2), "big-endian"),
    (struct.pack("<I", 1), "version 1"),
    (struct.pack("<I", 4), "version 4"),
    (struct.pack("<I", 0), "version 0"),
  ],
)
def test_other_versions_are_refused_by_name(tmp_path: Path, version: bytes, part: str) -> None:
  data = tiny.header(EVERY_KIND, version=version)
  refused(tmp_path, data, part, error=NotImplementedError)


def test_version_2_is_read(tmp_path: Path) -> None:
  path = tmp_path / "m.gguf"
  path.write_bytes(tiny.header(EVERY_KIND, version=struct.pack("<I", 2)))
  with GgufFile(path) as model:
    assert model.version == 2


HUGE = 2**60
BAD_KEYS: dict[str, tuple[bytes, str]] = {
  "huge key": (struct.pack("<Q", HUGE) + bytes(16), str(HUGE)),
  "long key": (tiny.key("k" * 65_536, 0, b"\1"), "at most 65535"),
  "huge string": (tiny.key("k", 8, struct.pack("<Q", HUGE) + bytes(9)), "ends within"),
  "huge array of bytes": (tiny.key("k", 9, tiny.array(0, HUGE)), f"{HUGE} elements of 'k'"),
  "huge array of strings": (tiny.key("k", 9, tiny.array(8, HUGE)), f"{HUGE} elements of 'k'"),
  "huge array of arrays": (tiny.key("k", 9, tiny.array(9, HUGE)), f"{HUGE} elements of 'k'"),
  "array too long by one": (tiny.key("k", 9, tiny.array(12, 3, bytes(16))), "3 elements of 'k'"),
  "long string in array": (
    tiny.key("k", 9, tiny.array(8, 1, struct.pack("<Q", HUGE))), "ends within the strings of 'k'"
  ),
  "wrapping strings": (
    tiny.key("k", 9, tiny.array(8, 2, struct.pack("<2Q", 2**64 - 8, 0))), "ends within the strings"
  ),
  "unknown type": (tiny.key("k", 13, bytes(8)), "value type 13"),
  "unknown element type": (tiny.key("k", 9, tiny.array(99, 1, bytes(8))), "element type 99"),
  "deep nesting": (tiny.key("k", 9, tiny.array(9, 1) * 40 + tiny.array(0, 1, b"\1")), "deeper"),
  "boolean 2": (tiny.key("k", 7, b"\2"), "neither 0 nor 1"),
  "key not UTF-8": (tiny.key(b"\xff", 0, b"\1"), "not UTF-8"),
  "string not UTF-8": (tiny.key("k", 8, tiny.text(b"\xff")), "not UTF-8"),
  "alignment 0": (tiny.key("general.alignment", 4, bytes(4)), "power of two"),
  "alignment 48": (tiny.key("general.alignment", 4, struct.pack("<I", 48)), "power of two"),
  "alignment text": (tiny.key("general.alignment", 8, tiny.text("32")), "uint32"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_KEYS)
def test_bad_metadata(tmp_path: Path, case: str) -> None:
  raw, part = BAD_KEYS[case]
  refused(tmp_path, tiny.header([raw]), part)


def test_duplicate_key(tmp_path: Path) -> None:
  twice = tiny.key("k", 0, b"\1")
  refused(tmp_path, tiny.header([twice, twice]), "'k' appears twice")


def test_text_that_is_not_utf8_in_an_array_is_named_when_read(tmp_path: Path) -> None:
  path = tmp_path / "m.gguf"
  raw = tiny.text("a") + tiny.text(b"\xff")
  path.write_bytes(tiny.header([tiny.key("k", 9, tiny.array(8, 2, raw))]))
  with GgufFile(path) as model, pytest.raises(ValueError, match=r"'k': string 1 .* not UTF-8"):
    model.metadata["k"]


BAD_TENSORS: dict[str, tuple[list[bytes], str]] = {
  "duplicate": ([tiny.tensor("a", (8,), 0, 0), tiny.tensor("a", (8,), 0, 32)], "appears twice"),
  "five dimensions": ([tiny.tensor("a", (1, 1, 1, 1, 8), 0, 0)], "5 dimensions"),
  "many dimensions": (
    [tiny.text("a") + struct.pack("<I", 2**31) + bytes(20)], "2147483648 dimensions"
  ),
  "zero": ([tiny.tensor("a", (0, 8), 0, 0)], "impossible shape"),
  "overflow": ([tiny.tensor("a", (2**32, 2**32), 0, 0)], "impossible shape"),
  "wrapping": ([tiny.tensor("a", (2**63, 2), 0, 0)], "impossible shape"),
  "huge": ([tiny.tensor("a", (2**31, 2**30), 0, 0)], "truncated"),
  "offset outside": ([tiny.tensor("a", (8,), 0, 2**40)], "truncated"),
  "offset wraps": ([tiny.tensor("a", (8,), 0, 2**64 - 32)], "truncated"),
  "unknown type outside": ([tiny.tensor("a", (8,), 57, 2**40)], "truncated"),
  "offset unaligned": ([tiny.tensor("a", (8,), 0, 16)], "alignment 32"),
  "broken block": ([tiny.tensor("a", (2, 31), 2, 0)], "no whole Q4_0 blocks"),
  "same place": ([tiny.tensor("a", (8,), 0, 0), tiny.tensor("b", (8,), 0, 0)], "overlaps"),
  "overlap": ([tiny.tensor("a", (16,), 0, 0), tiny.tensor("b", (8,), 0, 32)], "overlaps"),
  "overlap in disorder": (
    [tiny.tensor("b", (8,), 0, 32), tiny.tensor("a", (16,), 0, 0)], "'a' overlaps"
  ),
  "unknown in the same place": (
    [tiny.tensor("a", (8,), 57, 0), tiny.tensor("b", (8,), 57, 0)], "overlaps"
  ),
  "name not UTF-8": ([tiny.tensor(b"\xff", (8,), 0, 0)], "not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors(tmp_path: Path, case: str) -> None:
  tensors, part = BAD_TENSORS[case]
  refused(tmp_path, tiny.with_data(tiny.header([], tensors), 64), part)


@pytest.mark.parametrize("field", ["num_keys", "num_tensors"])
def test_huge_counts(tmp_path: Path, field: str) -> None:
  refused(tmp_path, tiny.header(EVERY_KIND, **{field: HUGE}), str(HUGE), "do not fit")


def test_large_alignment_is_honoured(tmp_path: Path) -> None:
  keys = [tiny.key("general.alignment", 4, struct.pack("<I", 1024))]
  head = tiny.header(keys, [tiny.tensor("a", (8,), 0, 0)])
  (tmp_path / "m.gguf").write_bytes(tiny.with_data(head, 32, alignment=1024))
  with GgufFile(tmp_path / "m.gguf") as model:
    assert model.tensors["a"].offset == 1024


@pytest.mark.parametrize(("kind", "name"), [(143, "PTQ1_0"), (57, "unknown(57)")])
def test_unknown_types_are_listed_and_refused_when_read(
  tmp_path: Path, kind: int, name: str
) -> None:
  path = tmp_path / "m.gguf"
  path.write_bytes(tiny_model(lambda tensor: kind if "ffn_up" in tensor else 0))
  with open_model(path) as model:
    assert model.info("up_DF", 0).type == name
    # The span to the next tensor: 6144 bytes of float32 stood there.
    assert model.info("up_DF", 0).nbytes == len(model.stored_bytes("up_DF", 0)) == 6144
    with pytest.raises(NotImplementedError, match=r"type .*no decoder") as caught:
      model.read("up_DF", 0)
    assert name in str(caught.value)
    model.read("gate_DF", 0)
    assert any(name in reason for reason in model.problems())
    with pytest.raises(NotImplementedError, match="no decoder"):
      model.check()
    rows = inspect.describe(model)["types"]
    assert {row["type"] for row in rows} == {"F32", name}


def tiny_model(kind: Callable[[str], int] = lambda tensor: 0) -> bytes:
  """A whole llama model, its tensors' types chosen by `kind`, each with room for float32."""
  c = tiny.CONFIG
  numbers = {
    "embedding_length": c.model_dim, "block_count": c.num_layers,
    "attention.head_count": c.num_heads, "attention.head_count_kv": c.num_kv_heads,
    "feed_forward_length": c.ffn_dim, "context_length": c.context_length,
  }  # fmt: skip
  keys = EVERY_KIND + [
    tiny.key(f"llama.{key}", 4, struct.pack("<I", value)) for key, value in numbers.items()
  ]
  keys.append(tiny.key("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", c.norm_eps)))
  tensors, offset = [], 0
  for name, value in tiny.parameters(c).items():
    shape = tiny.as_stored(value, name).shape
    file_name = tiny.file_name(name)
    tensors.append(tiny.tensor(file_name, shape, kind(file_name), offset))
    offset += -(-4 * int(np.prod(shape)) // 32) * 32
  return tiny.with_data(tiny.header(keys, tensors), offset)


def test_the_tiny_model_is_fine(tmp_path: Path) -> None:
  path = tmp_path / "m.gguf"
  path.write_bytes(tiny_model())
  use(path)
  with open_model(path) as model:
    assert model.problems() == []


@pytest.mark.parametrize(
  ("model", "error"), [("llama", ValueError), ("a tokenizer of tomorrow", ValueError),
                       ("bert", NotImplementedError)]
)  # fmt: skip
def test_a_tokenizer_that_cannot_be_read_leaves_the_file_open_to_inspection(
  tmp_path: Path, model: str, error: type[Exception]
) -> None:
  pytest.importorskip("neurojax.tokenizer.read.gguf")
  path = tmp_path / "m.gguf"
  path.write_bytes(tiny.header([tiny.key("tokenizer.ggml.model", 8, tiny.text(model))]))
  with open_model(path) as file:
    with pytest.raises(error) as caught:
      _ = file.tokenizer
    assert str(path) in str(caught.value)
    found = inspect.describe(file)
  assert "error" in found["tokenizer"]
  assert any("tokenizer" in reason for reason in found["unsupported"])


MODEL = tiny_model()
HEADER_BYTES = MODEL.index(bytes(1024))
# Nothing of this size may be allocated for a file of about 50 KiB.
PEAK_BYTES = 4 << 20

numbers = st.one_of(
  st.sampled_from([0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1]),
  st.integers(0, 2**64 - 1),
)


@settings(max_examples=400, deadline=None, database=None)
@given(
  flips=st.lists(st.integers(0, 8 * HEADER_BYTES - 1), max_size=4),
  writes=st.lists(
    st.tuples(st.integers(0, HEADER_BYTES), st.sampled_from(["<I", "<Q"]), numbers), max_size=2
  ),
  cut=st.one_of(st.none(), st.integers(0, len(MODEL))),
)
def test_damage_anywhere_is_an_error_and_costs_no_memory(
  tmp_path_factory: pytest.TempPathFactory,
  flips: list[int],
  writes: list[tuple[int, str, int]],
  cut: int | None,
) -> None:
  data = bytearray(MODEL)
  for flip in flips:
    data[flip // 8] ^= 1 << flip % 8
  for at, layout, number in writes:
    struct.pack_into(layout, data, at, number % 2 ** (8 * struct.calcsize(layout)))
  path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
  path.write_bytes(data[:cut])
  tracemalloc.start()
  try:
    use(path)
  except (ValueError, NotImplementedError) as error:
    assert str(path) in str(error), "an error names its file"
  finally:
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
  assert peak_bytes < PEAK_BYTES


def test_no_single_bit_of_a_header_crashes(tmp_path: Path) -> None:
  path = tmp_path / "m.gguf"
  for bit in range(0, 8 * len(small()), 3):
    data = bytearray(small())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    try:
      use(path)
    except (ValueError, NotImplementedError) as error:
      assert str(path) in str(error)
