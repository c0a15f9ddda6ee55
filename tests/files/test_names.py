"""What the model does not compute is refused by name; what changes nothing is not."""

import dataclasses
import math

import pytest

from neurojax.config import ModelConfig
from neurojax.files import names
from neurojax.files.tensor_info import TensorInfo
from tests.files import tiny

METADATA: dict[str, object] = {
  "general.architecture": "llama",
  "llama.embedding_length": 32,
  "llama.block_count": 2,
  "llama.attention.head_count": 4,
  "llama.attention.head_count_kv": 2,
  "llama.feed_forward_length": 48,
  "llama.context_length": 64,
  "llama.rope.freq_base": 20_000.0,
  "llama.attention.layer_norm_rms_epsilon": 2.0**-17,
}
TENSORS = {
  tiny.file_name(name): TensorInfo(
    tiny.file_name(name), "F32", tiny.as_stored(value, name).shape, 0, 4 * math.prod(value.shape)
  )
  for name, value in tiny.parameters(tiny.CONFIG).items()
}


def interpret(
  metadata: dict[str, object] | None = None, tensors: dict[str, TensorInfo] | None = None
) -> names.Interpretation:
  return names.interpret_gguf(METADATA | (metadata or {}), TENSORS | (tensors or {}))


def test_plain_model() -> None:
  found = interpret()
  assert found.demands == found.faults == ()
  assert found.model_config("x") == tiny.CONFIG


def test_a_bitnet_model_normalises_before_every_matrix_and_ties_its_head() -> None:
  metadata = {key.replace("llama.", "bitnet."): value for key, value in METADATA.items()}
  metadata["general.architecture"] = "bitnet"
  tensors = {
    tiny.file_name(name): TensorInfo(
      tiny.file_name(name), "F32", tiny.as_stored(value, name).shape, 0, 4 * value.size
    )
    for name, value in tiny.parameters(tiny.BITNET).items()
  }
  assert names.interpret_gguf(metadata, tensors).model_config("x") == tiny.BITNET
  head = {"output.weight": dataclasses.replace(tensors["token_embd.weight"], name="output.weight")}
  refused = names.interpret_gguf(metadata, tensors | head)
  assert refused.demands == ("tensor 'output.weight': no place in this architecture",)
  del tensors["blk.0.ffn_sub_norm.weight"]
  with pytest.raises(ValueError, match=r"'blk\.0\.ffn_sub_norm\.weight' is missing"):
    names.interpret_gguf(metadata, tensors).model_config("x")


def test_a_qwen3_model_normalises_its_heads_and_turns_halves() -> None:
  metadata = {key.replace("llama.", "qwen3."): value for key, value in METADATA.items()}
  metadata["general.architecture"] = "qwen3"
  tensors = {
    tiny.file_name(name): TensorInfo(
      tiny.file_name(name), "F32", tiny.as_stored(value, name).shape, 0, 4 * value.size
    )
    for name, value in tiny.parameters(tiny.QWEN).items()
  }
  assert names.interpret_gguf(metadata, tensors).model_config("x") == tiny.QWEN
  del tensors["blk.1.attn_k_norm.weight"]
  with pytest.raises(ValueError, match=r"'blk\.1\.attn_k_norm\.weight' is missing"):
    names.interpret_gguf(metadata, tensors).model_config("x")
  refused = names.interpret_gguf(metadata | {"qwen3.rope.scaling.type": "longrope"}, tensors)
  assert refused.demands == ("qwen3.rope.scaling.type = 'longrope'",)


def test_untied_model() -> None:
  found = interpret(tensors={"output.weight": TensorInfo("output.weight", "F32", (24, 32), 0, 1)})
  assert found.model_config("x") == dataclasses.replace(tiny.CONFIG, tied_embedding=False)


