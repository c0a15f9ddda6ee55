"""Conversion: every family both ways without any change, ternary types exactly or as near as can be."""

import dataclasses
import itertools
import os
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest

from neurojax.config import ModelConfig
from neurojax.files import names
from neurojax.files.folder.card import read_card
from neurojax.files.model_file import ModelFile
from neurojax.files.open import open_model
from neurojax.files.write.folder import to_folder
from neurojax.files.write.gguf import to_gguf
from neurojax.files.write.ternarize import nearest
from neurojax.files.write.transformers_config import config_json
from neurojax.tokenizer.read.tokenizer_model import spec_from_sentencepiece
from neurojax.tokenizer.write.tokenizer_model import sentencepiece_from_spec
from neurojax.weights import codecs
from tests.files import families, tiny, trained
from tests.tokenizer import vocab

PYTHON = os.environ.get("NEUROJAX_LLAMA_PYTHON")
CONFIG = ModelConfig(
  vocab_size=263, model_dim=256, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=64, ffn_dim=256,
  rope_style="interleaved",
)  # fmt: skip


def numbers(file: ModelFile) -> dict[str, np.ndarray]:
  """Every tensor by its canonical name and layer."""
  found = {}
  for name in file.interpretation.tensors:
    if name in names.WHOLE_MODEL:
      found[name] = file.read(name)
      continue
    for layer in range(file.config.num_layers):
      if name in names.layer_names(file.config, layer):
        found[f"{name}/{layer}"] = file.read(name, layer)
  return found


def same(one: ModelFile, other: ModelFile) -> None:
  mine, theirs = numbers(one), numbers(other)
  assert mine.keys() == theirs.keys()
  for name, values in mine.items():
    np.testing.assert_array_equal(values, theirs[name], err_msg=name)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_family_both_ways(tmp_path: Path, name: str):
  family = families.FAMILIES[name]
  values = families.parameters(family)
  tensors = families.huggingface_tensors(name, values)
  families.write_folder(tmp_path / "folder", family.table, tensors, shards=2)
  families.write_gguf(tmp_path / "wanted.gguf", family, values)
  with open_model(tmp_path / "folder") as folder, open_model(tmp_path / "wanted.gguf") as wanted:
    made = to_gguf(folder, tmp_path / "made.gguf")
    assert (made.architecture, made.loss.tensors) == (family.arch, 0)
    # llama.cpp would compute it without its window, which is said.
    windowed = family.arch == "llama" and family.config.sliding_window is not None
    assert ("no sliding window" in " ".join(made.notes)) == windowed == (name == "mistral")
    with open_model(tmp_path / "made.gguf") as file:
      assert file.config == wanted.config
      same(file, wanted)
      made = to_folder(file, tmp_path / "back")
      assert (made.architecture, made.loss.tensors) == (family.table["model_type"], 0)
      with open_model(tmp_path / "back") as back:
        same(back, folder)
        # Llama 3's scaling comes back from its factors.
        assert back.config.rope_scaling == folder.config.rope_scaling or name == "qwen3"


def test_what_a_family_has_no_words_for_is_said():
  odd = dataclasses.replace(families.PLAIN, qk_norm=True, sub_norm=True)
  with pytest.raises(ValueError, match="no family of transformers holds this model: llama"):
    config_json(odd)


@pytest.fixture(scope="module")
def ternary_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """Scales by groups of 256, the embedding bfloat16, a template, and words of its own."""
  path = tmp_path_factory.mktemp("convert") / "ternary.gguf"
  spec = vocab.tiny_bpe(chat_template="{{ messages }}")
  card = dict(name="a name", license="Apache-2.0", description="words")
  trained.write_gguf(path, trained.make(CONFIG, 256), spec, card, kind="TQ2_0")
  return path


@pytest.mark.parametrize("kind", ["TQ1_0", "Q2_0", "Q2_0_g128", "F32"])
def test_ternary_weights_keep_their_numbers_and_the_file_its_words(
  ternary_file: Path, tmp_path: Path, kind: str
):
  with open_model(ternary_file) as file:
    made = to_gguf(file, tmp_path / "m.gguf", kind=kind)
    assert (made.types[kind], made.loss.tensors) == (7 + (3 if kind == "F32" else 0), 0)
    with open_model(tmp_path / "m.gguf") as other:
      same(file, other)
      assert other.narrow_form("embedding_VD") == file.narrow_form("embedding_VD")
      written = {"general.file_type"}
      for key in file.metadata.keys() - written:
        assert other.metadata[key] == file.metadata[key], key
      assert other.metadata.keys() == file.metadata.keys()
      assert other.tokenizer == file.tokenizer


