"""The architectures of GGUF as data: names of tensors and numbers, and keys that change nothing.

Sources: llama.cpp, src/models/*.cpp (what is computed); conversion/*.py and gguf-py, constants.py and
tensor_mapping.py (what converters write).
"""

import dataclasses
from collections.abc import Iterator, Mapping

from neurojax.config import ModelConfig, RopeStyle
from neurojax.files.names import gguf_layers as layers
from neurojax.files.names.architecture import Stored, at_layer, kind_names
from neurojax.files.names.gguf_layers import Layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
  """One family of GGUF models. Keys are written without the leading "{arch}.".

  Attributes:
    rope_style: The order in which the converter left the rows of q and k.
    tensors: Canonical name to the tensor in the file. Those of `optional` say by their presence that
      the model has them, the others follow from the configuration; without "head_DV" the embedding is
      always tied.
    keys: ModelConfig field to metadata key.
    defaults: The values of fields whose key is absent, as the format has them.
    fixed: ModelConfig fields that are the same for the family.
    same_as: Keys that must repeat a ModelConfig field, because the model has no second number.
    neutral: Other keys and the values under which they change nothing (None: any value).
      A key of the architecture that stands nowhere here is refused.
    layers: The numbers that differ between layers, with keys of their own.
  """

  rope_style: RopeStyle
  tensors: Mapping[str, Stored]
  keys: Mapping[str, str]
  defaults: Mapping[str, float]
  fixed: Mapping[str, object]
  same_as: Mapping[str, str]
  neutral: Mapping[str, tuple[object, ...] | None]
  layers: Layers

  def metadata(self, name: str, config: ModelConfig) -> dict[str, object]:
    """The metadata for a configuration in a file of this architecture, called `name`: key to value.

    Raises: ValueError: the family has no words for a part of it.
    """
    fields = {key: field for field, key in self.keys.items()} | dict(self.same_as)
    said = {key: getattr(config, field) for key, field in fields.items()}
    said |= self.layers.write(config)
    return {f"{name}.{key}": value for key, value in said.items() if value is not None}

  def places(self, config: ModelConfig) -> Iterator[tuple[str, int | None, Stored]]:
    """Every tensor of such a file: canonical name, layer, and where it is."""
    for name in ("embedding_VD", "final_norm_D", "head_DV"):
      if name in self.tensors and not (name == "head_DV" and config.tied_embedding):
        yield name, None, self.tensors[name]
    of_kind = kind_names(config)
    for layer in range(config.num_layers):
      for name in of_kind[config.kind_index(layer)]:
        if name not in self.tensors:
          raise ValueError(f"{name} of layer {layer} has no tensor")
        one = self.tensors[name]
        yield name, layer, dataclasses.replace(one, name=at_layer(one.name, layer))


