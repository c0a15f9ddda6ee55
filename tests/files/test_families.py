"""Each family, from a GGUF file and from a folder: the same configuration, weights and logits."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from neurojax.config import RopeScaling
from neurojax.files import names
from neurojax.files.load import load_span
from neurojax.files.source import open_model
from tests.files import families
from tests.files.families import FAMILIES


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
  path = tmp_path_factory.mktemp("families")
  for name, family in FAMILIES.items():
    values = families.parameters(family)
    tensors = families.huggingface_tensors(name, values)
    families.write_folder(path / name, family.table, tensors, shards=2 if name == "lfm2" else 1)
    families.write_gguf(path / f"{name}.gguf", family, values)
  return path


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_says_what_the_model_is(base: Path, name: str) -> None:
  with open_model(base / name) as model:
    assert model.interpretation.demands == model.interpretation.faults == ()
    assert model.config == FAMILIES[name].config
    assert model.interpretation.architecture == FAMILIES[name].table["model_type"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_gguf_file_says_what_the_model_is(base: Path, name: str) -> None:
  family = FAMILIES[name]
  with open_model(base / f"{name}.gguf") as model:
    assert model.interpretation.demands == model.interpretation.faults == ()
    assert model.config == family.gguf_config
    assert names.architecture_of(family.config) == family.arch
    assert names.rope_factors(family.config) == pytest.approx(family.factors, rel=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_is_read_in_its_place(base: Path, name: str) -> None:
  values = families.parameters(FAMILIES[name])
  with open_model(base / name) as folder, open_model(base / f"{name}.gguf") as file:
    for key, wanted in values.items():
      canonical, _, layer = key.partition("/")
      place = int(layer) if layer else None
      found = folder.read(canonical, place)
      # Gemma's norms are kept less 1, which rounds.
      np.testing.assert_allclose(found, wanted, atol=1e-7 if "norm" in key else 0, err_msg=key)
      theirs = file.read(canonical, place)
      if FAMILIES[name].arch == "llama" and canonical in ("q_DNH", "k_DKH"):
        half = wanted.shape[-1] // 2
        theirs = np.concatenate([theirs[..., ::2], theirs[..., 1::2]], axis=-1)
        assert half * 2 == theirs.shape[-1]
      np.testing.assert_array_equal(theirs, wanted, err_msg=key)


@pytest.mark.parametrize("name", FAMILIES)
def test_both_compute_the_same(base: Path, name: str) -> None:
  ids = jnp.asarray([[(7 * i + 3) % 24 for i in range(20)]])
  logits = []
  for path in (base / name, base / f"{name}.gguf"):
    with open_model(path) as model:
      logits.append(np.asarray(load_span(model)(ids)[0]))
  assert np.abs(logits[0]).max() > 1
  np.testing.assert_allclose(*logits, atol=1e-5)


def test_what_a_gguf_file_says_is_what_is_written_of_a_configuration() -> None:
  for family in FAMILIES.values():
    arch = names.ARCHITECTURES[family.arch]
    said = {
      key.removeprefix(f"{family.arch}."): value
      for key, value in arch.metadata(family.arch, family.gguf_config).items()
    }
    for key in ("head_count", "head_count_kv", "sliding_window"):
      assert said.get(f"attention.{key}") == family.metadata.get(f"attention.{key}")
    for key in ("freq_base", "freq_base_swa", "scaling.type"):
      if family.metadata.get(f"rope.{key}") != "linear" or "gemma3" in family.arch:
        assert said.get(f"rope.{key}") == family.metadata.get(f"rope.{key}")


def test_no_architecture_of_gguf_holds_what_none_has() -> None:
  config = FAMILIES["qwen3"].config
  for change, part in (
    ({"sub_norm": True}, "attn_sub_norm_NH of layer 0"),
    ({"activation": "relu2"}, "qwen3 has another activation"),
    ({"attention_softcap": 50.0}, "qwen3 has another attention_softcap"),
    ({"rope_scaling": RopeScaling(kind="proportional", rotated=0.5)}, "write it as factors"),
  ):
    with pytest.raises(ValueError, match=part):
      names.architecture_of(dataclasses.replace(config, **change))
  plain = dataclasses.replace(FAMILIES["llama"].config, rope_style="half")
  assert names.architecture_of(plain) == "llama"
  assert names.architecture_of(plain, as_it_is=True) == "qwen2"


def interpret(name: str, change: dict[str, object], tensors: dict | None = None):
  """A family's config.json with other words, over the tensors that belong to it."""
  from neurojax.files.source import TensorInfo

  family = FAMILIES[name]
  known = {
    key: TensorInfo(key, "F32", value.shape, 0, value.nbytes)
    for key, value in families.huggingface_tensors(name, families.parameters(family)).items()
  }
  return names.interpret_huggingface(dict(family.table) | change, known | (tensors or {}))


