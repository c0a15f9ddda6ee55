"""Each family, from a GGUF file and from a folder: the same configuration, weights and logits."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from neurojax.config import RopeScaling
from neurojax.files import names
from neurojax.files.dummy import write_dummy
from neurojax.files.folder import compressed
from neurojax.files.load import load_span
from neurojax.files.open import open_model
from neurojax.files.tensor_info import TensorInfo
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
  family = FAMILIES[name]
  known = {
    key: TensorInfo(key, "F32", value.shape, 0, value.nbytes)
    for key, value in families.huggingface_tensors(name, families.parameters(family)).items()
  }
  return names.interpret_folder(dict(family.table) | change, known | (tensors or {}))


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
  config = names.interpret_folder(table, {}).config
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
    found = names.interpret_folder(table, infos)
    assert found.model_config("x") == family.config
    assert found.ignored == ("vision tower: 2 tensors, of which text needs none",)
    assert found.tensors["q_DNH"].name == prefix + "layers.{layer}.self_attn.q_proj.weight"


def test_a_tied_head_that_the_file_repeats_is_the_embedding() -> None:
  found = interpret(
    "qwen2", {}, {"lm_head.weight": TensorInfo("lm_head.weight", "F32", (24, 32), 0, 1)}
  )
  assert found.model_config("x").tied_embedding
  assert "head_DV" not in found.tensors


def table_of(model_type: str, text: str, **more: object) -> dict[str, object]:
  """A config.json from widths in a row: D F L N K V context."""
  keys = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "max_position_embeddings",
  )  # fmt: skip
  numbers = dict(zip(keys, map(int, text.split()), strict=True))
  return (
    {"model_type": model_type, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16"} | numbers | more
  )


LLAMA31 = {
  "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
  "original_max_position_embeddings": 8192,
}  # fmt: skip
LFM2_TYPES = ["conv", "conv", "full_attention", *["conv", "conv", "full_attention"], "conv", "conv"]
LFM2_TYPES += ["full_attention", "conv"] * 4
# The words of files on the hub, without what says nothing of the computation.
HUB: dict[str, tuple[dict[str, object], dict[str, object]]] = {
  "TinyLlama": (
    table_of("llama", "2048 5632 22 32 4 32000 2048", pretraining_tp=1, rope_scaling=None),
    {"head_dim": 64, "rope_base": 10_000.0, "tied_embedding": False, "rope_scaling": None},
  ),
  "SmolLM2-135M": (
    table_of(
      "llama", "576 1536 30 9 3 49152 8192", is_llama_config=True, rope_interleaved=False,
      rope_theta=100_000, tie_word_embeddings=True,
      **{"transformers.js_config": {"dtype": "q4"}},
    ),
    {"head_dim": 64, "rope_base": 100_000.0, "tied_embedding": True},
  ),
  "Llama-3.1-8B": (
    table_of(
      "llama", "4096 14336 32 32 8 128256 131072", rope_theta=500_000.0, rope_scaling=LLAMA31,
      attention_bias=False, mlp_bias=False,
    ),
    {"rope_base": 500_000.0, "rope_scaling": RopeScaling(
      kind="llama3", factor=8.0, original_context_length=8192,
    )},
  ),
  "Mistral-7B-v0.1": (
    table_of("mistral", "4096 14336 32 32 8 32000 32768", sliding_window=4096, rope_theta=10_000.0),
    {"sliding_window": 4096, "head_dim": 128},
  ),
  "Mistral-Nemo": (
    table_of(
      "mistral", "5120 14336 40 32 8 131072 131072", sliding_window=None, rope_theta=1e6, head_dim=128,
    ),
    {"sliding_window": None, "head_dim": 128, "rope_base": 1e6},
  ),
  "Qwen2.5-7B-Instruct-AWQ": (
    table_of(
      "qwen2", "3584 18944 28 28 4 152064 32768", rope_theta=1e6, use_sliding_window=False,
      sliding_window=131_072, max_window_layers=28,
      quantization_config={"bits": 4, "group_size": 128, "quant_method": "awq", "version": "gemm"},
    ),
    {"qkv_bias": True, "sliding_window": None, "head_dim": 128},
  ),
  "gemma-3-1b-it": (
    table_of(
      "gemma3_text", "1152 6912 26 4 1 262144 32768", rope_theta=1_000_000, head_dim=256,
      rope_local_base_freq=10_000, sliding_window=512, sliding_window_pattern=6, rope_scaling=None,
      cache_implementation="hybrid", query_pre_attn_scalar=256, attn_logit_softcapping=None,
      hidden_activation="gelu_pytorch_tanh",
    ),
    {"attention_scale": None, "tied_embedding": True, "layer_pattern": (0, 0, 0, 0, 0, 1)},
  ),
  "gemma-3-27b-it": (
    {
      "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"],
      "mm_tokens_per_image": 256, "eos_token_id": [1, 106],
      "text_config": {
        "head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504, "sliding_window": 1024,
        "model_type": "gemma3_text", "num_attention_heads": 32, "num_hidden_layers": 62,
        "num_key_value_heads": 16, "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
      },
      "vision_config": {"model_type": "siglip_vision_model"},
    },
    {"attention_scale": 168**-0.5, "num_layers": 62, "layer_pattern": (0, 0, 0, 0, 0, 1)},
  ),
  "gemma-4-31B-it": (
    {
      "model_type": "gemma4", "architectures": ["Gemma4ForConditionalGeneration"],
      "tie_word_embeddings": True, "audio_config": None,
      "text_config": table_of(
        "gemma4_text", "5376 21504 60 32 16 262144 262144", head_dim=256, global_head_dim=512,
        num_global_key_value_heads=4, attention_k_eq_v=True, sliding_window=1024,
        hidden_size_per_layer_input=0, vocab_size_per_layer_input=262_144, num_kv_shared_layers=0,
        enable_moe_block=False, use_double_wide_mlp=False, final_logit_softcapping=30.0,
        hidden_activation="gelu_pytorch_tanh", use_bidirectional_attention="vision",
        num_experts=None, top_k_experts=None, moe_intermediate_size=None,
        layer_types=["sliding_attention"] * 5 + ["full_attention"],
      ),
    },
    {"head_dim": 256, "num_kv_heads": 16, "logit_softcap": 30.0, "attention_scale": 1.0},
  ),
  "LFM2.5-1.2B": (
    {
      key: value
      for key, value in table_of(
        "lfm2", "2048 12288 16 32 8 65536 128000", norm_eps=1e-5, conv_L_cache=3, conv_bias=False,
        block_auto_adjust_ff_dim=True, block_ffn_dim_multiplier=1.0, block_multiple_of=256,
        block_use_swiglu=True, block_use_xavier_init=True, block_dim=2048, conv_dim=2048,
        block_norm_eps=1e-5, conv_use_xavier_init=True, num_heads=32, use_pos_enc=True,
        full_attn_idxs=None, layer_types=LFM2_TYPES, tie_embedding=True,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
      ).items()
      if key != "rms_norm_eps"
    },
    {"ffn_dim": 8192, "conv_width": 3, "head_dim": 64, "qk_norm": True, "rope_base": 1e6},
  ),
  "bitnet-b1.58-2B-4T": (
    table_of(
      "bitnet", "2560 6912 30 20 5 128256 4096", hidden_act="relu2", rope_theta=500_000.0,
      tie_word_embeddings=True, auto_map={"AutoConfig": "configuration_bitnet.BitNetConfig"},
      quantization_config={
        "quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline",
      },
    ),
    {"activation": "relu2", "sub_norm": True, "head_dim": 128, "rope_base": 500_000.0},
  ),
  "Falcon3-7B-1.58bit": (
    table_of(
      "llama", "3072 23040 28 12 4 131080 32768", head_dim=256, rope_theta=1_000_042,
      is_bitnet_config=True,
      quantization_config={"quant_method": "bitnet", "modules_to_not_convert": None},
    ),
    {"head_dim": 256, "rope_base": 1_000_042.0},
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_what_files_on_the_hub_say_is_understood(name: str) -> None:
  table, wanted = HUB[name]
  if name.startswith("gemma-4"):
    text = dict(table["text_config"])  # type: ignore[call-overload]
    text["layer_types"] = text["layer_types"] * 10
    table = table | {"text_config": text}
  found = names.interpret_folder(table, {})
  assert not found.demands
  assert found.config is not None
  for field, value in wanted.items():
    assert getattr(found.config, field) == value, field
  if "quantization_config" in table:
    compressed.quantization(table["quantization_config"])  # type: ignore[arg-type]
  if name.startswith("gemma-4"):
    local, whole = found.config.kinds
    assert found.config.layer_pattern == (0, 0, 0, 0, 0, 1)
    assert (local.head_dim, local.num_kv_heads, local.sliding_window) == (256, 16, 1024)
    assert (whole.head_dim, whole.num_kv_heads, whole.shared_kv) == (512, 4, True)
    assert names.architecture_of(found.config) == "gemma4"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_dummy_of_each_family_says_its_configuration(tmp_path: Path, name: str) -> None:
  family = FAMILIES[name]
  fields = {"model_dim": 64, "head_dim": 64, "ffn_dim": 64}
  if name.startswith("gemma"):
    fields["embedding_scale"] = 8.0
  if name == "gemma4":
    local, whole = family.config.layer_kinds
    fields["layer_kinds"] = (local, dataclasses.replace(whole, head_dim=128))
  if name == "llama3":
    fields["rope_scaling"] = RopeScaling(kind="factors", factors=(1.0,) * 16 + (8.0,) * 16)
  if name == "bitnet":
    fields["head_dim"] = 16
  config = dataclasses.replace(family.gguf_config, **fields)
  write_dummy(tmp_path / "m.gguf", config, "Q2_0 (group 64)")
  with open_model(tmp_path / "m.gguf") as model:
    model.check()
    assert model.config == config
    for layer in range(config.num_layers):
      for canonical in names.layer_names(config, layer):
        sizes = config.sizes(layer)
        shape = tuple(sizes[letter] for letter in canonical.rpartition("_")[2])
        assert model.read(canonical, layer).shape == shape
