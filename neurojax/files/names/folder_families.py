"""The families of transformers as data: names of tensors and numbers, and keys that change nothing.
`names.folder` reads folders by them."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from neurojax.config import LayerKind
from neurojax.files.names.architecture import Demand, Fault, Stored, short, with_kinds
from neurojax.files.names.folder_words import Words


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """One model_type.

  Attributes:
    name: The model_type.
    tensors: Canonical name to the tensor, as a causal model calls it.
    keys: For each field of ModelConfig the keys that may hold it. The first that is there counts.
    defaults: The values that transformers takes where no key is there.
    neutral: Keys and the values under which they change nothing (None: any value), beside those that
      all families have.
    reads: Keys that `layers` and the reader look at.
    layers: The other fields. Raises Fault, Demand, or ValueError.
    activation: The activation that transformers takes where the file names none.
    tied: Whether the head is tied to the embedding where the file does not say.
    vocab_size: The vocabulary that transformers takes where the file names none.
    biases: Whether q, k and v have biases; None: attention_bias says it.
  """

  name: str
  tensors: Mapping[str, Stored]
  keys: Mapping[str, tuple[str, ...]]
  defaults: Mapping[str, int | float | None]
  layers: Callable[[Words], dict[str, Any]]
  neutral: Mapping[str, tuple[object, ...] | None] = dataclasses.field(default_factory=dict)
  reads: tuple[str, ...] = ("hidden_act",)
  activation: str = "silu"
  tied: bool = False
  vocab_size: int | None = None
  biases: bool | None = False


# All of them pair element i of a head with element i + H/2.
_LAYER = "model.layers.{layer}."
_ATTN = _LAYER + "self_attn."
_OUTER = {
  "embedding_VD": Stored("model.embed_tokens.weight", "V D"),
  "final_norm_D": Stored("model.norm.weight", "D"),
  "head_DV": Stored("lm_head.weight", "V D"),
}
_ATTENTION = {
  "attn_norm_D": Stored(_LAYER + "input_layernorm.weight", "D"),
  "q_DNH": Stored(_ATTN + "q_proj.weight", "NH D"),
  "k_DKH": Stored(_ATTN + "k_proj.weight", "KH D"),
  "v_DKH": Stored(_ATTN + "v_proj.weight", "KH D"),
  "o_NHD": Stored(_ATTN + "o_proj.weight", "D NH"),
}
_BIASES = {
  "q_bias_NH": Stored(_ATTN + "q_proj.bias", "NH"),
  "k_bias_KH": Stored(_ATTN + "k_proj.bias", "KH"),
  "v_bias_KH": Stored(_ATTN + "v_proj.bias", "KH"),
}
_HEAD_NORMS = {
  "q_norm_H": Stored(_ATTN + "q_norm.weight", "H"),
  "k_norm_H": Stored(_ATTN + "k_norm.weight", "H"),
}
_SUB_NORMS = {
  "attn_sub_norm_NH": Stored(_ATTN + "attn_sub_norm.weight", "NH"),
  "ffn_sub_norm_F": Stored(_LAYER + "mlp.ffn_sub_norm.weight", "F"),
}
_FFN = {
  "ffn_norm_D": Stored(_LAYER + "post_attention_layernorm.weight", "D"),
  "gate_DF": Stored(_LAYER + "mlp.gate_proj.weight", "F D"),
  "up_DF": Stored(_LAYER + "mlp.up_proj.weight", "F D"),
  "down_FD": Stored(_LAYER + "mlp.down_proj.weight", "D F"),
}
_GEMMA_NORMS = {
  "attn_post_norm_D": Stored(_LAYER + "post_attention_layernorm.weight", "D"),
  "ffn_norm_D": Stored(_LAYER + "pre_feedforward_layernorm.weight", "D"),
  "ffn_post_norm_D": Stored(_LAYER + "post_feedforward_layernorm.weight", "D"),
}
_MIXTRAL = _LAYER + "block_sparse_moe."
_MIXTRAL_EXPERTS = {
  "ffn_norm_D": _FFN["ffn_norm_D"],
  "router_DE": Stored(_MIXTRAL + "gate.weight", "E D"),
  "gate_EDF": Stored(_MIXTRAL + "experts.{expert}.w1.weight", "E F D"),
  "up_EDF": Stored(_MIXTRAL + "experts.{expert}.w3.weight", "E F D"),
  "down_EFD": Stored(_MIXTRAL + "experts.{expert}.w2.weight", "E D F"),
}
_QWEN_EXPERTS = {
  "ffn_norm_D": _FFN["ffn_norm_D"],
  "router_DE": Stored(_LAYER + "mlp.gate.weight", "E D"),
  "gate_EDF": Stored(_LAYER + "mlp.experts.{expert}.gate_proj.weight", "E F D"),
  "up_EDF": Stored(_LAYER + "mlp.experts.{expert}.up_proj.weight", "E F D"),
  "down_EFD": Stored(_LAYER + "mlp.experts.{expert}.down_proj.weight", "E D F"),
}
_LFM2 = {
  "embedding_VD": _OUTER["embedding_VD"],
  "final_norm_D": Stored("model.embedding_norm.weight", "D"),
  "head_DV": _OUTER["head_DV"],
  **_ATTENTION,
  "attn_norm_D": Stored(_LAYER + "operator_norm.weight", "D"),
  "o_NHD": Stored(_ATTN + "out_proj.weight", "D NH"),
  "q_norm_H": Stored(_ATTN + "q_layernorm.weight", "H"),
  "k_norm_H": Stored(_ATTN + "k_layernorm.weight", "H"),
  "conv_in_DC": Stored(_LAYER + "conv.in_proj.weight", "C D"),
  "conv_kernel_WM": Stored(_LAYER + "conv.conv.weight", "M 1 W"),
  "conv_out_MD": Stored(_LAYER + "conv.out_proj.weight", "D M"),
  "ffn_norm_D": Stored(_LAYER + "ffn_norm.weight", "D"),
  "gate_DF": Stored(_LAYER + "feed_forward.w1.weight", "F D"),
  "up_DF": Stored(_LAYER + "feed_forward.w3.weight", "F D"),
  "down_FD": Stored(_LAYER + "feed_forward.w2.weight", "D F"),
}


def _shifted(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
  """Norms that multiply by one more than what the file holds (Gemma)."""
  return {
    name: dataclasses.replace(one, shift=1.0) if "_norm_" in name else one
    for name, one in tensors.items()
  }


_KEYS: Mapping[str, tuple[str, ...]] = {
  "model_dim": ("hidden_size",),
  "num_layers": ("num_hidden_layers",),
  "num_heads": ("num_attention_heads",),
  "num_kv_heads": ("num_key_value_heads",),
  "head_dim": ("head_dim",),
  "ffn_dim": ("intermediate_size",),
  "context_length": ("max_position_embeddings",),
  "norm_eps": ("rms_norm_eps",),
}
_DEFAULTS: Mapping[str, int | float | None] = {
  "num_kv_heads": None,  # as many as there are heads
  "head_dim": None,  # hidden_size by them
  "context_length": 2048,
  "norm_eps": 1e-6,
}
_NO_BIAS: Mapping[str, tuple[object, ...] | None] = {
  "attention_bias": (False,),
  "mlp_bias": (False,),
}


def _plain(base: float, window: int | None = None) -> Callable[[Words], dict[str, Any]]:
  """Layers that are alike, their window (else `window`) in sliding_window."""

  def layers(words: Words) -> dict[str, Any]:
    rope_base, scaling = words.rotary(words.rope(), words.number("rope_theta", base))
    # An explicit null is none, an absent key the default.
    size = words.text.get("sliding_window", window)
    if size is not None and type(size) is not int:
      raise Fault(f"sliding_window = {short(size)}: expected one whole number")
    return {"rope_base": rope_base, "rope_scaling": scaling, "sliding_window": size or None}

  return layers


def _no_window(base: float) -> Callable[[Words], dict[str, Any]]:
  def layers(words: Words) -> dict[str, Any]:
    rope_base, scaling = words.rotary(words.rope(), words.number("rope_theta", base))
    return {"rope_base": rope_base, "rope_scaling": scaling}

  return layers


def _qwen(words: Words) -> dict[str, Any]:
  """Layers from max_window_layers on slide, where use_sliding_window says that any do."""
  base, scaling = words.rotary(words.rope(), words.number("rope_theta", 10_000.0))
  window = words.count("sliding_window", 4096) if words.get("use_sliding_window", False) else None
  count = words.check_layers()
  types = words.layer_types("full_attention", "sliding_attention")
  if types is None:
    first = words.count("max_window_layers", 28)
    slides = [window is not None and i >= first for i in range(count)]
  else:
    slides = [kind == "sliding_attention" for kind in types]
  if any(slides) and window is None:
    raise Fault("layer_types has sliding layers, and use_sliding_window is false")
  whole = LayerKind(rope_base=base, rope_scaling=scaling)
  local = dataclasses.replace(whole, sliding_window=window)
  return {"rope_base": base, **with_kinds([whole, local], [int(s) for s in slides], base)}


def _gemma_types(words: Words) -> list[bool]:
  """For each layer, whether it is local: the file lists it, or every sixth layer is not."""
  types = words.layer_types("full_attention", "sliding_attention")
  if types is not None:
    return [kind == "sliding_attention" for kind in types]
  every = words.count("sliding_window_pattern", words.count("_sliding_window_pattern", 6))
  if every < 1:
    raise Fault(f"sliding_window_pattern = {every}: it must be positive")
  return [(i + 1) % every != 0 for i in range(words.check_layers())]


def _gemma3(words: Words) -> dict[str, Any]:
  nested = words.get("rope_parameters")
  new = isinstance(nested, dict) and any(isinstance(value, dict) for value in nested.values())
  global_table = words.rope("full_attention")
  local_table = words.rope("sliding_attention") if new else {}
  base, scaling = words.rotary(global_table, words.number("rope_theta", 1_000_000.0))
  local_base, local_scaling = words.rotary(
    local_table, words.number("rope_local_base_freq", 10_000.0)
  )
  # An explicit null has been seen where every layer is global.
  window = words.text.get("sliding_window", 4096)
  slides = _gemma_types(words)
  if any(slides) and (type(window) is not int or window < 1):
    raise Fault(f"sliding_window = {short(window)}: it must be a positive integer")
  local = LayerKind(rope_base=local_base, rope_scaling=local_scaling, sliding_window=window)
  whole = LayerKind(rope_base=base, rope_scaling=scaling)
  return {
    "rope_base": base,
    "embedding_scale": math.sqrt(words.values["model_dim"]),
    "attention_scale": _scale(words),
    **with_kinds([local, whole], [0 if s else 1 for s in slides], base),
  }


def _scale(words: Words) -> float | None:
  said = words.number("query_pre_attn_scalar", 256)
  if said <= 0:
    raise Fault(f"query_pre_attn_scalar = {said}: it must be positive")
  return None if said == words.values["head_dim"] else said**-0.5


def _gemma4(words: Words) -> dict[str, Any]:
  values = words.values
  slides = _gemma_types(words)
  # transformers makes the last layer a global one, whatever the file says.
  slides[-1] = False
  of_layer = _gemma4_overrides(words, slides)
  tables = {kind: words.rope(kind) for kind in ("sliding_attention", "full_attention")}
  if not tables["full_attention"]:
    tables["full_attention"] = {"rope_type": "proportional", "partial_rotary_factor": 0.25}
  # An absent key is not 0.
  if size := words.text.get("hidden_size_per_layer_input", 256):
    raise Demand(f"hidden_size_per_layer_input = {short(size)}: embeddings of each layer")
  window = words.count("sliding_window", 512)
  shared = bool(words.get("attention_k_eq_v", False))
  base = 0.0
  kinds = []
  for is_local, own in zip(slides, of_layer, strict=True):
    head_dim = own.get("head_dim", values["head_dim"])
    table = tables["sliding_attention" if is_local else "full_attention"]
    rope_base, scaling = words.rotary(table, 10_000.0 if is_local else 1_000_000.0, head_dim)
    base = base if is_local else rope_base
    kv_heads = own.get("num_key_value_heads", values["num_kv_heads"])
    kinds.append(
      LayerKind(
        head_dim=None if head_dim == values["head_dim"] else head_dim,
        num_kv_heads=None if kv_heads == values["num_kv_heads"] else kv_heads,
        rope_base=rope_base,
        rope_scaling=scaling,
        sliding_window=window if is_local else None,
        shared_kv=shared and not is_local,
      )
    )
  return {
    "rope_base": base,
    "embedding_scale": math.sqrt(values["model_dim"]),
    "attention_scale": 1.0,
    "v_norm": True,
    **with_kinds(kinds, range(len(kinds)), base),
  }


def _gemma4_overrides(words: Words, slides: list[bool]) -> list[Mapping[str, int]]:
  """The numbers that are a layer's own, in the spelling by layer or in the older one for global layers."""
  said = words.get("per_layer_config")
  if said is None:
    own = {"head_dim": words.count("global_head_dim", 512)}
    if words.get("attention_k_eq_v", False) and words.get("num_global_key_value_heads") is not None:
      own["num_key_value_heads"] = words.count("num_global_key_value_heads")
    return [{} if is_local else own for is_local in slides]
  if not isinstance(said, dict):
    raise Fault(f"per_layer_config = {short(said)}: expected a table")
  found: list[Mapping[str, int]] = [{}] * len(slides)
  for key, table in said.items():
    if not key.isascii() or not key.isdigit() or int(key[:9]) >= len(slides):
      raise Fault(f"per_layer_config has {short(key)}: layers are 0..{len(slides) - 1}")
    if not isinstance(table, dict) or any(type(v) is not int or v < 1 for v in table.values()):
      raise Fault(
        f"per_layer_config of {key} = {short(table)}: expected a table of positive integers"
      )
    if more := table.keys() - {"head_dim", "num_key_value_heads"}:
      raise Demand(f"per_layer_config: {min(more)} of layer {key}")
    found[int(key)] = table
  return found