def test_absent_keys_mean_what_the_format_says() -> None:
  absent = ("llama.attention.head_count_kv", "llama.rope.freq_base")
  metadata = {key: value for key, value in METADATA.items() if key not in absent}
  tensors = dict(TENSORS)
  for layer in range(2):
    for part in ("k", "v"):
      name = f"blk.{layer}.attn_{part}.weight"
      tensors[name] = dataclasses.replace(tensors[name], shape=(32, 32))
  config = names.interpret_gguf(metadata, tensors).model_config("x")
  assert (config.num_kv_heads, config.rope_base) == (4, 10_000.0)


def test_head_width_of_its_own() -> None:
  shapes = {"attn_q": (64, 32), "attn_k": (32, 32), "attn_v": (32, 32), "attn_output": (32, 64)}
  tensors = {
    f"blk.{layer}.{part}.weight": TensorInfo(f"blk.{layer}.{part}.weight", "F32", shape, 0, 1)
    for layer in range(2)
    for part, shape in shapes.items()
  }
  widths = {"llama.attention.key_length": 16, "llama.attention.value_length": 16}
  found = interpret(widths | {"llama.rope.dimension_count": 16}, tensors)
  assert found.model_config("x").head_dim == 16


NEUTRAL: list[dict[str, object]] = [
  {"llama.rope.scaling.type": "none"},
  {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0},
  {"llama.rope.dimension_count": 8, "llama.attention.value_length": 8},
  {"llama.expert_count": 0, "llama.attention.sliding_window": 0},
  {"llama.attention.head_count_kv": [2, 2], "llama.feed_forward_length": [48, 48]},
  {"llama.vocab_size": 24, "general.quantization_version": 2, "split.count": 1},
  {"general.type": "model", "general.name": "x", "quantize.imatrix.file": "x"},
  {"llama.tensor_data_layout": "Meta AI original pth"},
]


@pytest.mark.parametrize("metadata", NEUTRAL, ids=lambda metadata: "+".join(metadata))
def test_neutral(metadata: dict[str, object]) -> None:
  assert interpret(metadata).model_config("x") == tiny.CONFIG


REFUSED: list[tuple[str, object]] = [
  ("llama.rope.scaling.type", "longrope"),
  ("llama.rope.scaling.attn_factor", 1.2),
  ("llama.rope.scaling.yarn_log_multiplier", 0.1),
  ("llama.rope.dimension_count", 4),
  ("llama.rope.dimension_sections", [4, 4]),
  ("llama.attention.value_length", 16),
  ("llama.attention.sliding_window", [0, 4096]),
  ("llama.attention.sliding_window_pattern", [True, False]),
  ("llama.attention.shared_kv_layers", 1),
  ("llama.attention.causal", False),
  ("llama.attention.clamp_kqv", 8.0),
  ("llama.attention.scale", 0.1),
  ("llama.attention.layer_norm_epsilon", 1e-5),
  ("llama.expert_shared_count", 1),
  ("llama.expert_gating_func", 2),
  ("llama.attn_logit_softcapping", 50.0),
  ("llama.final_logit_softcapping", 30.0),
  ("llama.logit_scale", 0.5),
  ("llama.a_key_of_tomorrow", 1),
  ("split.count", 3),
  ("general.type", "adapter"),
  ("general.quantization_version", 1),
  ("general.architecture", "qwen99"),
  ("prism.hadamard.block_size", 128),
]


@pytest.mark.parametrize(("key", "value"), REFUSED)
def test_refused(key: str, value: object) -> None:
  found = interpret({key: value})
  with pytest.raises(NotImplementedError) as caught:
    found.model_config("some/file.gguf")
  assert str(caught.value).startswith("some/file.gguf: ")
  assert key.removeprefix("general.") in str(caught.value)
  assert len(found.demands) == 1


def test_known_architectures_are_listed() -> None:
  said = interpret({"general.architecture": "qwen99"}).demands[0]
  assert "the known ones are bitnet, bitnet-25, bitnet-b1.58, gemma3, gemma4, lfm2, llama, " in said