# Source: conversion/llama.py, LlamaModel.permute: q and k rows are permuted so that rotary pairs are
# neighbours.
_BLOCK = "blk.{layer}."
_OUTER = {
  "embedding_VD": Stored("token_embd.weight", "V D"),
  "final_norm_D": Stored("output_norm.weight", "D"),
  "head_DV": Stored("output.weight", "V D"),
}
_ATTENTION = {
  "attn_norm_D": Stored(_BLOCK + "attn_norm.weight", "D"),
  "q_DNH": Stored(_BLOCK + "attn_q.weight", "NH D"),
  "k_DKH": Stored(_BLOCK + "attn_k.weight", "KH D"),
  "v_DKH": Stored(_BLOCK + "attn_v.weight", "KH D"),
  "o_NHD": Stored(_BLOCK + "attn_output.weight", "D NH"),
}
_FFN = {
  "ffn_norm_D": Stored(_BLOCK + "ffn_norm.weight", "D"),
  "gate_DF": Stored(_BLOCK + "ffn_gate.weight", "F D"),
  "up_DF": Stored(_BLOCK + "ffn_up.weight", "F D"),
  "down_FD": Stored(_BLOCK + "ffn_down.weight", "D F"),
}
_BIASES = {
  "q_bias_NH": Stored(_BLOCK + "attn_q.bias", "NH"),
  "k_bias_KH": Stored(_BLOCK + "attn_k.bias", "KH"),
  "v_bias_KH": Stored(_BLOCK + "attn_v.bias", "KH"),
}
_HEAD_NORMS = {
  "q_norm_H": Stored(_BLOCK + "attn_q_norm.weight", "H"),
  "k_norm_H": Stored(_BLOCK + "attn_k_norm.weight", "H"),
}
_SUB_NORMS = {
  "attn_sub_norm_NH": Stored(_BLOCK + "attn_sub_norm.weight", "NH"),
  "ffn_sub_norm_F": Stored(_BLOCK + "ffn_sub_norm.weight", "F"),
}
_POST_NORMS = {
  "attn_post_norm_D": Stored(_BLOCK + "post_attention_norm.weight", "D"),
  "ffn_post_norm_D": Stored(_BLOCK + "post_ffw_norm.weight", "D"),
}
_EXPERTS = {
  "router_DE": Stored(_BLOCK + "ffn_gate_inp.weight", "E D"),
  "gate_EDF": Stored(_BLOCK + "ffn_gate_exps.weight", "E F D"),
  "up_EDF": Stored(_BLOCK + "ffn_up_exps.weight", "E F D"),
  "down_EFD": Stored(_BLOCK + "ffn_down_exps.weight", "E D F"),
}
_CONVOLUTION = {
  "conv_in_DC": Stored(_BLOCK + "shortconv.in_proj.weight", "C D"),
  "conv_kernel_WM": Stored(_BLOCK + "shortconv.conv.weight", "M W"),
  "conv_out_MD": Stored(_BLOCK + "shortconv.out_proj.weight", "D M"),
}
_LAYER_SCALE = {"layer_scale_1": Stored(_BLOCK + "layer_output_scale.weight", "1")}