def test_ternary_weights_through_a_folder_come_back_as_they_were(
  ternary_file: Path, tmp_path: Path
):
  with open_model(ternary_file) as file:
    assert to_folder(file, tmp_path / "folder").loss.tensors == 0
    with open_model(tmp_path / "folder") as folder:
      assert folder.tokenizer.chat_template == "{{ messages }}"
      made = to_gguf(folder, tmp_path / "again.gguf", kind="TQ2_0")
    assert made.loss.tensors == 0
    with open_model(tmp_path / "again.gguf") as again:
      same(file, again)
      for layer_name in ("q_DNH", "down_FD"):
        for mine, theirs in zip(
          file.read_ternary(layer_name, 0), again.read_ternary(layer_name, 0), strict=True
        ):
          np.testing.assert_array_equal(mine, theirs)


def test_a_lossy_type_says_what_it_changed(tmp_path: Path):
  values = {n: v / 16 for n, v in tiny.parameters(CONFIG).items()}
  tiny.write_gguf(tmp_path / "f.gguf", CONFIG, values)
  with open_model(tmp_path / "f.gguf") as file:
    for kind, least, most in (("F16", 0, 1e-3), ("Q8_0", 1e-3, 0.01), ("TQ1_0", 0.3, 0.5)):
      loss = to_gguf(file, tmp_path / f"{kind}.gguf", kind=kind).loss
      with open_model(tmp_path / f"{kind}.gguf") as made:
        old, new = numbers(file), numbers(made)
      changed = {n: old[n] - new[n] for n in old if (old[n] != new[n]).any()}
      assert len(changed) == loss.tensors == 7
      off = sum(float(np.square(d, dtype=np.float64).sum()) for d in changed.values())
      squares = sum(float(np.square(old[n], dtype=np.float64).sum()) for n in changed)
      assert loss.relative == pytest.approx((off / squares) ** 0.5, rel=1e-6)
      assert least < loss.relative < most
      assert "7 tensors rounded, by" in str(loss)


def test_the_nearest_ternary_numbers():
  # Of 8 numbers, every choice of signs and zeros with its own best scale.
  w = np.random.default_rng(0).standard_normal((3, 8), np.float32)
  codes, scales = nearest(w, 8)
  found = codecs.dequantize(codes, scales.astype(np.float32), 8)
  for row, mine in zip(w, found, strict=True):
    best = np.inf
    for signs in itertools.product((-1, 0, 1), repeat=8):
      if any(signs):
        s = np.dot(signs, row) / np.dot(signs, signs)
        best = min(best, np.square(row - s * np.array(signs)).sum())
    # The scale is a float16.
    assert np.square(row - mine).sum() <= best * (1 + 1e-5)
  zeros, _ = nearest(np.zeros((1, 64), np.float32), 64)
  assert (zeros == 0x55).all()
  with pytest.raises(ValueError, match="beyond float16"):
    nearest(np.full((1, 64), 1e6, np.float32), 64)


def test_nothing_is_replaced_and_a_failure_leaves_nothing(
  ternary_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  (tmp_path / "there.gguf").write_bytes(b"mine")
  (tmp_path / "folder").mkdir()
  with open_model(ternary_file) as file:
    with pytest.raises(FileExistsError, match=r"there\.gguf exists: name another"):
      to_gguf(file, tmp_path / "there.gguf")
    with pytest.raises(FileExistsError, match="folder exists: name another"):
      to_folder(file, tmp_path / "folder")
    with pytest.raises(ValueError, match="'Q9': choose one of TQ2_0"):
      to_gguf(file, tmp_path / "new.gguf", kind="Q9")

    def fail(*_) -> None:
      raise OSError("the disk is full")

    for convert, out in ((to_gguf, "new.gguf"), (to_folder, "new")):
      with monkeypatch.context() as patch:
        patch.setattr(f"{convert.__module__}._encoded", fail)
        with pytest.raises(OSError, match="full"):
          convert(file, tmp_path / out, kind="F32")
  assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "there.gguf"]
  assert (tmp_path / "there.gguf").read_bytes() == b"mine"