@pytest.mark.parametrize(
  ("name", "why"),
  [
    ("rope_freqs.weight", "rotary factors"),
    ("blk.1.attn_q.bias", "biases"),
    ("blk.0.attn_output.bias", "biases"),
    ("output.bias", "biases"),
    ("blk.1.ffn_gate_exps.weight", "mixture of experts"),
    ("blk.1.ffn_gate_inp.weight", "mixture of experts"),
    ("blk.0.attn_q_norm.weight", "normalised queries"),
    ("blk.0.attn_sub_norm.weight", "further normalisation"),
    ("blk.00.attn_q.weight", "no place"),
    ("blk.x.attn_q.weight", "no place"),
    ("anything", "no place"),
  ],
)
def test_tensors_without_a_place_are_refused(name: str, why: str) -> None:
  found = interpret(tensors={name: TensorInfo(name, "F32", (8,), 0, 32)})
  with pytest.raises(NotImplementedError, match=why) as caught:
    found.model_config("x")
  assert name in str(caught.value)


def test_every_demand_is_named_at_once_and_likes_are_counted() -> None:
  tensors = {
    name: TensorInfo(name, "F32", (8,), 0, 32)
    for name in ("rope_freqs.weight", "blk.0.ffn_up.bias", "blk.1.ffn_up.bias")
  }
  found = interpret({"llama.rope.scaling.type": "su", "llama.expert_shared_count": 8}, tensors)
  assert len(found.demands) == 4
  assert "'blk.0.ffn_up.bias' and 1 more like it" in " ".join(found.demands)
  assert found.config == tiny.CONFIG, "stated numbers stay visible"


@pytest.mark.parametrize(
  ("metadata", "part"),
  [
    ({"general.architecture": None}, "general.architecture"),
    ({"llama.block_count": "2"}, "llama.block_count"),
    ({"llama.block_count": 0}, "num_layers = 0"),
    ({"llama.block_count": 3}, "'blk.2.attn_norm.weight' is missing"),
    ({"llama.block_count": 2**62}, "'blk.2.attn_norm.weight' is missing"),
    ({"llama.block_count": 1}, "beyond the 1 layers"),
    ({"llama.attention.head_count": [4, 2]}, "expected one number"),
    ({"llama.attention.head_count": 0}, "head_count = 0"),
    ({"llama.attention.head_count": 3}, "no multiple of llama.attention.head_count = 3"),
    ({"llama.attention.head_count_kv": 3}, "no multiple"),
    ({"llama.feed_forward_length": 47}, "has the shape (48, 32), its metadata ask for (47, 32)"),
    ({"llama.rope.freq_base": math.nan}, "rope_base"),
    ({"llama.rope.freq_base": True}, "expected one number"),
    ({"llama.expert_count": 8}, "experts_per_token = 0"),
    ({"llama.rope.scaling.factor": "8"}, "rope.scaling.factor = '8': expected one number"),
    ({"llama.rope.scaling.factor": -8.0}, "factor = -8.0"),
  ],
)
def test_contradictions(metadata: dict[str, object], part: str) -> None:
  with pytest.raises(ValueError) as caught:
    interpret(metadata).model_config("x")
  assert part in str(caught.value)


@pytest.mark.parametrize("key", [key for key in METADATA if "kv" not in key and "base" not in key])
def test_missing_keys(key: str) -> None:
  metadata = {other: value for other, value in METADATA.items() if other != key}
  with pytest.raises(ValueError) as caught:
    names.interpret_gguf(metadata, TENSORS).model_config("x")
  assert key in str(caught.value)


@pytest.mark.parametrize("name", sorted(TENSORS))
def test_missing_tensors(name: str) -> None:
  tensors = {other: info for other, info in TENSORS.items() if other != name}
  with pytest.raises(ValueError, match=r"missing|lacks") as caught:
    names.interpret_gguf(METADATA, tensors).model_config("x")
  assert name in str(caught.value)


def test_vocabulary_alone() -> None:
  with pytest.raises(ValueError, match="no tensors"):
    names.interpret_gguf(METADATA, {}).model_config("x")


def test_rope_style_is_the_converters() -> None:
  assert interpret().model_config("x").rope_style == "interleaved"
  assert isinstance(interpret().config, ModelConfig)
