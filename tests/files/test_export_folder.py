"""Folders for transformers: read back by the safetensors and tokenizers libraries, number by number."""

import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import tokenizers

from neurojax.config import ModelConfig
from neurojax.files.open import open_model
from neurojax.files.write.folder import to_folder
from neurojax.files.write.parameter_source import ParameterSource
from neurojax.tokenizer import Tokenizer
from tests.files import tiny, trained
from tests.tokenizer import vocab

PLAIN = ModelConfig(
  vocab_size=270, model_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_dim=72,
)  # fmt: skip
CONFIGS = {
  "llama": dataclasses.replace(PLAIN, head_dim=6, tied_embedding=False),
  "llama, turned": dataclasses.replace(PLAIN, rope_style="interleaved"),
  "qwen3": dataclasses.replace(PLAIN, qk_norm=True),
  "qwen3, turned": dataclasses.replace(PLAIN, qk_norm=True, rope_style="interleaved"),
  "bitnet": dataclasses.replace(PLAIN, sub_norm=True),
}
KINDS = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "bitnet": "BitNetForCausalLM"}
NAMES = {
  "embedding_VD": "model.embed_tokens", "final_norm_D": "model.norm", "head_DV": "lm_head",
  "attn_norm_D": "input_layernorm", "q_DNH": "self_attn.q_proj", "k_DKH": "self_attn.k_proj",
  "v_DKH": "self_attn.v_proj", "q_norm_H": "self_attn.q_norm", "k_norm_H": "self_attn.k_norm",
  "attn_sub_norm_NH": "self_attn.attn_sub_norm", "o_NHD": "self_attn.o_proj",
  "ffn_norm_D": "post_attention_layernorm", "gate_DF": "mlp.gate_proj", "up_DF": "mlp.up_proj",
  "ffn_sub_norm_F": "mlp.ffn_sub_norm", "down_FD": "mlp.down_proj",
}  # fmt: skip


def tensor_name(name: str, layer: int | None) -> str:
  return ("" if layer is None else f"model.layers.{layer}.") + NAMES[name] + ".weight"


def check_tensors(folder: Path, weights: ParameterSource, dtype: str) -> None:
  with safetensors.safe_open(folder / "model.safetensors", framework="numpy") as file:
    left = set(file.keys())
    assert file.metadata() == {"format": "pt"}
    for name, layer in weights.places():
      wanted = trained.numbers(weights, name, layer)
      if weights.config.rope_style == "interleaved" and name[:2] in ("q_", "k_"):
        wanted = trained.turned(wanted, "interleaved")
      found = file.get_tensor(tensor_name(name, layer))
      assert found.dtype == np.dtype(dtype)
      np.testing.assert_array_equal(found.astype(np.float32), tiny.as_stored(wanted, name))
      left.remove(tensor_name(name, layer))
    assert not left


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_is_there_exactly(tmp_path: Path, name: str):
  config = CONFIGS[name]
  weights = trained.make(config, 64)
  assert trained.write_folder(tmp_path / "m", weights, None) == "float32"
  check_tensors(tmp_path / "m", weights, "float32")
  table = json.loads((tmp_path / "m" / "config.json").read_text())
  assert table["architectures"] == [KINDS[name.partition(",")[0]]]
  assert table["torch_dtype"] == table["dtype"] == "float32"
  assert table["head_dim"] == config.head_dim and table["vocab_size"] == 270
  assert table["rope_theta"] == table["rope_parameters"]["rope_theta"] == config.rope_base
  assert table["tie_word_embeddings"] is config.tied_embedding
  assert table["hidden_act"] == "silu" and table["eos_token_id"] is None
  assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]
  assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
    "config.json", "generation_config.json", "model.safetensors",
  ]  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_the_folder_is_read_back_to_the_bit(tmp_path: Path, name: str):
  config = CONFIGS[name]
  weights = trained.make(config, 64)
  trained.write_folder(tmp_path / "m", weights, vocab.tiny_bpe())
  with open_model(tmp_path / "m") as model:
    assert not model.problems()
    assert model.config == dataclasses.replace(config, rope_style="half")
    for canonical, layer in weights.places():
      wanted = trained.numbers(weights, canonical, layer)
      if config.rope_style == "interleaved" and canonical[:2] in ("q_", "k_"):
        wanted = trained.turned(wanted, "interleaved")
      np.testing.assert_array_equal(model.read(canonical, layer), wanted, err_msg=canonical)


def test_what_no_class_computes_is_refused_before_anything_is_written(tmp_path: Path):
  weights = trained.make(dataclasses.replace(PLAIN, logit_softcap=30.0))
  with pytest.raises(
    ValueError, match=r"no family of transformers holds.*llama has another logit_"
  ):
    trained.write_folder(tmp_path / "m", weights, None)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("change", "class_", "words"),
  [
    ({"activation": "relu2"}, "LlamaForCausalLM", {"hidden_act": "relu2"}),
    ({"sliding_window": 5}, "MistralForCausalLM", {"sliding_window": 5}),
  ],
)
def test_what_a_family_computes_is_said_in_its_words(
  tmp_path: Path, change: dict, class_: str, words: dict
):
  weights = trained.make(dataclasses.replace(PLAIN, **change))
  trained.write_folder(tmp_path / "m", weights, vocab.tiny_spm())
  table = json.loads((tmp_path / "m" / "config.json").read_text())
  assert table["architectures"] == [class_] and table.items() >= words.items()
  check_tensors(tmp_path / "m", weights, "float32")
  with open_model(tmp_path / "m") as file:
    assert file.config == weights.config
    assert file.tokenizer is not None and file.tokenizer.tokens == vocab.tiny_spm().tokens


