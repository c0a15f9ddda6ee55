"""Ternary matrices of GGUF files: listed, read as numbers and packed, told apart, refused."""

import dataclasses
import math
import tracemalloc
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurojax.config import ModelConfig
from neurojax.files import inspect, names
from neurojax.files.dummy import write_dummy
from neurojax.files.gguf.file import GgufFile
from neurojax.files.load import load_span
from neurojax.files.open import open_model
from neurojax.weights.codecs import CODECS
from neurojax.weights.quantize import unpack_rows
from tests.files import tiny
from tests.files.oracle import Oracle
from tests.files.test_gguf_hostile import use
from tests.weights.literal import read_literally

LLAMA = dataclasses.replace(tiny.WIDE, num_layers=2, num_kv_heads=2, ffn_dim=512)
QWEN = dataclasses.replace(LLAMA, rope_style="half", qk_norm=True, tied_embedding=False)
BITNET = dataclasses.replace(LLAMA, rope_style="half", sub_norm=True)
kinds = pytest.mark.parametrize("kind", CODECS)


@pytest.mark.parametrize("config", [LLAMA, QWEN, BITNET], ids=["llama", "qwen3", "bitnet"])
@kinds
def test_every_matrix_is_read_as_its_bytes_say(tmp_path: Path, config: ModelConfig, kind: str):
  path = tmp_path / "m.gguf"
  write_dummy(path, config, kind)
  with open_model(path) as model:
    assert model.config == config
    assert model.problems() == []
    for name in model.interpretation.tensors:
      layer = config.num_layers - 1 if name in names.PER_LAYER else None
      info = model.info(name, layer)
      if len(info.shape) == 1:
        assert info.type == "F32"
        with pytest.raises(ValueError, match="F32, which is not ternary") as caught:
          model.read_ternary(name, layer)
        assert str(path) in str(caught.value)
        continue
      assert info.type == kind
      raw = model.stored_bytes(name, layer).tobytes()
      found = read_literally(kind, raw, math.prod(info.shape))
      stored = np.array([element * scale for element, scale in found], np.float32)
      values = model.read(name, layer)
      np.testing.assert_array_equal(tiny.as_stored(values, name), stored.reshape(info.shape))
      codes, scales, group_size = model.read_ternary(name, layer)
      assert group_size == CODECS[kind].group_size and scales.dtype == CODECS[kind].scale_dtype
      trits = unpack_rows(codes, info.shape[1])
      assert trits.ravel().tolist() == [element for element, _ in found]
    rows = {row["type"]: row for row in inspect.describe(model)["types"]}
  matrices = rows[kind]
  assert set(rows) == {kind, "F32"}
  if kind == "Q2_0 (group 128)":
    assert matrices["bits_per_weight"] == 2.125


@pytest.mark.parametrize("config", [LLAMA, QWEN, BITNET], ids=["llama", "qwen3", "bitnet"])
def test_a_ternary_file_computes_what_plain_numpy_does(tmp_path: Path, config: ModelConfig):
  write_dummy(tmp_path / "m.gguf", config, "Q2_0 (group 64)")
  tokens = [3, 1, 7, 0, 5, 5, 2]
  with open_model(tmp_path / "m.gguf") as model:
    wanted = Oracle(model).logits_TV(tokens)
    logits, _ = load_span(model)(jnp.asarray(tokens)[None])
  assert np.abs(wanted).max() > 0.1
  np.testing.assert_allclose(logits[0], wanted, atol=2e-4 * np.abs(wanted).max())


def q2_0(*tensors: tuple[tuple[int, ...], int], last: int | None = None, kind: int = 42) -> bytes:
  """A file of tensors of type 42: (shape, bytes of room for it); `last`: bytes of the last one."""
  entries, offset = [], 0
  for index, (shape, room) in enumerate(tensors):
    entries.append(tiny.tensor(f"t{index}", shape, kind, offset))
    offset += room
  return tiny.with_data(
    tiny.header([], entries), offset - tensors[-1][1] + (last or tensors[-1][1])
  )


