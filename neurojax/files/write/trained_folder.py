"""Writing a model as a folder in the layout of Hugging Face's transformers, as plain numbers."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from neurojax.config import ModelConfig
from neurojax.files import names
from neurojax.files.names import Stored
from neurojax.files.tensor_info import TensorInfo
from neurojax.files.write.safetensors import DTYPES, Dtype, write_safetensors
from neurojax.files.write.trained_weights import Weights, stored
from neurojax.tokenizer.tokenizer_spec import TokenizerSpec
from neurojax.tokenizer.write.gguf import padded
from neurojax.tokenizer.write.tokenizer_json import json_from_spec
from neurojax.weights.codecs import dequantize
from neurojax.weights.ternary import TernaryArray

FILES = (
  "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
  "tokenizer_config.json",
)  # fmt: skip
"""What such a folder holds."""

# Source: transformers, modeling_llama.py, modeling_qwen3.py, modeling_bitnet.py. All of them pair
# element i of a head with element i + H/2.
_LAYER = "model.layers.{layer}."
_TENSORS: Mapping[str, Stored] = {
  "embedding_VD": Stored("model.embed_tokens.weight", "V D"),
  "final_norm_D": Stored("model.norm.weight", "D"),
  "head_DV": Stored("lm_head.weight", "V D"),
  "attn_norm_D": Stored(_LAYER + "input_layernorm.weight", "D"),
  "q_DNH": Stored(_LAYER + "self_attn.q_proj.weight", "NH D"),
  "k_DKH": Stored(_LAYER + "self_attn.k_proj.weight", "KH D"),
  "v_DKH": Stored(_LAYER + "self_attn.v_proj.weight", "KH D"),
  "q_norm_H": Stored(_LAYER + "self_attn.q_norm.weight", "H"),
  "k_norm_H": Stored(_LAYER + "self_attn.k_norm.weight", "H"),
  "attn_sub_norm_NH": Stored(_LAYER + "self_attn.attn_sub_norm.weight", "NH"),
  "o_NHD": Stored(_LAYER + "self_attn.o_proj.weight", "D NH"),
  "ffn_norm_D": Stored(_LAYER + "post_attention_layernorm.weight", "D"),
  "gate_DF": Stored(_LAYER + "mlp.gate_proj.weight", "F D"),
  "up_DF": Stored(_LAYER + "mlp.up_proj.weight", "F D"),
  "ffn_sub_norm_F": Stored(_LAYER + "mlp.ffn_sub_norm.weight", "F"),
  "down_FD": Stored(_LAYER + "mlp.down_proj.weight", "D F"),
}


def write_huggingface(
  folder: str | Path,
  weights: Weights,
  tokenizer: TokenizerSpec | None,
  *,
  dtype: Dtype | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> Dtype:
  """Write config.json, model.safetensors, generation_config.json and the tokenizer's two files.

  Ternary matrices become the numbers that they stand for: a float16 scale is exact in float32, and
  seldom in bfloat16. The folder appears whole or not at all.

  Args:
    folder: Absent, or empty.
    dtype: Of all tensors; None: bfloat16 where that changes no value, else float32.
    progress: Called with the tensors written so far and their number.
  Returns: The dtype.
  Raises:
    ValueError: the folder has something in it, a weight is not exact in the dtype or damaged, or
      transformers has no architecture with these parts.
    NotImplementedError: the tokenizer cannot be written in this format.
  """
  folder = Path(folder)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ValueError(f"{folder} exists and is no empty folder: name another")
  if not folder.parent.is_dir():
    raise FileNotFoundError(f"{folder.parent}: no such folder: make it first")
  kind, model_type = architecture(weights.config)
  texts = {}
  if tokenizer is not None:
    texts["tokenizer.json"] = json_from_spec(padded(tokenizer, weights.config.vocab_size)) + "\n"
    texts["tokenizer_config.json"] = _pretty(tokenizer_config(tokenizer, weights.config))
  if dtype is None:
    exact = all(inexact is None for inexact in _inexact(weights, "bfloat16"))
    dtype = "bfloat16" if exact else "float32"
  elif found := next((where for where in _inexact(weights, dtype) if where), None):
    raise ValueError(f"{found} is not exact in {dtype}: choose float32")
  special = special_ids(tokenizer)
  texts["generation_config.json"] = _pretty(special)
  table = {
    "architectures": [kind], "model_type": model_type, **_config(weights.config, dtype), **special,
  }  # fmt: skip
  texts["config.json"] = _pretty(table)
  places = list(weights.places())
  stored_places = [names.locate(_TENSORS, n, layer, weights.config) for n, layer in places]
  shapes = {p.name: names.file_shape(p.axes, weights.config) for p in stored_places}
  _check_words(table, shapes, weights.config)

  temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
  temporary.mkdir()
  try:
    for name, text in texts.items():
      (temporary / name).write_text(text, encoding="utf-8")

    def values() -> Iterator[np.ndarray]:
      for done, (name, layer) in enumerate(places):
        yield _numbers(weights, name, layer).astype(DTYPES[dtype])
        if progress:
          progress(done + 1, len(places))

    write_safetensors(temporary / "model.safetensors", shapes, values(), dtype, {"format": "pt"})
    os.replace(temporary, folder)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  return dtype


def architecture(config: ModelConfig) -> tuple[str, str]:
  """The class of transformers that computes such a model, and its model_type.

  Raises: ValueError: there is none; it names the parts that do not go together.
  """
  if config.sub_norm and config.qk_norm:
    raise ValueError("sub_norm and qk_norm: no architecture of transformers has both: take one")
  if config.sub_norm and config.num_heads * config.head_dim != config.model_dim:
    raise ValueError(
      f"num_heads * head_dim = {config.num_heads * config.head_dim}, model_dim ="
      f" {config.model_dim}: transformers' BitNet wants them equal: train with head_dim = model_dim"
      " / num_heads"
    )
  if config.sub_norm:
    return "BitNetForCausalLM", "bitnet"
  return ("Qwen3ForCausalLM", "qwen3") if config.qk_norm else ("LlamaForCausalLM", "llama")


def _check_words(
  table: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], config: ModelConfig
) -> None:
  """What is written is what will be read. Raises: ValueError: config.json says less than there is."""
  infos = {name: TensorInfo(name, "F32", shape, 0, 0) for name, shape in shapes.items()}
  found = names.interpret_huggingface(table, infos).model_config("config.json")
  wanted = dataclasses.replace(config, rope_style="half")
  fields = [field.name for field in dataclasses.fields(wanted)]
  if other := [name for name in fields if getattr(found, name) != getattr(wanted, name)]:
    raise ValueError(
      f"{other[0]} = {getattr(config, other[0])!r}: {table['architectures'][0]} of transformers is"
      f" written with {getattr(found, other[0])!r}"
    )


def _pretty(table: Mapping[str, Any]) -> str:
  return json.dumps(table, indent=2) + "\n"


def _numbers(weights: Weights, name: str, layer: int | None) -> np.ndarray:
  """One tensor as this layout has it: float32."""
  host, axes = weights.read(name, layer, "half"), _TENSORS[name].axes
  if isinstance(host, TernaryArray):
    # Rows of codes are rows of the file: output channels, or entries of the vocabulary.
    values = dequantize(host.codes, host.scales, host.group_size)[:, : host.contraction.k]
    return values.reshape(names.file_shape(axes, weights.config))
  return stored(host.astype(np.float32), name, axes, weights.config)


def _inexact(weights: Weights, dtype: Dtype) -> Iterator[str | None]:
  """For every tensor: its place if the dtype would change it, else None."""
  for name, layer in weights.places():
    host = weights.read(name, layer)
    values = host.scales if isinstance(host, TernaryArray) else host
    values = values.astype(np.float32)
    changed = (values.astype(DTYPES[dtype]).astype(np.float32) != values).any()
    yield (name if layer is None else f"{name} of layer {layer}") if changed else None


def _config(config: ModelConfig, dtype: Dtype) -> dict[str, Any]:
  return {
    "vocab_size": config.vocab_size,
    "hidden_size": config.model_dim,
    "intermediate_size": config.ffn_dim,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "hidden_act": "silu",
    "max_position_embeddings": config.context_length,
    "rms_norm_eps": config.norm_eps,
    # The second spelling is that of transformers 5.
    "rope_theta": config.rope_base,
    "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
    "tie_word_embeddings": config.tied_embedding,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": dtype,
    "dtype": dtype,
  }


def special_ids(tokenizer: TokenizerSpec | None) -> dict[str, Any]:
  """The ids of special tokens; without a tokenizer, explicit nulls keep a class's own away."""
  ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
  if tokenizer is not None:
    stops = sorted(tokenizer.stop_ids)
    ids["bos_token_id"] = tokenizer.bos_id
    ids["eos_token_id"] = stops if len(stops) > 1 else tokenizer.eos_id
  return ids


def tokenizer_config(spec: TokenizerSpec, config: ModelConfig) -> dict[str, Any]:
  def spelled(token_id: int | None) -> str | None:
    return None if token_id is None else spec.tokens[token_id]

  table = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": spelled(spec.bos_id),
    "eos_token": spelled(spec.eos_id),
    "unk_token": spelled(spec.unknown_id),
    "model_max_length": config.context_length,
    "clean_up_tokenization_spaces": False,
    "chat_template": spec.chat_template,
  }
  return {key: value for key, value in table.items() if value is not None}