_KEYS = {
  "model_dim": "embedding_length",
  "num_layers": "block_count",
  "num_heads": "attention.head_count",
  "num_kv_heads": "attention.head_count_kv",
  "head_dim": "attention.key_length",
  "ffn_dim": "feed_forward_length",
  "context_length": "context_length",
  "rope_base": "rope.freq_base",
  "norm_eps": "attention.layer_norm_rms_epsilon",
}
_EXPERT_KEYS = {"num_experts": "expert_count", "experts_per_token": "expert_used_count"}
_NEUTRAL: Mapping[str, tuple[object, ...] | None] = {
  "vocab_size": None,  # the embedding's rows count
  "tensor_data_layout": ("Meta AI original pth",),
  "use_parallel_residual": (False,),
  "expert_count": (0,),
  "expert_used_count": (0,),
  "expert_shared_count": (0,),
  "expert_group_count": (0, 1),
  "expert_group_used_count": (0, 1),
  "expert_gating_func": (0, 1),  # 1 is softmax
  "expert_weights_norm": (True,),
  "expert_weights_scale": (0, 1),
  "attention.causal": (True,),
  "attention.sliding_window": (0,),
  "attention.sliding_window_pattern": (0,),
  "attention.shared_kv_layers": (0,),
  "attention.clamp_kqv": (0,),
  "attention.max_alibi_bias": (0,),
  "attention.scale": (0,),
  "attn_logit_softcapping": (0,),
  "final_logit_softcapping": (0,),
  "embedding_length_per_layer_input": (0,),
  "logit_scale": (0, 1),
  "residual_scale": (0, 1),
  "embedding_scale": (0, 1),
}
_LLAMA = Architecture(
  rope_style="interleaved",
  tensors={**_OUTER, **_ATTENTION, **_BIASES, **_FFN, **_EXPERTS},
  keys=_KEYS | _EXPERT_KEYS,
  defaults={"rope_base": 10_000.0, "num_experts": 0, "experts_per_token": 0},
  fixed={},
  same_as={"rope.dimension_count": "head_dim", "attention.value_length": "head_dim"},
  neutral=_NEUTRAL,
  layers=layers.WINDOW,
)
# conversion/qwen.py leaves q and k as they are trained.
_QWEN2 = dataclasses.replace(
  _LLAMA,
  rope_style="half",
  tensors={**_OUTER, **_ATTENTION, **_BIASES, **_FFN},
  keys=_KEYS,
  defaults={"rope_base": 10_000.0},
  layers=layers.ALIKE,
)
_QWEN3 = dataclasses.replace(_QWEN2, tensors=_QWEN2.tensors | _HEAD_NORMS)
# src/models/bitnet.cpp: SiLU, and no other head than the embedding. llama_model_rope_type: the two
# of a pair are half a head apart.
_BITNET = dataclasses.replace(
  _QWEN2,
  tensors={
    **{name: one for name, one in _OUTER.items() if name != "head_DV"},
    **_ATTENTION,
    **_FFN,
    **_SUB_NORMS,
  },
)
# microsoft/BitNet's llama.cpp, build_bitnet_158: LLM_FFN_RELU_SQR.
_BITNET_B158 = dataclasses.replace(_BITNET, fixed={"activation": "relu2"})
_GEMMA3 = dataclasses.replace(
  _QWEN2,
  tensors={**_OUTER, **_ATTENTION, **_HEAD_NORMS, **_POST_NORMS, **_FFN},
  keys=_KEYS | {"logit_softcap": "final_logit_softcapping"},
  defaults={"rope_base": 10_000.0, "logit_softcap": None},
  fixed={"activation": "gelu_tanh", "embedding_scale": layers.root_of_width},
  neutral={**_NEUTRAL, "mm.tokens_per_image": None},  # of a vision tower in another file
  layers=layers.GEMMA3,
)
# src/models/gemma4.cpp without the parts of its smaller and sparse models.
_GEMMA4 = dataclasses.replace(
  _GEMMA3,
  tensors=_GEMMA3.tensors | _LAYER_SCALE,
  keys=_GEMMA3.keys | {"head_dim": "attention.key_length_swa"},
  fixed=_GEMMA3.fixed | {"attention_scale": 1.0, "v_norm": True},
  same_as={"attention.value_length_swa": "head_dim", "rope.dimension_count_swa": "head_dim"},
  layers=layers.GEMMA4,
)
_LFM2 = dataclasses.replace(
  _QWEN2,
  tensors={
    **_OUTER,
    # The norm behind the layers, under a name that says otherwise.
    "final_norm_D": Stored("token_embd_norm.weight", "D"),
    **_ATTENTION,
    **_HEAD_NORMS,
    **_CONVOLUTION,
    **_FFN,
  },
  layers=layers.LFM2,
)

ARCHITECTURES: Mapping[str, Architecture] = {
  "llama": _LLAMA,
  "qwen2": _QWEN2,
  "qwen3": _QWEN3,
  "qwen3moe": dataclasses.replace(
    _QWEN3,
    tensors={
      **{name: one for name, one in _QWEN3.tensors.items() if name not in _FFN},
      "ffn_norm_D": _FFN["ffn_norm_D"],
      **_EXPERTS,
    },
    keys=_KEYS | _EXPERT_KEYS | {"ffn_dim": "expert_feed_forward_length"},
    neutral={**_NEUTRAL, "feed_forward_length": None},  # of layers without experts: there are none
  ),
  "gemma3": _GEMMA3,
  "gemma4": _GEMMA4,
  "lfm2": _LFM2,
  "bitnet": _BITNET,
  "bitnet-b1.58": _BITNET_B158,
  "bitnet-25": _BITNET_B158,
}