def in_bfloat16(weights: ParameterSource) -> ParameterSource:
  """Every number rounded to bfloat16; scales keep their float16."""
  arrays = {}
  for name, array in weights.arrays.items():
    if hasattr(array, "scales"):
      eight_bits = array.scales.astype(ml_dtypes.bfloat16).astype(np.float16)
      arrays[name] = dataclasses.replace(array, scales=eight_bits)
    else:
      arrays[name] = array.astype(ml_dtypes.bfloat16)
  return ParameterSource(weights.config, arrays)


def test_bfloat16_is_taken_where_it_changes_nothing_and_refused_where_it_does(tmp_path: Path):
  weights = trained.make(PLAIN, 64)
  with pytest.raises(ValueError, match="final_norm_D is not exact in bfloat16"):
    trained.write_folder(tmp_path / "m", weights, None, dtype="bfloat16")
  assert not list(tmp_path.iterdir())
  exact = in_bfloat16(weights)
  assert trained.write_folder(tmp_path / "m", exact, None) == "bfloat16"
  check_tensors(tmp_path / "m", exact, "bfloat16")
  assert trained.write_folder(tmp_path / "n", exact, None, dtype="float32") == "float32"
  check_tensors(tmp_path / "n", exact, "float32")


def test_the_tokenizer_is_the_same_for_the_tokenizers_library(tmp_path: Path):
  spec = vocab.tiny_bpe(chat_template="{{ 1 }}")
  trained.write_folder(tmp_path / "m", trained.make(PLAIN), spec)
  theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "m" / "tokenizer.json"))
  assert theirs.get_vocab_size() == 270
  for text in ("the the\n\n 12", "it's \u00e9", ""):
    assert theirs.encode(text).ids == Tokenizer(spec).encode(text, add_special=True)
  said = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
  assert said == {
    "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
    "model_max_length": 2048, "clean_up_tokenization_spaces": False, "chat_template": "{{ 1 }}",
  }  # fmt: skip
  said = json.loads((tmp_path / "m" / "generation_config.json").read_text())
  assert (said["bos_token_id"], said["eos_token_id"]) == (259, [260, 261])


def test_what_cannot_be_written_is_refused_and_nothing_is_left(tmp_path: Path):
  weights = trained.make(PLAIN)
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "x").write_text("")
  before = sorted(tmp_path.rglob("*"))
  for folder, error, reason in (
    ("full", FileExistsError, "full exists: name another"),
    ("full/x", FileExistsError, "x exists: name another"),
    ("none/m", FileNotFoundError, "no such folder"),
  ):
    with pytest.raises(error, match=reason):
      trained.write_folder(tmp_path / folder, weights, None)
  for change, reason in (
    ({"qk_norm": True}, "sub_norm and qk_norm"),
    ({"head_dim": 8}, "num_heads \\* head_dim = 32, model_dim = 64"),
  ):
    config = dataclasses.replace(PLAIN, sub_norm=True, **change)
    with pytest.raises(ValueError, match=reason):
      trained.write_folder(tmp_path / "m", trained.make(config), None)
  spoiled = {**weights.arrays, "down_FD": dataclasses.replace(
    weights.arrays["down_FD"], codes=weights.arrays["down_FD"].codes | 3
  )}  # fmt: skip
  with pytest.raises(ValueError, match="down_FD of layer 0: row 0, element 0: the code 3"):
    trained.write_folder(tmp_path / "m", ParameterSource(PLAIN, spoiled), None)
  assert sorted(tmp_path.rglob("*")) == before
  (tmp_path / "m").mkdir()
  trained.write_folder(tmp_path / "m", weights, None)
  check_tensors(tmp_path / "m", weights, "float32")


def test_an_old_folder_stays_until_the_new_one_is_whole(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  old, new = trained.make(PLAIN, 64), trained.make(PLAIN, 64, seed=1)
  trained.write_folder(tmp_path / "m", old, None)

  def fail(*_) -> None:
    raise OSError("the disk is full")

  with monkeypatch.context() as patch:
    patch.setattr("neurojax.files.write.folder._verify", fail)
    with pytest.raises(OSError, match="full"):
      to_folder(new, tmp_path / "m", is_exact=True, overwrite=True)
  check_tensors(tmp_path / "m", old, "float32")
  to_folder(new, tmp_path / "m", is_exact=True, overwrite=True)
  check_tensors(tmp_path / "m", new, "float32")
  assert [path.name for path in tmp_path.iterdir()] == ["m"]
