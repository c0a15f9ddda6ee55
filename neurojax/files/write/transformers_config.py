"""Writes config.json: a ModelConfig in the words of a family of transformers."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from neurojax.config import LayerKind, ModelConfig, RopeScaling
from neurojax.files import names
from neurojax.files.names import FOLDER_FAMILIES, interpret_folder
from neurojax.files.tensor_info import TensorInfo
from neurojax.files.write.tensors import places

Table = dict[str, Any]

CLASSES: Mapping[str, str] = {
  "llama": "LlamaForCausalLM",
  "mistral": "MistralForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
  "gemma3_text": "Gemma3ForCausalLM",
  "gemma4_text": "Gemma4ForCausalLM",
  "lfm2": "Lfm2ForCausalLM",
  "bitnet": "BitNetForCausalLM",
  "mixtral": "MixtralForCausalLM",
  "qwen3_moe": "Qwen3MoeForCausalLM",
}
"""Classes of transformers by model_type. The first family that holds a model is written."""

_HIDDEN_ACT = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh", "relu2": "relu2"}
_TYPES = {True: "sliding_attention", False: "full_attention"}


def config_json(config: ModelConfig) -> Table:
  """The config.json of a model whose heads are in the order of transformers ("half"), dtype and ids of
  special tokens aside. The reader of folders makes the same ModelConfig of it.

  Raises: ValueError: no family of transformers has all of these parts; it says what each lacks.
  """
  reasons = []
  for model_type in CLASSES:
    try:
      table, tensors = _table(model_type, config), _tensors(model_type, config)
    except ValueError as error:
      reasons.append(f"{model_type}: {error}")
      continue
    found = interpret_folder(table, tensors)
    if found.config is not None and not found.demands and not found.faults:
      # Factors that come to a Llama 3 scaling are as good as its words.
      wanted, made = names.in_words(config), names.in_words(found.config)
      fields = [
        field.name
        for field in dataclasses.fields(config)
        if not alike(getattr(wanted, field.name), getattr(made, field.name))
      ]
      if not fields:
        return table
      reasons.append(f"{model_type} has another {' and '.join(fields)}")
    else:
      reasons.append(f"{model_type}: {'; '.join([*found.demands, *found.faults])[:200]}")
  raise ValueError(f"no family of transformers holds this model: {'; '.join(reasons)}")


def alike(one: object, other: object) -> bool:
  """Whether two values are equal, apart from differences that float32 cannot hold."""
  if isinstance(one, float) and isinstance(other, int | float):
    return abs(one - other) <= 3e-7 * abs(one)
  if dataclasses.is_dataclass(one) and type(one) is type(other):
    return all(
      alike(getattr(one, field.name), getattr(other, field.name))
      for field in dataclasses.fields(one)
    )
  if isinstance(one, tuple) and isinstance(other, tuple):
    return len(one) == len(other) and all(map(alike, one, other))
  return one == other


def _tensors(model_type: str, config: ModelConfig) -> dict[str, TensorInfo]:
  """The tensors of such a folder, as far as the reader looks at them."""
  found = {}
  for place in places(folder_places(model_type, config), config.num_experts):
    found[place.file_name] = TensorInfo(place.file_name, "F32", place.shape(config), 0, 0)
  return found


def folder_places(model_type: str, config: ModelConfig):
  """Every tensor of a folder: canonical name, layer, and where it is.

  Raises: ValueError: the family has no place for one.
  """
  tensors = FOLDER_FAMILIES[model_type].tensors
  wanted = [("embedding_VD", None), ("final_norm_D", None)]
  wanted += [] if config.tied_embedding else [("head_DV", None)]
  wanted += [
    (name, layer) for layer in range(config.num_layers) for name in names.layer_names(config, layer)
  ]
  for name, layer in wanted:
    if name not in tensors:
      raise ValueError(f"it has no {name}")
    one = tensors[name]
    at = one.name if layer is None else one.name.replace("{layer}", str(layer))
    yield name, layer, dataclasses.replace(one, name=at)


def _table(model_type: str, config: ModelConfig) -> Table:
  family = FOLDER_FAMILIES[model_type]
  table: Table = {"architectures": [CLASSES[model_type]], "model_type": model_type}
  for field, keys in family.keys.items():
    table[keys[0]] = _short(getattr(config, field))
  # What is left out is another family's default, which nulls keep away.
  activation = _HIDDEN_ACT[config.activation]
  key = "hidden_activation" if "hidden_activation" in family.reads else "hidden_act"
  table |= {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tied_embedding}
  if key in family.reads:
    table[key] = activation
  if "attention_bias" in (*family.reads, *family.neutral):
    table["attention_bias"] = False
  return table | _WRITERS[model_type](config)


def _short(value: object) -> object:
  """The shortest number that float32 rounds to this one, as somebody would have written it."""
  if isinstance(value, float) and float(np.float32(value)) == value:
    return float(str(np.float32(value)))
  return value


def _rope(config: ModelConfig, kind: LayerKind) -> Table:
  """The table of rotary positions of a kind of layers, as transformers 5 has it."""
  base, scaling = _short(kind.rope_base or config.rope_base), kind.rope_scaling
  if scaling is not None and scaling.kind == "factors":
    scaling = _llama3(scaling, kind.rope_base or config.rope_base)
  table: Table = {"rope_theta": base, "rope_type": "default" if scaling is None else scaling.kind}
  match scaling:
    case None:
      pass
    case RopeScaling(kind="linear"):
      table["factor"] = scaling.factor
    case RopeScaling(kind="llama3"):
      table |= {
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_context_length,
      }
    case RopeScaling(kind="yarn"):
      table |= {
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_context_length,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "truncate": scaling.truncate,
      }
      if scaling.attention_factor is not None:
        table["attention_factor"] = scaling.attention_factor
    case RopeScaling(kind="proportional"):
      table |= {"partial_rotary_factor": scaling.rotated, "factor": scaling.factor}
    case _:
      raise ValueError(f"rope scaling {scaling.kind!r} has no words")
  return table


def _llama3(scaling: RopeScaling, base: float) -> RopeScaling:
  """The Llama 3 scaling that gives these factors.

  Raises: ValueError: none of those that models have does.
  """
  factors = np.array(scaling.factors)
  pairs = len(factors)
  if scaling.factor != 1 or not (factors >= 1).all():
    raise ValueError("rotary factors that are no Llama 3's have no words")
  wavelengths = 2 * math.pi * base ** (np.arange(pairs) / pairs)
  for original in (2**i for i in range(3, 21)):
    for low, high in ((1.0, 4.0), (1.0, 2.0), (1.0, 8.0), (2.0, 4.0)):
      factor = float(factors.max())
      smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
      made = 1 / ((1 - smooth) / factor + smooth)
      if np.abs(made - factors).max() < 1e-5 * factor and made.max() > 1:
        return RopeScaling(
          kind="llama3", factor=round(factor, 6), original_context_length=original,
          low_freq_factor=low, high_freq_factor=high,
        )  # fmt: skip
  raise ValueError("rotary factors that are no Llama 3's have no words")


def _alone(config: ModelConfig) -> Table:
  """The rotary keys of a model whose layers are alike, as transformers 5 and, for older ones, 4 spell them."""
  if config.layer_kinds:
    raise ValueError("its layers are of one kind")
  rope = _rope(config, config.kind(0))
  table: Table = {"rope_parameters": rope, "rope_theta": rope["rope_theta"]}
  if rope["rope_type"] != "default":
    table["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
  return table


def _windowless(config: ModelConfig) -> Table:
  if config.sliding_window is not None:
    raise ValueError("it has no window")
  return _alone(config)


def _mistral(config: ModelConfig) -> Table:
  return {**_alone(config), "sliding_window": config.sliding_window}


def _slides(config: ModelConfig) -> tuple[list[bool], LayerKind | None, LayerKind]:
  """For each layer whether it has a window; and a layer with one (or None) and a layer without."""
  kinds = [config.kind(layer) for layer in range(config.num_layers)]
  slides = [kind.sliding_window is not None for kind in kinds]
  local = next((kind for kind in kinds if kind.sliding_window is not None), None)
  whole = next((kind for kind in kinds if kind.sliding_window is None), None)
  if whole is None:
    whole = dataclasses.replace(kinds[0], sliding_window=None)
  return slides, local, whole


def _qwen(config: ModelConfig) -> Table:
  slides, local, whole = _slides(config)
  if local is not None and dataclasses.replace(local, sliding_window=None) != whole:
    raise ValueError("its layers differ in their window alone")
  rope = _rope(config, whole)
  table: Table = {"rope_parameters": rope, "rope_theta": rope["rope_theta"]}
  if rope["rope_type"] != "default":
    table["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
  return table | {
    "use_sliding_window": local is not None,
    "sliding_window": None if local is None else local.sliding_window,
    "max_window_layers": slides.index(True) if local is not None else config.num_layers,
    "layer_types": [_TYPES[s] for s in slides],
  }


def _gemma3(config: ModelConfig) -> Table:
  slides, local, whole = _slides(config)
  table = _gemma(config, slides, local, whole)
  scale = config.attention_scale
  scalar = config.head_dim if scale is None else scale**-2
  table["query_pre_attn_scalar"] = round(scalar) if abs(scalar - round(scalar)) < 1e-3 else scalar
  table["rope_theta"] = table["rope_parameters"]["full_attention"]["rope_theta"]
  table["rope_local_base_freq"] = table["rope_parameters"]["sliding_attention"]["rope_theta"]
  return table


def _gemma(
  config: ModelConfig, slides: list[bool], local: LayerKind | None, whole: LayerKind
) -> Table:
  return {
    "layer_types": [_TYPES[s] for s in slides],
    "sliding_window": 4096 if local is None else local.sliding_window,
    "rope_parameters": {
      "full_attention": _rope(config, whole),
      "sliding_attention": _rope(config, whole if local is None else local),
    },
  }


def _gemma4(config: ModelConfig) -> Table:
  slides, local, whole = _slides(config)
  shared = whole.shared_kv
  return {
    **_gemma(config, slides, local, whole),
    "global_head_dim": whole.head_dim or config.head_dim,
    "num_global_key_value_heads": (whole.num_kv_heads or config.num_kv_heads) if shared else None,
    "attention_k_eq_v": shared,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "enable_moe_block": False,
    "use_double_wide_mlp": False,
  }


def _lfm2(config: ModelConfig) -> Table:
  kinds = [config.kind(layer) for layer in range(config.num_layers)]
  whole = next((kind for kind in kinds if kind.mixer == "attention"), LayerKind())
  rope = _rope(config, whole)
  return {
    "intermediate_size": config.ffn_dim,
    "block_auto_adjust_ff_dim": False,
    "conv_L_cache": config.conv_width or 3,
    "conv_bias": False,
    "layer_types": ["conv" if kind.mixer == "convolution" else "full_attention" for kind in kinds],
    "rope_theta": rope["rope_theta"],
    "rope_parameters": rope,
    "tie_embedding": config.tied_embedding,
  }


def _mixtral(config: ModelConfig) -> Table:
  return {**_mistral(config), "router_jitter_noise": 0.0}


def _qwen3_moe(config: ModelConfig) -> Table:
  return {
    **_alone(config),
    "use_sliding_window": config.sliding_window is not None,
    "sliding_window": config.sliding_window,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    # Of layers without experts: there are none.
    "intermediate_size": config.ffn_dim,
    "num_experts": config.num_experts,
  }


_WRITERS: Mapping[str, Callable[[ModelConfig], Table]] = {
  "llama": _windowless,
  "mistral": _mistral,
  "qwen2": _qwen,
  "qwen3": _qwen,
  "gemma3_text": _gemma3,
  "gemma4_text": _gemma4,
  "lfm2": _lfm2,
  "bitnet": _windowless,
  "mixtral": _mixtral,
  "qwen3_moe": _qwen3_moe,
}