def _lfm2(words: Words) -> dict[str, Any]:
  count = words.check_layers()
  types = words.layer_types("full_attention", "conv")
  if types is None:
    full = words.get("full_attn_idxs", list(range(count)))
    if not isinstance(full, list):
      raise Fault(f"full_attn_idxs = {short(full)}: expected a list")
    types = ["full_attention" if i in full else "conv" for i in range(count)]
  base, scaling = words.rotary(words.rope(), words.number("rope_theta", 1_000_000.0))
  kinds = [LayerKind(mixer="convolution"), LayerKind(rope_base=base, rope_scaling=scaling)]
  found = {
    "rope_base": base,
    "ffn_dim": _lfm2_width(words),
    "conv_width": words.count("conv_L_cache", 3) if "conv" in types else 0,
    **with_kinds(kinds, [int(kind == "full_attention") for kind in types], base),
  }
  if words.get("tie_embedding") is not None:
    found["tied_embedding"] = bool(words.get("tie_embedding"))
  return found


def _lfm2_width(words: Words) -> int:
  """The width of the FFN, which transformers' Lfm2MLP computes from the number in the file."""
  width = words.values["ffn_dim"]
  if not words.get("block_auto_adjust_ff_dim", True):
    return width
  width = int(2 * width / 3)
  # An explicit null leaves it there.
  factor = words.text.get("block_ffn_dim_multiplier", 1.0)
  if factor is None:
    return width
  multiple = words.count("block_multiple_of", 256) or 1
  width = int(words.number("block_ffn_dim_multiplier", 1.0) * width)
  return multiple * ((width + multiple - 1) // multiple)


def _mixtral(words: Words) -> dict[str, Any]:
  return _plain(1_000_000.0)(words)


def _qwen3_moe(words: Words) -> dict[str, Any]:
  if not words.get("norm_topk_prob", False):
    raise Demand("norm_topk_prob = False: weights of experts that are not normalised")
  # Its window, if there is one, is that of all layers.
  window = words.count("sliding_window", 4096) if words.get("use_sliding_window", False) else None
  return {**_no_window(10_000.0)(words), "sliding_window": window or None}


_LLAMA_FAMILY = Family(
  name="llama",
  tensors={**_OUTER, **_ATTENTION, **_BIASES, **_FFN},
  keys=_KEYS,
  defaults=_DEFAULTS,
  layers=_no_window(10_000.0),
  neutral={"mlp_bias": (False,)},
  reads=("hidden_act", "attention_bias"),
  biases=None,
)
_QWEN_READS = (
  "hidden_act",
  "attention_bias",
  "use_sliding_window",
  "sliding_window",
  "layer_types",
  "max_window_layers",
)
_GEMMA_READS = (
  "hidden_act", "hidden_activation", "sliding_window", "sliding_window_pattern",
  "_sliding_window_pattern", "layer_types", "query_pre_attn_scalar", "rope_local_base_freq",
)  # fmt: skip
_GEMMA3 = Family(
  name="gemma3_text",
  tensors=_shifted({**_OUTER, **_ATTENTION, **_HEAD_NORMS, **_FFN, **_GEMMA_NORMS}),
  keys=_KEYS | {"logit_softcap": ("final_logit_softcapping",)},
  defaults={
    **_DEFAULTS, "model_dim": 2304, "ffn_dim": 9216, "num_layers": 26, "num_heads": 8,
    "num_kv_heads": 4, "head_dim": 256, "context_length": 131_072, "logit_softcap": None,
  },
  layers=_gemma3,
  neutral={
    **_NO_BIAS, "use_bidirectional_attention": (False,), "cache_implementation": None,
    # A word that Gemma 2 left: transformers' Gemma 3 computes no such cap, whatever it says.
    "attn_logit_softcapping": None,
  },
  reads=_GEMMA_READS,
  activation="gelu_pytorch_tanh",
  tied=True,
  vocab_size=262_208,
)  # fmt: skip

FAMILIES: Mapping[str, Family] = {
  family.name: family
  for family in (
    _LLAMA_FAMILY,
    dataclasses.replace(
      _LLAMA_FAMILY,
      name="mistral",
      defaults={**_DEFAULTS, "num_kv_heads": 8, "context_length": 131_072},
      layers=_plain(10_000.0, window=4096),
      reads=("hidden_act", "attention_bias", "sliding_window"),
    ),
    dataclasses.replace(
      _LLAMA_FAMILY,
      name="qwen2",
      defaults={**_DEFAULTS, "num_kv_heads": 32, "context_length": 32_768},
      layers=_qwen,
      neutral=_NO_BIAS,
      reads=_QWEN_READS,
      biases=True,
    ),
    dataclasses.replace(
      _LLAMA_FAMILY,
      name="qwen3",
      tensors=_LLAMA_FAMILY.tensors | _HEAD_NORMS,
      defaults={**_DEFAULTS, "num_kv_heads": 32, "head_dim": 128, "context_length": 32_768},
      layers=_qwen,
      neutral=_NO_BIAS,
      reads=_QWEN_READS,
    ),
    _GEMMA3,
    dataclasses.replace(
      _GEMMA3,
      name="gemma4_text",
      tensors={
        **_OUTER, **_ATTENTION, **_HEAD_NORMS, **_FFN, **_GEMMA_NORMS,
        "layer_scale_1": Stored(_LAYER + "layer_scalar", "1"),
      },
      keys=_KEYS | {"logit_softcap": ("final_logit_softcapping",)},
      defaults={
        **_DEFAULTS, "model_dim": 2304, "ffn_dim": 9216, "num_layers": 30, "num_heads": 8,
        "num_kv_heads": 4, "head_dim": 256, "context_length": 131_072, "logit_softcap": None,
      },
      layers=_gemma4,
      neutral={
        **_NO_BIAS,
        # Images are seen both ways; text is not.
        "use_bidirectional_attention": ("vision",),
        "num_kv_shared_layers": (0,),
        "cache_implementation": None,
        "enable_moe_block": (False,),
        "use_double_wide_mlp": (False,),
        # Without the block that would use them.
        "num_experts": None, "top_k_experts": None, "moe_intermediate_size": None,
        "expert_intermediate_size": None, "vocab_size_per_layer_input": None,
      },
      reads=(
        "hidden_act", "hidden_activation", "sliding_window", "sliding_window_pattern",
        "_sliding_window_pattern", "layer_types", "per_layer_config", "global_head_dim",
        "num_global_key_value_heads", "attention_k_eq_v", "hidden_size_per_layer_input",
      ),
      vocab_size=262_144,
    ),
    Family(
      name="lfm2",
      tensors=_LFM2,
      keys=_KEYS | {"ffn_dim": ("block_ff_dim", "intermediate_size"), "norm_eps": ("norm_eps",)},
      defaults={**_DEFAULTS, "num_kv_heads": 8, "context_length": 128_000, "norm_eps": 1e-5},
      layers=_lfm2,
      neutral={
        "conv_bias": (False,), "block_use_swiglu": (True,), "use_pos_enc": (True,),
        # How it was trained, and numbers that other keys repeat.
        **dict.fromkeys((
          "block_dim", "block_mlp_init_scale", "block_norm_eps", "block_out_init_scale",
          "block_use_xavier_init", "conv_dim", "conv_dim_out", "conv_use_xavier_init", "num_heads",
          "theta",
        )),
      },
      reads=(
        "layer_types", "full_attn_idxs", "block_auto_adjust_ff_dim", "block_ffn_dim_multiplier",
        "block_multiple_of", "conv_L_cache", "tie_embedding",
      ),
      tied=True,
      vocab_size=65_536,
    ),
    dataclasses.replace(
      _LLAMA_FAMILY,
      name="bitnet",
      tensors={**_OUTER, **_ATTENTION, **_SUB_NORMS, **_FFN},
      defaults={**_DEFAULTS, "num_kv_heads": 5, "norm_eps": 1e-5},
      layers=_no_window(500_000.0),
      neutral=_NO_BIAS,
      reads=("hidden_act",),
      activation="relu2",
      biases=False,
    ),
    dataclasses.replace(
      _LLAMA_FAMILY,
      name="mixtral",
      tensors={**_OUTER, **_ATTENTION, **_MIXTRAL_EXPERTS},
      keys=_KEYS | {
        "num_experts": ("num_local_experts",), "experts_per_token": ("num_experts_per_tok",),
      },
      defaults={
        **_DEFAULTS, "num_kv_heads": 8, "context_length": 131_072, "norm_eps": 1e-5,
        "num_experts": 8, "experts_per_token": 2,
      },
      layers=_mixtral,
      neutral=_NO_BIAS,
      reads=("hidden_act", "sliding_window"),
      biases=False,
    ),
    dataclasses.replace(
      _LLAMA_FAMILY,
      name="qwen3_moe",
      tensors={**_OUTER, **_ATTENTION, **_HEAD_NORMS, **_BIASES, **_QWEN_EXPERTS},
      keys=_KEYS | {
        "ffn_dim": ("moe_intermediate_size",),
        "num_experts": ("num_local_experts", "num_experts"),
        "experts_per_token": ("num_experts_per_tok",),
      },
      defaults={
        **_DEFAULTS, "num_kv_heads": 4, "context_length": 32_768, "ffn_dim": 768,
        "num_experts": 128, "experts_per_token": 8,
      },
      layers=_qwen3_moe,
      neutral={
        **_NO_BIAS, "intermediate_size": None, "decoder_sparse_step": (1,), "mlp_only_layers": ([],),
      },
      reads=("hidden_act", "sliding_window", "use_sliding_window", "norm_topk_prob"),
      biases=False,
    ),
  )
}  # fmt: skip
"""By model_type."""

TEXT_OF: Mapping[str, str] = {"gemma3": "gemma3_text", "gemma4": "gemma4_text"}
"""Models with other towers beside the text model, which has a table of its own in config.json."""
