"""llama2.c checkpoints: written here block by block, and the real stories260K."""

import struct
from pathlib import Path

import numpy as np
import pytest

from neurojax.files import names
from neurojax.files.llama2c import Llama2cFile, read_tokenizer
from neurojax.files.open import open_model
from tests.files.oracle import Oracle
from tests.shared import shared

DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB, SEQ = 16, 12, 3, 4, 2, 300, 10
HEAD = DIM // HEADS


def checkpoint(*, tied: bool) -> tuple[bytes, dict[str, np.ndarray]]:
  """Bytes of a checkpoint in the order of export.py, and its blocks of distinct numbers."""
  shapes = {
    "token_embedding": (VOCAB, DIM), "att_norm": (LAYERS, DIM), "wq": (LAYERS, DIM, DIM),
    "wk": (LAYERS, KV_HEADS * HEAD, DIM), "wv": (LAYERS, KV_HEADS * HEAD, DIM),
    "wo": (LAYERS, DIM, DIM), "ffn_norm": (LAYERS, DIM), "w1": (LAYERS, HIDDEN, DIM),
    "w2": (LAYERS, DIM, HIDDEN), "w3": (LAYERS, HIDDEN, DIM), "final_norm": (DIM,),
    "freq_cis_real": (SEQ, HEAD // 2), "freq_cis_imag": (SEQ, HEAD // 2),
  }  # fmt: skip
  if not tied:
    shapes["wcls"] = (VOCAB, DIM)
  blocks, first = {}, 0
  for name, shape in shapes.items():
    count = int(np.prod(shape))
    blocks[name] = np.arange(first, first + count, dtype=np.float32).reshape(shape)
    first += count
  vocab = VOCAB if tied else -VOCAB
  head = struct.pack("<7i", DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, vocab, SEQ)
  return head + b"".join(block.tobytes() for block in blocks.values()), blocks


@pytest.mark.parametrize("tied", [True, False])
def test_every_axis(tmp_path: Path, tied: bool) -> None:
  data, blocks = checkpoint(tied=tied)
  (tmp_path / "m.gguf").write_bytes(data)  # the extension lies
  with open_model(tmp_path / "m.gguf") as model:
    assert isinstance(model, Llama2cFile)
    assert model.config.tied_embedding == tied
    assert model.config.rope_style == "interleaved"
    assert model.tokenizer is None
    assert model.problems() == []
    model.check()
    np.testing.assert_array_equal(model.read("embedding_VD"), blocks["token_embedding"])
    np.testing.assert_array_equal(model.read("final_norm_D"), blocks["final_norm"])
    for layer in range(LAYERS):
      expected = {
        "attn_norm_D": blocks["att_norm"][layer],
        "q_DNH": blocks["wq"][layer].T.reshape(DIM, HEADS, HEAD),
        "k_DKH": blocks["wk"][layer].T.reshape(DIM, KV_HEADS, HEAD),
        "v_DKH": blocks["wv"][layer].T.reshape(DIM, KV_HEADS, HEAD),
        "o_NHD": blocks["wo"][layer].T.reshape(HEADS, HEAD, DIM),
        "ffn_norm_D": blocks["ffn_norm"][layer],
        "gate_DF": blocks["w1"][layer].T,
        "up_DF": blocks["w3"][layer].T,
        "down_FD": blocks["w2"][layer].T,
      }
      assert set(expected) == set(names.LLAMA2C) - set(names.WHOLE_MODEL)
      for name, values in expected.items():
        read = model.read(name, layer)
        np.testing.assert_array_equal(read, values, err_msg=name)
        read[...] = 0
        assert model.stored_bytes(name, layer).nbytes == model.info(name, layer).nbytes
    if tied:
      with pytest.raises(ValueError, match="ties it"):
        model.read("head_DV")
    else:
      np.testing.assert_array_equal(model.read("head_DV"), blocks["wcls"].T)
  with pytest.raises(ValueError, match="closed"):
    model.read("final_norm_D")


def test_every_other_size_is_refused(tmp_path: Path) -> None:
  data, _ = checkpoint(tied=True)
  path = tmp_path / "m.bin"
  for length in [*range(1, 60), len(data) - 4, len(data) - 1, len(data) + 1, len(data) + 4]:
    path.write_bytes((data + bytes(4))[:length])
    with pytest.raises(ValueError) as caught:
      open_model(path)
    assert str(path) in str(caught.value)
  path.write_bytes(data[:-4])
  with pytest.raises(ValueError, match=r"lack 4 of .* download it again"):
    open_model(path)
  with pytest.raises(ValueError, match="truncated"):
    Llama2cFile(path)


@pytest.mark.parametrize("position", range(7))
@pytest.mark.parametrize("value", [0, -1, 5, 2**31 - 1, -(2**31)])
def test_headers_that_make_no_sense(tmp_path: Path, position: int, value: int) -> None:
  data = bytearray(checkpoint(tied=True)[0])
  struct.pack_into("<i", data, 4 * position, value)
  (tmp_path / "m.bin").write_bytes(data)
  with pytest.raises(ValueError):
    open_model(tmp_path / "m.bin")


def pieces(*, raw_bytes: bool = False) -> list[bytes]:
  single = [chr(n).encode() if raw_bytes else f"<0x{n:02X}>".encode() for n in range(256)]
  return [b"<unk>", b"\n<s>\n", b"\n</s>\n", *single, b" ", b" a", b" b c", "ä".encode()]


def tokenizer_file(pieces: list[bytes]) -> bytes:
  body = b"".join(
    struct.pack("<fi", -float(id_), len(piece)) + piece for id_, piece in enumerate(pieces)
  )
  return struct.pack("<i", max(map(len, pieces))) + body


@pytest.mark.parametrize("raw_bytes", [False, True])
def test_tokenizer(tmp_path: Path, raw_bytes: bool) -> None:
  path = tmp_path / "tok.bin"
  path.write_bytes(tokenizer_file(pieces(raw_bytes=raw_bytes)))
  spec = read_tokenizer(path, 263)
  assert spec.kind == "spm"
  assert spec.tokens[:4] == ("<unk>", "<s>", "</s>", "<0x00>")
  assert spec.tokens[3 + 0x20] == "<0x20>"
  assert spec.tokens[258:] == ("<0xFF>", "▁", "▁a", "▁b▁c", "ä")
  assert spec.types[:3] == ("unknown", "control", "control")
  assert set(spec.types[3:259]) == {"byte"}
  assert set(spec.types[259:]) == {"normal"}
  assert spec.scores[262] == -262.0
  assert (spec.bos_id, spec.eos_id, spec.unknown_id, spec.stop_ids) == (1, 2, 0, frozenset({2}))
  assert spec.add_bos
  assert spec.add_space_prefix
  assert not spec.add_eos


def test_damaged_tokenizer(tmp_path: Path) -> None:
  path = tmp_path / "tok.bin"
  data = tokenizer_file(pieces())
  for length in range(0, len(data), 5):
    path.write_bytes(data[:length])
    with pytest.raises(ValueError) as caught:
      read_tokenizer(path, 263)
    assert str(path) in str(caught.value)
  path.write_bytes(data)
  for vocab_size, part in [(262, "behind the last"), (264, "ends before piece 263"), (100, "256")]:
    with pytest.raises(ValueError, match=part):
      read_tokenizer(path, vocab_size)
  for id_, piece in [(1, b"x"), (3 + 65, b"B"), (260, b"\xff")]:
    wrong = pieces()
    wrong[id_] = piece
    path.write_bytes(tokenizer_file(wrong))
    with pytest.raises(ValueError, match=f"piece {id_}"):
      read_tokenizer(path, 263)


def test_a_wrong_tokenizer_is_a_problem_of_the_model(tmp_path: Path) -> None:
  (tmp_path / "m.bin").write_bytes(checkpoint(tied=True)[0])
  (tmp_path / "tok.bin").write_bytes(tokenizer_file(pieces()))
  with open_model(tmp_path / "m.bin", tmp_path / "tok.bin") as model:
    assert any("ends before piece 263 of 300" in reason for reason in model.problems())
    with pytest.raises(ValueError, match="piece 263"):
      model.check()


def test_stories260k_tells_the_story_run_c_tells() -> None:
  folder = shared("data", "stories260K")
  with open_model(folder / "stories260K.bin", folder / "tok512.bin") as model:
    assert model.problems() == []
    oracle, spec = Oracle(model), model.tokenizer
  assert spec is not None
  ids = [1]
  for _ in range(80):
    ids.append(int(oracle.logits_TV(ids)[-1].argmax()))
  raw = b"".join(
    bytes([id_ - 3]) if 3 <= id_ < 259 else spec.tokens[id_].replace("▁", " ").encode()
    for id_ in ids[1:]
  )
  expected = (folder / "greedy200.txt").read_bytes().removesuffix(b"\n")
  assert len(raw) > 180
  assert expected.startswith(raw.removeprefix(b" "))