def test_rows_that_are_no_whole_blocks_are_refused_with_the_remedy(tmp_path: Path):
  config = dataclasses.replace(CONFIG, model_dim=192)
  tiny.write_gguf(tmp_path / "f.gguf", config, tiny.parameters(config))
  with (
    open_model(tmp_path / "f.gguf") as file,
    pytest.raises(ValueError, match=r"rows of 192 elements are no whole TQ2_0 blocks.*choose Q2_0"),
  ):
    to_gguf(file, tmp_path / "new.gguf", kind="TQ2_0")


def test_a_sentencepiece_vocabulary_becomes_a_tokenizer_model(tmp_path: Path):
  spec = vocab.tiny_spm()
  again = spec_from_sentencepiece(sentencepiece_from_spec(spec))
  assert dataclasses.replace(again, scores=spec.scores) == spec
  np.testing.assert_allclose(again.scores, spec.scores, rtol=1e-6)
  config = dataclasses.replace(CONFIG, vocab_size=len(spec.tokens))
  trained.write_gguf(tmp_path / "m.gguf", trained.make(config, 256), spec, dict(name="m"))
  with open_model(tmp_path / "m.gguf") as file:
    to_folder(file, tmp_path / "folder")
    with open_model(tmp_path / "folder") as folder:
      found = dataclasses.replace(folder.tokenizer, scores=file.tokenizer.scores)
      assert found == file.tokenizer


@pytest.mark.skipif(
  PYTHON is None, reason="NEUROJAX_LLAMA_PYTHON names no Python that has llama-cpp-python"
)
@pytest.mark.parametrize("name", [name for name in families.FAMILIES if name != "bitnet"])
def test_llama_cpp_loads_what_is_written(tmp_path: Path, name: str):
  """microsoft's bitnet-b1.58 is an architecture of its own fork."""
  family = families.FAMILIES[name]
  tensors = families.huggingface_tensors(name, families.parameters(family))
  families.write_folder(tmp_path / "folder", family.table, tensors)
  with open_model(tmp_path / "folder") as folder:
    to_gguf(folder, tmp_path / "m.gguf")
  script = (
    "import llama_cpp, sys\n"
    "model = llama_cpp.Llama(sys.argv[1], n_ctx=64, logits_all=True, verbose=False)\n"
    "model.eval([1, 2, 3, 4, 5, 6, 7])\n"
  )
  done = subprocess.run(
    [str(PYTHON), "-c", script, str(tmp_path / "m.gguf")], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-2000:]
  reader = gguf.GGUFReader(tmp_path / "m.gguf")
  assert len(reader.tensors) > 20


def test_a_number_that_is_not_finite_is_refused_with_its_place(tmp_path: Path):
  values = tiny.parameters(CONFIG)
  values["down_FD/0"][5, 3] = np.nan
  tiny.write_gguf(tmp_path / "f.gguf", CONFIG, values)
  with open_model(tmp_path / "f.gguf") as file:
    with pytest.raises(ValueError, match=r"'blk\.0\.ffn_down\.weight': row 3, element 5 is NaN"):
      to_gguf(file, tmp_path / "m.gguf")
    for kind in ("F16", "Q8_0"):
      with pytest.raises(ValueError, match=r"ffn_down\.weight: the value at \[3, 5\] is nan"):
        to_gguf(file, tmp_path / "m.gguf", kind=kind)
    with pytest.raises(ValueError, match=r"down_proj\.weight: the value at \[3, 5\] is nan"):
      to_folder(file, tmp_path / "m")
  assert [path.name for path in tmp_path.iterdir()] == ["f.gguf"]


def test_damaged_scales_of_quantized_blocks_are_refused_with_their_place(tmp_path: Path):
  tiny.write_gguf(tmp_path / "f.gguf", CONFIG, tiny.parameters(CONFIG))
  with open_model(tmp_path / "f.gguf") as file:
    to_gguf(file, tmp_path / "q.gguf", kind="Q8_0")
  with open_model(tmp_path / "q.gguf") as file:
    info = file.info("q_DNH", 0)
    raw = bytearray((tmp_path / "q.gguf").read_bytes())
    # Row 2, whose first scale is behind two rows of 256 / 32 blocks of 34 bytes.
    raw[info.offset + 2 * 8 * 34 : info.offset + 2 * 8 * 34 + 2] = np.float16(np.inf).tobytes()
  (tmp_path / "q.gguf").write_bytes(raw)
  with (
    open_model(tmp_path / "q.gguf") as file,
    pytest.raises(ValueError, match=r"attn_q\.weight': row 2, element \d+ is NaN or infinite"),
  ):
    to_gguf(file, tmp_path / "again.gguf")


