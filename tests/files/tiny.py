"""Tiny model files: real ones by the gguf package, and hostile ones byte by byte."""

import dataclasses
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from neurojax.config import ModelConfig
from neurojax.files import names

CONFIG = ModelConfig(
  vocab_size=24, model_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48,
  context_length=64, rope_base=20_000.0, rope_style="interleaved", norm_eps=2.0**-17,
)  # fmt: skip
# Every row a multiple of 256, the largest block.
WIDE = ModelConfig(
  vocab_size=8, model_dim=256, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=64, ffn_dim=256,
  rope_style="interleaved", norm_eps=2.0**-17,
)  # fmt: skip


QWEN = dataclasses.replace(CONFIG, rope_style="half", qk_norm=True)
BITNET = dataclasses.replace(CONFIG, rope_style="half", sub_norm=True)


def per_layer(config: ModelConfig, layer: int = 0) -> list[str]:
  """The canonical names that a layer of this configuration has."""
  return names.layer_names(config, layer)


def parameters(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
  """Random float32 arrays under "name" or "name/layer", axes as the canonical name spells them."""
  generator = np.random.default_rng(seed)
  wanted = [
    (name, None) for name in names.WHOLE_MODEL if name != "head_DV" or not config.tied_embedding
  ]
  wanted += [(n, layer) for layer in range(config.num_layers) for n in per_layer(config, layer)]
  values = {}
  for name, layer in wanted:
    sizes = config.sizes(layer)
    shape = [sizes[letter] for letter in name.rpartition("_")[2]]
    key = name if layer is None else f"{name}/{layer}"
    values[key] = generator.standard_normal(shape, np.float32)
  return values


def as_stored(values: np.ndarray, name: str) -> np.ndarray:
  """Canonical values as a GGUF file keeps them, written down by hand per name."""
  match name.split("/")[0]:
    case "embedding_VD" | "final_norm_D" | "attn_norm_D" | "ffn_norm_D" | "q_norm_H" | "k_norm_H":
      return values
    case "attn_post_norm_D" | "ffn_post_norm_D" | "layer_scale_1":
      return values
    case "attn_sub_norm_NH" | "ffn_sub_norm_F" | "q_bias_NH" | "k_bias_KH" | "v_bias_KH":
      return values.reshape(-1)
    case "head_DV" | "gate_DF" | "up_DF" | "down_FD" | "router_DE":
      return values.T.copy()
    case "conv_in_DC" | "conv_out_MD" | "conv_kernel_WM":
      return values.T.copy()
    case "gate_EDF" | "up_EDF" | "down_EFD":
      return np.stack([expert.T for expert in values])
    case "q_DNH" | "k_DKH" | "v_DKH":
      # Row n*H + h of the file gives element h of head n.
      _, heads, width = values.shape
      return np.stack([values[:, n, h] for n in range(heads) for h in range(width)])
    case "o_NHD":
      heads, width, _ = values.shape
      return np.stack([values[n, h] for n in range(heads) for h in range(width)], axis=1)
  raise AssertionError(name)


FILE_NAMES = {
  "embedding_VD": "token_embd", "final_norm_D": "output_norm", "head_DV": "output",
  "attn_norm_D": "attn_norm", "q_DNH": "attn_q", "k_DKH": "attn_k", "v_DKH": "attn_v",
  "q_norm_H": "attn_q_norm", "k_norm_H": "attn_k_norm", "o_NHD": "attn_output",
  "attn_sub_norm_NH": "attn_sub_norm", "ffn_norm_D": "ffn_norm", "gate_DF": "ffn_gate",
  "up_DF": "ffn_up", "ffn_sub_norm_F": "ffn_sub_norm", "down_FD": "ffn_down",
  "attn_post_norm_D": "post_attention_norm", "ffn_post_norm_D": "post_ffw_norm",
  "layer_scale_1": "layer_output_scale", "router_DE": "ffn_gate_inp",
  "gate_EDF": "ffn_gate_exps", "up_EDF": "ffn_up_exps", "down_EFD": "ffn_down_exps",
  "conv_in_DC": "shortconv.in_proj", "conv_kernel_WM": "shortconv.conv",
  "conv_out_MD": "shortconv.out_proj",
}  # fmt: skip
BIASES = {"q_bias_NH": "attn_q", "k_bias_KH": "attn_k", "v_bias_KH": "attn_v"}


def file_name(name: str) -> str:
  canonical, _, layer = name.partition("/")
  place = f"blk.{layer}." if layer else ""
  if canonical in BIASES:
    return place + BIASES[canonical] + ".bias"
  return place + FILE_NAMES[canonical] + ".weight"


def write_gguf(
  path: Path,
  config: ModelConfig,
  values: Mapping[str, np.ndarray],
  *,
  kind: GGMLQuantizationType = GGMLQuantizationType.F32,
  raw: Mapping[str, tuple[np.ndarray, GGMLQuantizationType]] | None = None,
) -> Path:
  """A llama, qwen3 or bitnet model by the gguf package. `kind` holds for matrices; `raw` replaces
  tensors by encoded bytes."""
  family = "qwen3" if config.qk_norm else "bitnet" if config.sub_norm else "llama"
  writer = gguf.GGUFWriter(path, family)
  writer.add_name("tiny")
  writer.add_embedding_length(config.model_dim)
  writer.add_block_count(config.num_layers)
  writer.add_head_count(config.num_heads)
  writer.add_head_count_kv(config.num_kv_heads)
  writer.add_feed_forward_length(config.ffn_dim)
  writer.add_context_length(config.context_length)
  writer.add_rope_freq_base(config.rope_base)
  writer.add_layer_norm_rms_eps(config.norm_eps)
  writer.add_rope_dimension_count(config.head_dim)
  writer.add_key_length(config.head_dim)
  writer.add_vocab_size(config.vocab_size)
  if config.num_experts:
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.experts_per_token)
  for name, value in values.items():
    stored = as_stored(value, name)
    if raw and name in raw:
      data, raw_kind = raw[name]
      writer.add_tensor(file_name(name), data, raw_dtype=raw_kind)
    elif stored.ndim == 2 and kind != GGMLQuantizationType.F32:
      writer.add_tensor(file_name(name), gguf.quantize(stored, kind), raw_dtype=kind)
    else:
      writer.add_tensor(file_name(name), stored)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def text(value: str | bytes) -> bytes:
  raw = value.encode() if isinstance(value, str) else value
  return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
  return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, value: bytes = b"") -> bytes:
  return struct.pack("<IQ", kind, count) + value


def tensor(name: str | bytes, shape: Sequence[int], kind: int, offset: int) -> bytes:
  """A tensor's entry; `shape` is row-major here and reversed in the file."""
  dims = struct.pack(f"<{len(shape)}Q", *reversed(shape))
  return text(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, offset)


def header(
  keys: Sequence[bytes] = (),
  tensors: Sequence[bytes] = (),
  *,
  version: bytes = struct.pack("<I", 3),
  num_keys: int | None = None,
  num_tensors: int | None = None,
) -> bytes:
  return b"".join([
    b"GGUF",
    version,
    struct.pack("<Q", len(tensors) if num_tensors is None else num_tensors),
    struct.pack("<Q", len(keys) if num_keys is None else num_keys),
    *keys,
    *tensors,
  ])  # fmt: skip


def with_data(head: bytes, nbytes: int, alignment: int = 32) -> bytes:
  return head + bytes(-len(head) % alignment) + bytes(nbytes)