@pytest.mark.parametrize("group", [64, 128])
def test_the_room_in_the_file_tells_the_groups_of_q2_0_apart(tmp_path: Path, group: int):
  size = {64: 18, 128: 34}[group]
  shapes = [(8, 256), (3, 128), (2, 4, 1280)]
  sizes = [math.prod(shape) // group * size for shape in shapes]
  rooms = [-(-n // 32) * 32 for n in sizes]
  # The middle one is too small to tell, and nothing need follow the last.
  for last in (rooms[-1], sizes[-1]):
    (tmp_path / "m.gguf").write_bytes(q2_0(*zip(shapes, rooms, strict=True), last=last))
    with GgufFile(tmp_path / "m.gguf") as model:
      assert {info.type for info in model.tensors.values()} == {f"Q2_0 (group {group})"}
      assert [info.nbytes for info in model.tensors.values()] == sizes


@pytest.mark.parametrize(
  ("data", "part"),
  [
    (q2_0(((8, 256), 8192)), "room for 8192 bytes and takes 576 as Q2_0 (group 64) or 544 as"),
    (q2_0(((8, 256), 512)), "room for 512 bytes and takes 576"),
    (q2_0(((8, 192), 416)), "room for 416 bytes and takes 432 as Q2_0 (group 64):"),
    (q2_0(((8, 256), 576), ((8, 256), 544)), "'t0' is Q2_0 (group 64), 't1' is Q2_0 (group 128)"),
    (q2_0(((1, 128), 64)), "too small to tell their groups apart"),
    (q2_0(((8, 96), 216)), "'t0' of shape (8, 96): its rows are no whole Q2_0 blocks"),
    (q2_0(((8, 100), 32), kind=36), "'t0' of shape (8, 100): its rows are no whole I2_S blocks"),
    (q2_0(((8, 192), 416), kind=142), "its rows are no whole PQ2_0 blocks"),
    (q2_0(((8, 256), 512), kind=36), "truncated: its tensors reach"),
  ],
)  # fmt: skip
def test_files_in_which_neither_fits_are_refused_by_name(tmp_path: Path, data: bytes, part: str):
  (tmp_path / "m.gguf").write_bytes(data)
  with pytest.raises(ValueError) as caught:
    GgufFile(tmp_path / "m.gguf")
  assert part in str(caught.value) and str(tmp_path) in str(caught.value)


def test_i2_s_keeps_its_scale_behind_the_data_and_padding_behind_the_scale(tmp_path: Path):
  (tmp_path / "m.gguf").write_bytes(q2_0(((8, 256), 544), ((8, 128), 288), last=260, kind=36))
  with GgufFile(tmp_path / "m.gguf") as model:
    assert [info.nbytes for info in model.tensors.values()] == [516, 260]


@pytest.mark.parametrize("read", ["read", "read_ternary"])
@kinds
def test_damage_is_refused_by_file_tensor_and_place(tmp_path: Path, kind: str, read: str):
  path = tmp_path / "m.gguf"
  write_dummy(path, LLAMA, kind)
  with open_model(path) as model:
    info = model.info("down_FD", 1)
  codec = CODECS[kind]
  data = bytearray(path.read_bytes())
  # Four times code 3, or what no digits of base 3 encode to.
  data[info.offset + codec.block_bytes + codec.code_at] = 1 if kind == "TQ1_0" else 0xFF
  path.write_bytes(data)
  with open_model(path) as model:
    getattr(model, read)("down_FD", 0)
    place = "row 0, block 1" if kind == "TQ1_0" else f"row 0, element {codec.block}"
    with pytest.raises(ValueError, match=f"'blk.1.ffn_down.weight': {place}") as caught:
      getattr(model, read)("down_FD", 1)
    assert str(path) in str(caught.value)
    # The file can still be looked at.
    assert inspect.describe(model)["unsupported"] == []


def test_a_closed_file_says_only_that(tmp_path: Path):
  write_dummy(tmp_path / "m.gguf", LLAMA, "TQ2_0")
  model = GgufFile(tmp_path / "m.gguf")
  model.close()
  with pytest.raises(ValueError, match=r"m\.gguf: the file is closed$"):
    model.read_ternary("down_FD", 0)


SMALL = ModelConfig(
  vocab_size=8, model_dim=128, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=64, ffn_dim=128,
  rope_style="interleaved",
)  # fmt: skip


@settings(max_examples=150, deadline=None, database=None)
@given(
  kind=st.sampled_from([kind for kind in CODECS if CODECS[kind].block <= 128]),
  flips=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4),
  cut=st.one_of(st.none(), st.floats(0, 1)),
)
def test_damage_anywhere_is_an_error_that_names_the_file(
  tmp_path_factory: pytest.TempPathFactory, kind: str, flips: list[float], cut: float | None
):
  base = tmp_path_factory.getbasetemp()
  whole = base / f"whole-{kind}.gguf"
  if not whole.exists():
    write_dummy(whole, SMALL, kind)
  data = bytearray(whole.read_bytes())
  for flip in flips:
    bit = int(flip * 8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
  path = base / "damaged.gguf"
  path.write_bytes(data[: None if cut is None else int(cut * len(data))])
  try:
    use(path)
  except (ValueError, NotImplementedError) as error:
    assert str(path) in str(error)


def test_a_dummy_is_written_a_tensor_at_a_time_and_always_the_same(tmp_path: Path):
  config = dataclasses.replace(QWEN, vocab_size=4096, num_layers=6, ffn_dim=2048)
  tracemalloc.start()
  write_dummy(tmp_path / "a.gguf", config, "Q2_0 (group 128)")
  peak_bytes = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  with open_model(tmp_path / "a.gguf") as model:
    assert model.tokenizer is not None and len(model.tokenizer.tokens) == 4096
    sizes = [info.nbytes for info in model.tensors.values()]
  # The vocabulary, and codes, bytes and chunks of the largest tensor.
  assert peak_bytes < 6 * max(sizes) + 4e6
  write_dummy(tmp_path / "b.gguf", config, "Q2_0 (group 128)")
  assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
  write_dummy(tmp_path / "b.gguf", config, "Q2_0 (group 128)", seed=1)
  assert (tmp_path / "a.gguf").read_bytes() != (tmp_path / "b.gguf").read_bytes()


def test_the_gguf_package_reads_a_dummy(tmp_path: Path):
  write_dummy(tmp_path / "m.gguf", QWEN, "TQ2_0", outer="Q8_0")
  with open_model(tmp_path / "m.gguf") as model:
    ours = {name: (info.type, info.shape) for name, info in model.tensors.items()}
    values = model.read("up_DF", 1)
  reader = gguf.GGUFReader(tmp_path / "m.gguf")
  theirs = {t.name: (t.tensor_type.name, tuple(map(int, t.shape[::-1]))) for t in reader.tensors}
  assert ours == theirs
  assert ours["token_embd.weight"][0] == ours["output.weight"][0] == "Q8_0"
  tensor = next(t for t in reader.tensors if t.name == "blk.1.ffn_up.weight")
  np.testing.assert_array_equal(gguf.dequantize(tensor.data, tensor.tensor_type), values.T)


@pytest.mark.parametrize(
  ("config", "kind", "part"),
  [
    (LLAMA, "Q2_0", "choose one of TQ1_0"),
    (tiny.CONFIG, "TQ2_0", "rows of 32 elements are no whole TQ2_0 blocks"),
    (dataclasses.replace(LLAMA, qk_norm=True), "TQ2_0", "no architecture of GGUF holds this model"),
  ],
)
def test_dummies_that_cannot_be_written_are_refused(
  tmp_path: Path, config: ModelConfig, kind: str, part: str
):
  with pytest.raises(ValueError, match=part):
    write_dummy(tmp_path / "m.gguf", config, kind)
  with pytest.raises(ValueError, match="outer = 'Q9_0'"):
    write_dummy(tmp_path / "m.gguf", LLAMA, "TQ2_0", outer="Q9_0")
