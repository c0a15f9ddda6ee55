"""A small random model file with a vocabulary and a chat template, runnable from end to end."""

import dataclasses
from pathlib import Path

import gguf
import jax
import numpy as np
from flax import nnx

from neurojax.config import ModelConfig
from neurojax.model.neurollm import NeuroLLM
from tests.files import tiny

VOCAB = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghij"]
CONFIG = ModelConfig(
  vocab_size=len(VOCAB),
  model_dim=32,
  num_layers=6,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  ffn_dim=48,
  context_length=512,
  rope_style="interleaved",
  norm_eps=2.0**-17,
)
TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
  "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write(
  path: Path, *, seed: int = 0, config: ModelConfig = CONFIG, blow_up: int | None = None
) -> Path:
  """blow_up: this layer's down projection is so large that its activations overflow float32."""
  values = tiny.parameters(config, seed)
  scaled = {name: value * np.float32(0.2) for name, value in values.items()}
  if blow_up is not None:
    scaled[f"down_FD/{blow_up}"] = np.full_like(scaled[f"down_FD/{blow_up}"], 3e38)
    scaled[f"up_DF/{blow_up}"] *= np.float32(1e10)
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_name("tiny")
  for add, value in (
    (writer.add_embedding_length, config.model_dim),
    (writer.add_block_count, config.num_layers),
    (writer.add_head_count, config.num_heads),
    (writer.add_head_count_kv, config.num_kv_heads),
    (writer.add_feed_forward_length, config.ffn_dim),
    (writer.add_context_length, config.context_length),
    (writer.add_rope_freq_base, config.rope_base),
    (writer.add_layer_norm_rms_eps, config.norm_eps),
    (writer.add_rope_dimension_count, config.head_dim),
    (writer.add_vocab_size, config.vocab_size),
  ):
    add(value)
  writer.add_tokenizer_model("llama")
  writer.add_token_list(VOCAB)
  writer.add_token_scores([0.0] * len(VOCAB))
  writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(VOCAB) - 259)])
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  writer.add_unk_token_id(0)
  writer.add_chat_template(TEMPLATE)
  for name, value in scaled.items():
    writer.add_tensor(tiny.file_name(name), tiny.as_stored(value, name))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def with_layers(num_layers: int) -> ModelConfig:
  return dataclasses.replace(CONFIG, num_layers=num_layers)


def parameter_bytes(model: NeuroLLM) -> int:
  """Bytes of the parameters of a model or a part of one, scales included."""
  return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
