"""Maps transformers' names for tensors and numbers of each model_type, and refuses by name.

Sources: transformers, models/*/configuration_*.py (keys and what they are when absent),
modeling_*.py (names of tensors, what a key does) and modeling_rope_utils.py.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from neurojax.config import ModelConfig
from neurojax.files.names.architecture import (
  Demand,
  Fault,
  Interpretation,
  Stored,
  of_config,
  short,
  tensor_demands,
  tensor_faults,
)
from neurojax.files.names.folder_families import FAMILIES, TEXT_OF, Family
from neurojax.files.names.folder_words import Words
from neurojax.files.tensor_info import TensorInfo

# Where the text model's tensors are: in a causal model, and in one with other towers beside it.
_PREFIXES = (
  ("model.", "lm_head."),
  ("model.language_model.", "lm_head."),
  ("language_model.model.", "language_model.lm_head."),
)
# Towers beside the text model, and what is left of them in a sentence.
_TOWERS = (
  ("vision_tower.", "vision tower"),
  ("vision_model.", "vision tower"),
  ("embed_vision.", "vision tower"),
  ("multi_modal_projector.", "vision tower"),
  ("audio_tower.", "audio tower"),
  ("embed_audio.", "audio tower"),
)
ACTIVATIONS = "neurojax_activations"
"""The key of config.json that says what the model was trained to round activations to: "int8"."""

# Buffers that old files carry, and transformers computes anew.
_BUFFERS = (".rotary_emb.inv_freq", ".masked_bias")

# Keys of every model_type: None, any value; else those under which it changes no logits.
_COMMON: Mapping[str, tuple[object, ...] | None] = {
  **dict.fromkeys((
    "model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "auto_map",
    "_name_or_path", "_commit_hash", "name_or_path", "use_cache", "initializer_range",
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id",
    "eos_token", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop",
    "attn_implementation", "_attn_implementation", "_attn_implementation_autoset",
    "_attn_implementation_internal", "pretraining_tp", "tie_word_embeddings", "output_attentions",
    "output_hidden_states", "return_dict", "torchscript", "use_bfloat16", "id2label", "label2id",
    "problem_type", "task_specific_params", "finetuning_task", "is_decoder", "tokenizer_class",
    "decoder_start_token_id", "prefix", "max_length", "min_length", "do_sample", "early_stopping",
    "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p",
    "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens", "unsloth_version", "unsloth_fixed", "quantization_config",
    "vocab_size", "rope_theta", "rope_scaling", "rope_parameters", "router_aux_loss_coef",
    "output_router_logits", "router_jitter_noise", "original_max_position_embeddings",
    "is_llama_config", "is_bitnet_config", "transformers.js_config", "model_name", "license",
  )),
  "chunk_size_feed_forward": (0,),
  "is_encoder_decoder": (False,),
  ACTIVATIONS: ("int8",),
  "partial_rotary_factor": (1,),
  "rope_interleaved": (False,),
}  # fmt: skip

_ACTIVATIONS: Mapping[str, str] = {
  "silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
  "relu2": "relu2",
}  # fmt: skip

# Why a tensor has no canonical name, by what its name contains; the first match counts.
_UNMAPPED: tuple[tuple[str, str], ...] = (
  ("lora_", "a LoRA adapter: merge it first"),
  ("per_layer_", "embeddings of each layer"),
  (".bias", "biases"),
  ("shared_expert", "experts that every token passes"),
  ("experts", "a mixture of experts"),
  ("_norm", "a further normalisation"),
  ("layernorm", "a further normalisation"),
)


def interpret(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Interpretation:
  """Map a folder's config.json and its tensors to a ModelConfig and canonical names. Never raises:
  see the lists of the result.

  Args:
    tensors: By name, a weight that is kept in several tensors as the one that it is of.
  """
  model_type = config.get("model_type")
  if not isinstance(model_type, str):
    fault = f"config.json: model_type = {short(model_type)}: it must be a string"
    return Interpretation(architecture=None, config=None, tensors={}, faults=(fault,))
  family = FAMILIES.get(TEXT_OF.get(model_type, model_type))
  if family is None:
    known = sorted({*FAMILIES, *TEXT_OF})
    demand = f"model_type {short(model_type)}; the known ones are {', '.join(known)}"
    return Interpretation(architecture=model_type, config=None, tensors={}, demands=(demand,))

  demands = list(_class_demands(config))
  text = config
  if model_type in TEXT_OF:
    text = config.get("text_config")
    if not isinstance(text, dict):
      fault = f"config.json: text_config = {short(text)}: it must be a table"
      return Interpretation(architecture=model_type, config=None, tensors={}, faults=(fault,))
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    text = text if tied is None else {**text, "tie_word_embeddings": tied}
    demands += [
      f"config.json: text_config.model_type = {short(text['model_type'])}"
      for wanted in (TEXT_OF[model_type],)
      if text.get("model_type", wanted) != wanted
    ]
  demands += _key_demands(family, text)

  prefix, head = next(
    (p for p in _PREFIXES if p[0] + "embed_tokens.weight" in tensors), _PREFIXES[0]
  )
  stored = {
    name: dataclasses.replace(one, name=_placed(one.name, prefix, head))
    for name, one in family.tensors.items()
  }
  ignored, rest = _ignored(tensors, stored, prefix)
  faults: list[str] = []
  found: ModelConfig | None = None
  try:
    values = _values(family, text)
    if values["tied_embedding"]:
      # transformers takes the embedding, also where a file repeats it.
      rest.pop(stored.pop("head_DV").name, None)
    found = ModelConfig(**values)  # type: ignore[arg-type]
  except Demand as demand:
    demands.append(f"config.json: {demand}")
  except (Fault, ValueError) as error:
    faults.append(f"config.json: {error}")
  stored = of_config(stored, found)
  demands += tensor_demands(stored.values(), rest, _UNMAPPED)
  if found is not None and not faults:
    faults += tensor_faults(stored, rest, found)
  return Interpretation(
    architecture=model_type,
    config=found,
    tensors=stored,
    demands=tuple(demands),
    faults=tuple(faults),
    ignored=ignored,
    activations="int8" if config.get(ACTIVATIONS) == "int8" else None,
  )


def _class_demands(config: Mapping[str, Any]) -> Iterator[str]:
  said = config.get("architectures") or []
  for name in said if isinstance(said, list) else [said]:
    if not str(name).endswith(("ForCausalLM", "ForConditionalGeneration")):
      yield f"config.json: architectures = {short(name)}: models that give logits of text are run"


def _placed(name: str, prefix: str, head: str) -> str:
  if name.startswith("lm_head."):
    return head + name.removeprefix("lm_head.")
  return prefix + name.removeprefix("model.")


def _ignored(
  tensors: Mapping[str, TensorInfo], stored: Mapping[str, Stored], prefix: str
) -> tuple[tuple[str, ...], dict[str, TensorInfo]]:
  """Sentences about what is left aside, and the tensors without it."""
  towers: dict[str, int] = {}
  rest = {}
  for name, info in tensors.items():
    if name.endswith(_BUFFERS):
      continue
    bare = name.removeprefix("model.")
    tower = next((what for part, what in _TOWERS if bare.startswith(part)), None)
    if tower is None or (name.startswith(prefix) and prefix != "model."):
      rest[name] = info
    else:
      towers[tower] = towers.get(tower, 0) + 1
  said = tuple(f"{what}: {n} tensors, of which text needs none" for what, n in towers.items())
  return said, rest


def _key_demands(family: Family, text: Mapping[str, Any]) -> Iterator[str]:
  known = {key for keys in family.keys.values() for key in keys} | set(family.reads)
  for key, value in text.items():
    if key in known:
      continue
    if key in family.neutral or key in _COMMON:
      allowed = family.neutral.get(key, _COMMON.get(key))
      if allowed is not None and value is not None and value not in allowed:
        yield f"config.json: {key} = {short(value)}"
    elif value not in (None, False, [], {}, ""):
      yield (
        f"config.json: {key} = {short(value)}: the reader of {family.name} does not know this key:"
        " remove it if it changes nothing"
      )


def _values(family: Family, text: Mapping[str, Any]) -> dict[str, object]:
  """The fields of the ModelConfig. Raises Fault or Demand."""
  values: dict[str, Any] = {}
  for field, keys in family.keys.items():
    key = next((key for key in keys if text.get(key) is not None), keys[0])
    value = text.get(key)
    if value is None:
      if field not in family.defaults:
        raise Fault(f"it lacks {key}")
      value = family.defaults[field]
    elif isinstance(value, bool) or not isinstance(value, int | float):
      raise Fault(f"{key} = {short(value)}: expected one number")
    values[field] = value
  for field in ("norm_eps", "logit_softcap", "attention_softcap"):
    if values.get(field) is not None:
      values[field] = float(values[field])
  values["vocab_size"] = _vocab_size(family, text)
  if values.get("num_kv_heads") is None:
    values["num_kv_heads"] = values["num_heads"]
  if values.get("head_dim") is None:
    d, n = values["model_dim"], values["num_heads"]
    if n < 1 or d % n:
      raise Fault(
        f"hidden_size = {d} is no multiple of num_attention_heads = {n}, and head_dim is absent"
      )
    values["head_dim"] = d // n
  tied = text.get("tie_word_embeddings")
  values |= {
    "tied_embedding": family.tied if tied is None else bool(tied),
    "activation": _activation(family, text),
    "qk_norm": "q_norm_H" in family.tensors,
    "sub_norm": "ffn_sub_norm_F" in family.tensors,
    "post_norm": "ffn_post_norm_D" in family.tensors,
    "layer_scale": "layer_scale_1" in family.tensors,
    "qkv_bias": family.biases if family.biases is not None else bool(text.get("attention_bias")),
    "rope_style": "half",
  }
  return values | family.layers(Words(text, values))


def _vocab_size(family: Family, text: Mapping[str, Any]) -> int:
  size = text.get("vocab_size", family.vocab_size)
  if type(size) is not int:
    raise Fault(f"vocab_size = {short(size)}: expected one number")
  return size


def _activation(family: Family, text: Mapping[str, Any]) -> str:
  # Gemma's files may have a hidden_act as well, which nothing reads.
  key = "hidden_activation" if "hidden_activation" in family.reads else "hidden_act"
  said = family.activation if text.get(key) is None else text[key]
  if not isinstance(said, str) or said not in _ACTIVATIONS:
    raise Demand(f"{key} = {short(said)}; {', '.join(_ACTIVATIONS)} are computed")
  return _ACTIVATIONS[said]
