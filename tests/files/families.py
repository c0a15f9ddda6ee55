"""One tiny model of each family: its configuration, and what llama.cpp's converter and transformers
say of it, written down by hand."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

from neurojax.config import LayerKind, ModelConfig, RopeScaling
from tests.files import tiny

PLAIN = ModelConfig(
  vocab_size=24, model_dim=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48,
  context_length=64, norm_eps=2.0**-17, tied_embedding=False,
)  # fmt: skip
# Words of GGUF that all of them use, without the architecture.
_GGUF = {
  "embedding_length": 32, "block_count": 3, "attention.head_count": 4,
  "attention.head_count_kv": 2, "feed_forward_length": 48, "context_length": 64,
  "attention.layer_norm_rms_epsilon": 2.0**-17, "rope.freq_base": 10_000.0, "vocab_size": 24,
}  # fmt: skip
_JSON = {
  "vocab_size": 24, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
  "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64,
  "rms_norm_eps": 2.0**-17, "hidden_act": "silu", "tie_word_embeddings": False,
  "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
  "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True, "pad_token_id": None,
  "bos_token_id": 1, "eos_token_id": 2, "dtype": "float32", "transformers_version": "5.24.0",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Family:
  """Attributes:
  config: With the order of a head's elements that transformers has.
  arch, metadata: Of GGUF, keys without the architecture in front.
  table: The config.json.
  factors: The tensor of rotary factors in the GGUF file.
  """

  config: ModelConfig
  arch: str
  metadata: Mapping[str, Any]
  table: Mapping[str, Any]
  factors: tuple[float, ...] = ()

  @property
  def gguf_config(self) -> ModelConfig:
    """As the GGUF file is read."""
    style = "interleaved" if self.arch == "llama" else "half"
    found = dataclasses.replace(self.config, rope_style=style)
    if found.rope_scaling is not None and found.rope_scaling.kind == "llama3":
      found = dataclasses.replace(
        found, rope_scaling=RopeScaling(kind="factors", factors=self.factors)
      )
    return found


def _with(config: ModelConfig = PLAIN, **fields: Any) -> ModelConfig:
  return dataclasses.replace(config, **fields)


_GEMMA = _with(
  tied_embedding=True, qk_norm=True, post_norm=True, activation="gelu_tanh",
  embedding_scale=32**0.5, head_dim=16, rope_base=1e6,
)  # fmt: skip
_GEMMA_JSON = {
  **{key: value for key, value in _JSON.items() if key != "hidden_act"},
  "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh",
  "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
  "sliding_window": 5, "attention_bias": False, "final_logit_softcapping": None,
}  # fmt: skip
_MOE = {"num_experts": 4, "experts_per_token": 2}

FAMILIES: Mapping[str, Family] = {
  "llama": Family(
    PLAIN, "llama", {**_GGUF, "rope.dimension_count": 8},
    {
      **_JSON, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "head_dim": 8,
      "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1,
    },
  ),
  "llama3": Family(
    _with(
      rope_base=500_000.0,
      rope_scaling=RopeScaling(
        kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_context_length=16,
      ),
    ),
    "llama",
    {**_GGUF, "rope.dimension_count": 8, "rope.freq_base": 500_000.0},
    {
      **_JSON, "model_type": "llama",
      "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
      },
    },
    # Wavelengths are 6.28, 167, 4443 and 118000 positions; 16 is what the model was trained on.
    (1.7359411716461182, 8.0, 8.0, 8.0),
  ),
  "mistral": Family(
    _with(head_dim=16, sliding_window=5), "llama",
    {
      **_GGUF, "rope.dimension_count": 16, "attention.key_length": 16,
      "attention.value_length": 16, "attention.sliding_window": 5,
    },
    {**_JSON, "model_type": "mistral", "head_dim": 16, "sliding_window": 5},
  ),
  "qwen2": Family(
    _with(qkv_bias=True, tied_embedding=True), "qwen2", _GGUF,
    {
      **_JSON, "model_type": "qwen2", "tie_word_embeddings": True, "use_sliding_window": False,
      "sliding_window": None, "max_window_layers": 28, "layer_types": ["full_attention"] * 3,
    },
  ),
  "qwen3": Family(
    _with(
      qk_norm=True, head_dim=16,
      rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_context_length=16),
    ),
    "qwen3",
    {
      **_GGUF, "attention.key_length": 16, "attention.value_length": 16,
      "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
      "rope.scaling.original_context_length": 16,
    },
    {
      # The spelling of the files on the hub.
      **{key: value for key, value in _JSON.items() if key != "rope_parameters"},
      "model_type": "qwen3", "head_dim": 16, "attention_bias": False, "rope_theta": 10_000.0,
      "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
      "use_sliding_window": False, "sliding_window": None, "max_window_layers": 3,
    },
  ),
  "gemma3": Family(
    _with(
      _GEMMA,
      layer_kinds=(
        LayerKind(rope_base=10_000.0, sliding_window=5),
        LayerKind(rope_scaling=RopeScaling(kind="linear", factor=8.0)),
      ),
      layer_pattern=(0, 0, 1),
    ),
    "gemma3",
    {
      **_GGUF, "attention.key_length": 16, "attention.value_length": 16, "rope.freq_base": 1e6,
      "attention.sliding_window": 5, "attention.sliding_window_pattern": 3,
      "rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "rope.freq_base_swa": 10_000.0,
    },
    {
      **_GEMMA_JSON, "model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16,
      "attn_logit_softcapping": None, "use_bidirectional_attention": False,
      "_sliding_window_pattern": 6,
      "rope_parameters": {
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 10_000.0, "rope_type": "default"},
      },
    },
  ),
  "gemma4": Family(
    _with(
      _GEMMA, head_dim=8, attention_scale=1.0, v_norm=True, layer_scale=True, logit_softcap=30.0,
      layer_kinds=(
        LayerKind(rope_base=10_000.0, sliding_window=5),
        LayerKind(
          head_dim=16, num_kv_heads=1, shared_kv=True,
          rope_scaling=RopeScaling(kind="proportional", rotated=0.25),
        ),
      ),
      layer_pattern=(0, 0, 1),
    ),
    "gemma4",
    {
      **_GGUF, "attention.head_count_kv": [2, 2, 1], "attention.key_length": 16,
      "attention.value_length": 16, "attention.key_length_swa": 8,
      "attention.value_length_swa": 8, "rope.dimension_count": 16, "rope.dimension_count_swa": 8,
      "rope.freq_base": 1e6, "rope.freq_base_swa": 10_000.0, "attention.sliding_window": 5,
      "attention.sliding_window_pattern": [True, True, False], "attention.shared_kv_layers": 0,
      "embedding_length_per_layer_input": 0, "final_logit_softcapping": 30.0,
    },
    {
      **_GEMMA_JSON, "model_type": "gemma4_text", "head_dim": 8, "global_head_dim": 16,
      "num_global_key_value_heads": 1, "attention_k_eq_v": True, "final_logit_softcapping": 30.0,
      "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 24, "num_kv_shared_layers": 0,
      "enable_moe_block": False, "use_double_wide_mlp": False, "num_experts": None,
      "use_bidirectional_attention": "vision",
      "rope_parameters": {
        "full_attention": {
          "rope_theta": 1e6, "rope_type": "proportional", "partial_rotary_factor": 0.25,
        },
        "sliding_attention": {"rope_theta": 10_000.0, "rope_type": "default"},
      },
    },
    (1.0, 1.0, *[1e30] * 6),
  ),
  "lfm2": Family(
    _with(
      tied_embedding=True, qk_norm=True, conv_width=3, rope_base=1e6,
      layer_kinds=(LayerKind(mixer="convolution"), LayerKind()), layer_pattern=(0, 1),
    ),
    "lfm2",
    {
      **_GGUF, "attention.head_count_kv": [0, 2, 0], "shortconv.l_cache": 3,
      "rope.freq_base": 1e6,
    },
    {
      **{k: v for k, v in _JSON.items() if k not in ("hidden_act", "rms_norm_eps")},
      "model_type": "lfm2", "norm_eps": 2.0**-17, "conv_L_cache": 3, "conv_bias": False,
      "block_auto_adjust_ff_dim": True, "block_ff_dim": 60, "block_ffn_dim_multiplier": 1.0,
      "block_multiple_of": 16, "layer_types": ["conv", "full_attention", "conv"],
      "tie_embedding": True, "block_use_swiglu": True, "num_heads": 4,
      "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    },
  ),
  "bitnet": Family(
    _with(tied_embedding=True, sub_norm=True, activation="relu2"), "bitnet-b1.58",
    {**_GGUF, "rope.dimension_count": 8, "rope.scaling.type": "linear", "rope.scaling.factor": 1.0},
    {
      **_JSON, "model_type": "bitnet", "hidden_act": "relu2", "tie_word_embeddings": True,
      "attention_bias": False, "auto_map": {"AutoConfig": "configuration_bitnet.BitNetConfig"},
    },
  ),
  "mixtral": Family(
    _with(**_MOE), "llama",
    {**_GGUF, "rope.dimension_count": 8, "expert_count": 4, "expert_used_count": 2},
    {
      **_JSON, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2,
      "sliding_window": None, "head_dim": None, "router_aux_loss_coef": 0.001,
      "output_router_logits": False, "router_jitter_noise": 0.0,
    },
  ),
  "qwen3_moe": Family(
    _with(qk_norm=True, head_dim=16, ffn_dim=40, **_MOE), "qwen3moe",
    {
      **_GGUF, "attention.key_length": 16, "attention.value_length": 16, "expert_count": 4,
      "expert_used_count": 2, "expert_feed_forward_length": 40,
    },
    {
      **_JSON, "model_type": "qwen3_moe", "head_dim": 16, "moe_intermediate_size": 40,
      "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True,
      "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False,
      "sliding_window": None, "attention_bias": False,
    },
  ),
}  # fmt: skip

_ATTN, _MLP = "self_attn.", "mlp."
HUGGINGFACE_NAMES: Mapping[str, str] = {
  "embedding_VD": "embed_tokens.weight", "final_norm_D": "norm.weight",
  "attn_norm_D": "input_layernorm.weight", "q_DNH": _ATTN + "q_proj.weight",
  "k_DKH": _ATTN + "k_proj.weight", "v_DKH": _ATTN + "v_proj.weight",
  "q_bias_NH": _ATTN + "q_proj.bias", "k_bias_KH": _ATTN + "k_proj.bias",
  "v_bias_KH": _ATTN + "v_proj.bias", "q_norm_H": _ATTN + "q_norm.weight",
  "k_norm_H": _ATTN + "k_norm.weight", "attn_sub_norm_NH": _ATTN + "attn_sub_norm.weight",
  "o_NHD": _ATTN + "o_proj.weight", "ffn_norm_D": "post_attention_layernorm.weight",
  "gate_DF": _MLP + "gate_proj.weight", "up_DF": _MLP + "up_proj.weight",
  "ffn_sub_norm_F": _MLP + "ffn_sub_norm.weight", "down_FD": _MLP + "down_proj.weight",
}  # fmt: skip
_OTHER_NAMES: Mapping[str, Mapping[str, str]] = {
  "gemma": {
    "attn_post_norm_D": "post_attention_layernorm.weight",
    "ffn_norm_D": "pre_feedforward_layernorm.weight",
    "ffn_post_norm_D": "post_feedforward_layernorm.weight", "layer_scale_1": "layer_scalar",
  },
  "lfm2": {
    "final_norm_D": "embedding_norm.weight", "attn_norm_D": "operator_norm.weight",
    "o_NHD": _ATTN + "out_proj.weight", "q_norm_H": _ATTN + "q_layernorm.weight",
    "k_norm_H": _ATTN + "k_layernorm.weight", "conv_in_DC": "conv.in_proj.weight",
    "conv_kernel_WM": "conv.conv.weight", "conv_out_MD": "conv.out_proj.weight",
    "ffn_norm_D": "ffn_norm.weight", "gate_DF": "feed_forward.w1.weight",
    "up_DF": "feed_forward.w3.weight", "down_FD": "feed_forward.w2.weight",
  },
  "mixtral": {
    "router_DE": "block_sparse_moe.gate.weight", "gate_EDF": "block_sparse_moe.experts.{e}.w1.weight",
    "up_EDF": "block_sparse_moe.experts.{e}.w3.weight",
    "down_EFD": "block_sparse_moe.experts.{e}.w2.weight",
  },
  "qwen3_moe": {
    "router_DE": _MLP + "gate.weight", "gate_EDF": _MLP + "experts.{e}.gate_proj.weight",
    "up_EDF": _MLP + "experts.{e}.up_proj.weight", "down_EFD": _MLP + "experts.{e}.down_proj.weight",
  },
}  # fmt: skip


def parameters(family: Family) -> dict[str, np.ndarray]:
  """Random values in transformers' order, small enough that nothing saturates; norms around 1."""
  values = tiny.parameters(family.config)
  for name, value in values.items():
    is_norm = "norm" in name or "scale" in name
    values[name] = 1 + value / 8 if is_norm else value / np.float32(4)
  return values