REFUSED: list[tuple[str, str, object]] = [
  ("llama", "model_type", "gpt2"),
  ("llama", "architectures", ["LlamaForSequenceClassification"]),
  ("llama", "hidden_act", "gelu"),
  ("llama", "mlp_bias", True),
  ("llama", "a_key_of_tomorrow", 1),
  ("llama", "rope_scaling", {"type": "dynamic", "factor": 2.0}),
  ("llama", "rope_scaling", {"rope_type": "longrope", "long_factor": [1.0]}),
  ("llama", "rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
  ("llama", "rope_parameters", {"rope_type": "default", "mrope_section": [1, 1, 2]}),
  ("llama", "partial_rotary_factor", 0.5),
  ("qwen3", "layer_types", ["full_attention", "chunked_attention", "full_attention"]),
  ("gemma3", "use_bidirectional_attention", True),
  ("gemma4", "use_bidirectional_attention", "all"),
  ("gemma4", "hidden_size_per_layer_input", 256),
  ("gemma4", "num_kv_shared_layers", 1),
  ("gemma4", "enable_moe_block", True),
  ("gemma4", "use_double_wide_mlp", True),
  ("gemma4", "per_layer_config", {"2": {"head_dim": 16, "intermediate_size": 4}}),
  ("lfm2", "conv_bias", True),
  ("qwen3_moe", "norm_topk_prob", False),
  ("qwen3_moe", "decoder_sparse_step", 2),
  ("qwen3_moe", "mlp_only_layers", [0]),
]


@pytest.mark.parametrize(("name", "key", "value"), REFUSED)
def test_what_the_model_does_not_compute_is_refused_by_name(name: str, key: str, value: object):
  found = interpret(name, {key: value})
  with pytest.raises(NotImplementedError) as caught:
    found.model_config("some/folder")
  assert str(caught.value).startswith("some/folder: ")
  inner = next(iter(value)) if isinstance(value, dict) else key
  assert key in str(caught.value) or str(inner) in str(caught.value) or "rope" in str(caught.value)


FAULTY: list[tuple[str, dict[str, object], str]] = [
  ("llama", {"model_type": None}, "model_type = None"),
  ("llama", {"hidden_size": None}, "it lacks hidden_size"),
  ("llama", {"hidden_size": "32"}, "hidden_size = '32': expected one number"),
  ("llama", {"num_hidden_layers": 4}, "'model.layers.3.input_layernorm.weight' is missing"),
  ("llama", {"num_hidden_layers": 2**62}, "'model.layers.3.input_layernorm.weight' is missing"),
  ("llama", {"num_hidden_layers": 2}, "beyond the 2 layers"),
  ("llama", {"vocab_size": 25}, "has the shape (24, 32), its metadata ask for (25, 32)"),
  ("llama", {"rope_parameters": [1]}, "expected a table"),
  ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor = None: expected one number"),
  ("gemma3", {"layer_types": ["full_attention"]}, "expected 3, one for each layer"),
  ("gemma3", {"sliding_window": None}, "sliding_window = None"),
  ("gemma3", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0"),
  ("gemma3", {"layer_types": None, "num_hidden_layers": 2**62}, "num_hidden_layers"),
  ("gemma4", {"per_layer_config": {"7": {"head_dim": 16}}}, "layers are 0..2"),
  ("gemma4", {"per_layer_config": {"2": {"head_dim": "x"}}}, "expected a table of positive integers"),
  (
    "lfm2", {"layer_types": ["conv", "full_attention", "full_attention"]},
    "'model.layers.2.self_attn.q_proj.weight' is missing",
  ),
  ("mixtral", {"num_local_experts": 5}, "experts.4.w1.weight' is missing"),
  ("mixtral", {"num_local_experts": 2**62}, "experts.4.w1.weight' is missing"),
  ("mixtral", {"num_local_experts": 3}, "(4, 32), its metadata ask for (3, 32)"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "part"), FAULTY)
def test_contradictions(name: str, change: dict[str, object], part: str) -> None:
  with pytest.raises(ValueError) as caught:
    interpret(name, change).model_config("x")
  assert part in str(caught.value)


NEUTRAL: list[tuple[str, dict[str, object]]] = [
  ("llama", {"a_key_of_tomorrow": None, "another": False, "third": []}),
  ("llama", {"torch_dtype": "bfloat16", "temperature": 0.6, "id2label": {"0": "a"}}),
  ("llama", {"rope_parameters": None, "rope_theta": 10_000, "rope_scaling": None}),
  ("llama", {"num_key_value_heads": 2, "head_dim": None}),
  ("qwen2", {"sliding_window": 4096, "layer_types": None}),
  ("gemma3", {"layer_types": None, "sliding_window_pattern": 3, "hidden_act": "gelu"}),
  ("gemma4", {
    "per_layer_config": {"02": {"head_dim": 16, "num_key_value_heads": 1}},
    "global_head_dim": None,
  }),
  ("lfm2", {"layer_types": None, "full_attn_idxs": [1]}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change"), NEUTRAL)
def test_other_spellings_say_the_same(name: str, change: dict[str, object]) -> None:
  assert interpret(name, change).model_config("x") == FAMILIES[name].config


def test_the_oldest_gemma_3_files_leave_out_what_the_class_knows() -> None:
  table = {
    "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
    "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
  }  # fmt: skip
  config = names.interpret_huggingface(table, {}).config
  assert config is not None
  assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
  assert (config.rope_base, config.vocab_size, config.context_length) == (1e6, 262_208, 131_072)
  assert config.layer_pattern == (0, 0, 0, 0, 0, 1)
  local, whole = config.kinds
  assert (local.sliding_window, local.rope_base, local.rope_scaling) == (1024, 10_000.0, None)
  assert (whole.sliding_window, whole.rope_scaling) == (
    None,
    RopeScaling(kind="linear", factor=8.0),
  )


def test_layers_that_slide_from_one_on_are_a_kind_of_their_own() -> None:
  found = interpret(
    "qwen2",
    {
      "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "layer_types": None,
    },
  ).model_config("x")  # fmt: skip
  assert found.layer_pattern == (0, 1, 1)
  assert [kind.sliding_window for kind in found.kinds] == [None, 7]


def test_attention_factors_of_yarn_are_those_of_transformers() -> None:
  yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
  for words, factor in (
    ({}, None),
    ({"attention_factor": 1.25}, 1.25),
    ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
    ({"mscale": 0.707}, None),
  ):
    scaling = interpret("qwen3", {"rope_scaling": yarn | words}).model_config("x").rope_scaling
    assert scaling is not None and scaling.attention_factor == factor


def test_towers_beside_the_text_are_left_aside_and_said() -> None:
  family = FAMILIES["gemma3"]
  values = families.huggingface_tensors("gemma3", families.parameters(family))
  from neurojax.files.source import TensorInfo

  for prefix in ("model.language_model.", "language_model.model."):
    tensors = {key.replace("model.", prefix, 1): value for key, value in values.items()}
    infos = {k: TensorInfo(k, "F32", v.shape, 0, v.nbytes) for k, v in tensors.items()}
    for name in ("model.vision_tower.blocks.0.weight", "multi_modal_projector.mm_input.weight"):
      infos[name] = TensorInfo(name, "F32", (3,), 0, 12)
    text = {k: v for k, v in family.table.items() if k != "architectures"}
    table = {
      "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"],
      "text_config": text, "vision_config": {"model_type": "siglip_vision_model"},
      "image_token_index": 5, "mm_tokens_per_image": 256,
    }  # fmt: skip
    found = names.interpret_huggingface(table, infos)
    assert found.model_config("x") == family.config
    assert found.ignored == ("vision tower: 2 tensors, of which text needs none",)
    assert found.tensors["q_DNH"].name == prefix + "layers.{layer}.self_attn.q_proj.weight"


def test_a_tied_head_that_the_file_repeats_is_the_embedding() -> None:
  from neurojax.files.source import TensorInfo

  found = interpret(
    "qwen2", {}, {"lm_head.weight": TensorInfo("lm_head.weight", "F32", (24, 32), 0, 1)}
  )
  assert found.model_config("x").tied_embedding
  assert "head_DV" not in found.tensors