def test_the_licence_goes_along_and_its_absence_is_said(ternary_file: Path, tmp_path: Path):
  with open_model(ternary_file) as file:
    assert not to_folder(file, tmp_path / "folder").notes
  readme = (tmp_path / "folder" / "README.md").read_text()
  assert readme.startswith("---\nlicense: Apache-2.0\n---\n\n# a name\n\nwords\n")
  (tmp_path / "folder" / "LICENSE").write_text("Apache License\n")
  with open_model(tmp_path / "folder") as folder:
    assert not to_gguf(folder, tmp_path / "m.gguf").notes
    to_folder(folder, tmp_path / "same")
    to_folder(folder, tmp_path / "other", general={"general.license": "MIT"})
  assert (tmp_path / "same" / "README.md").read_text() == readme
  assert (tmp_path / "same" / "LICENSE").read_text() == "Apache License\n"
  assert "license: MIT\n" in (tmp_path / "other" / "README.md").read_text()
  with open_model(tmp_path / "m.gguf") as file:
    assert file.metadata["general.license"] == "Apache-2.0"
    assert file.metadata["general.name"] == "a name"
  tiny.write_gguf(tmp_path / "none.gguf", CONFIG, tiny.parameters(CONFIG))
  with open_model(tmp_path / "none.gguf") as file:
    assert "names no licence" in to_gguf(file, tmp_path / "still.gguf").notes[0]
    assert "names no licence" in to_folder(file, tmp_path / "still").notes[0]
    given = to_gguf(file, tmp_path / "given.gguf", general={"general.license": "MIT"})
    assert not given.notes


@pytest.mark.parametrize(
  ("readme", "licence", "card"),
  [
    ("---\nlicense: mit\n---\n", None, {"general.license": "mit"}),
    (
      "---\ntags:\n- x\nlicense:\n- 'apache-2.0'\n---\nwords",
      None,
      {"general.license": "apache-2.0"},
    ),
    (
      "---\nlicense: other\nlicense_name: gemma\nlicense_link: https://x.y/z\n---",
      "text",
      {"general.license": "other", "general.license.name": "gemma"}
      | {"general.license.link": "https://x.y/z"},
    ),
    ("license: mit", None, {}),
    (
      None,
      "\n  # The Terms\nmore",
      {"general.license": "other", "general.license.name": "The Terms"}
      | {"general.license.link": "LICENSE"},
    ),
  ],
)
def test_what_a_folder_says_of_its_licence(
  tmp_path: Path, readme: str | None, licence: str | None, card: dict[str, str]
):
  for name, text in (("README.md", readme), ("LICENSE", licence)):
    if text is not None:
      (tmp_path / name).write_text(text)
  assert read_card(tmp_path, {}) == card


def test_what_activations_are_rounded_to_goes_along(tmp_path: Path):
  weights = trained.make(CONFIG, 256)
  rounding = dataclasses.replace(
    weights,
    arrays={
      name: dataclasses.replace(array, mode="w2a8") if name in weights.ternary() else array
      for name, array in weights.arrays.items()
    },
  )
  for source, said in ((weights, None), (rounding, "int8")):
    path = tmp_path / str(said)
    trained.write_gguf(path.with_suffix(".gguf"), source)
    trained.write_folder(path, source, None)
    with open_model(path.with_suffix(".gguf")) as file, open_model(path) as folder:
      assert file.activations == folder.activations == said
      assert file.metadata.get("neurojax.activations") == said
      assert folder.metadata.get("neurojax_activations") == said
      to_gguf(folder, tmp_path / f"{said}-from-folder.gguf")
      to_gguf(file, tmp_path / f"{said}-from-file.gguf", kind="Q2_0")
    for made in (f"{said}-from-folder.gguf", f"{said}-from-file.gguf"):
      with open_model(tmp_path / made) as file:
        assert file.activations == said
  found = names.interpret_gguf(
    {"general.architecture": "llama", "neurojax.activations": "int4"}, {}
  )
  assert "neurojax.activations = 'int4': int8 is computed" in found.demands