def huggingface_tensors(name: str, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The tensors of a folder: transformers' names, order and shapes."""
  names = (
    dict(HUGGINGFACE_NAMES) | _OTHER_NAMES.get(name.rstrip("34"), {}) | _OTHER_NAMES.get(name, {})
  )
  tensors = {}
  for key, value in values.items():
    canonical, _, layer = key.partition("/")
    stored = tiny.as_stored(value, key)
    if canonical == "head_DV":
      tensors["lm_head.weight"] = stored
      continue
    if name == "gemma3" and "norm" in canonical:
      # transformers multiplies by 1 + w.
      stored = stored - np.float32(1)
    if canonical == "conv_kernel_WM":
      stored = stored[:, None, :]
    place = "model." + (f"layers.{layer}." if layer else "") + names[canonical]
    if "{e}" in place:
      tensors |= {place.format(e=e): np.ascontiguousarray(w) for e, w in enumerate(stored)}
    else:
      tensors[place] = np.ascontiguousarray(stored)
  return tensors


def write_folder(
  path: Path, table: Mapping[str, Any], tensors: Mapping[str, np.ndarray], shards: int = 1
) -> Path:
  """A folder by the safetensors package; of several shards, tensors by turns."""
  path.mkdir(parents=True, exist_ok=True)
  (path / "config.json").write_text(json.dumps(dict(table)))
  if shards == 1:
    save_file(dict(tensors), path / "model.safetensors", {"format": "pt"})
    return path
  placed: dict[str, str] = {}
  for shard in range(shards):
    name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
    mine = {key: tensors[key] for key in list(tensors)[shard::shards]}
    save_file(mine, path / name, {"format": "pt"})
    placed |= dict.fromkeys(mine, name)
  index = {"metadata": {"total_size": 0}, "weight_map": placed}
  (path / "model.safetensors.index.json").write_text(json.dumps(index))
  return path


def write_gguf(path: Path, family: Family, values: Mapping[str, np.ndarray]) -> Path:
  """A file by the gguf package, as llama.cpp's converter writes it."""
  writer = gguf.GGUFWriter(path, family.arch)
  for key, value in family.metadata.items():
    add_key(writer, f"{family.arch}.{key}", value)
  if family.factors:
    writer.add_tensor("rope_freqs.weight", np.array(family.factors, np.float32))
  for key, value in values.items():
    stored = tiny.as_stored(value, key)
    if family.arch == "llama" and key.split("/")[0] in ("q_DNH", "k_DKH"):
      stored = permuted(stored, value.shape[1])
    name = tiny.file_name(key)
    if family.arch == "lfm2" and key == "final_norm_D":
      name = "token_embd_norm.weight"
    writer.add_tensor(name, np.ascontiguousarray(stored))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
  if isinstance(value, list):
    writer.add_array(key, value)
  elif isinstance(value, str):
    writer.add_string(key, value)
  elif isinstance(value, float):
    writer.add_float32(key, value)
  else:
    writer.add_uint32(key, value)


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
  """Rows of halves of heads as rows of neighbours: row 2i + j of a head is its row j H/2 + i."""
  split = rows.reshape(heads, 2, -1, *rows.shape[1:])
  return split.swapaxes(1, 2).reshape(rows.shape)
