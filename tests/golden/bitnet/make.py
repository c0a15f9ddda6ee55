"""Folders whose linear modules are transformers' BitNet ones, and the logits that these compute.

  TORCHDYNAMO_DISABLE=1 python make.py

with transformers 5.24.0 and torch 2.14.1: BitLinear (weights packed, scales that divide: as Falcon3 and
Llama 3 in 1.58 bits), AutoBitLinear offline (packed, scales that multiply: as BitNet b1.58 2B4T) and
online (numbers, rounded in each forward pass). Activations are rounded to 8 bits.
"""

import json
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers.integrations.bitnet import (
  pack_weights,
  replace_with_bitnet_linear,
  unpack_weights,
)
from transformers.utils.quantization_config import BitNetQuantConfig

HERE = Path(__file__).parent
TOKENS = [(7 * i * i + 3 * i + 5) % 32 for i in range(24)]
COMMON = {
  "vocab_size": 32, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
  "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FOLDERS = {
  "bitlinear": ("Llama", 2, {"linear_class": "bitlinear"}),
  "offline": ("BitNet", 2, {"linear_class": "autobitlinear", "quantization_mode": "offline"}),
  "online": ("BitNet", 1, {"linear_class": "autobitlinear", "quantization_mode": "online"}),
}


def make(name: str) -> np.ndarray:
  """Write a folder. Returns: logits of TOKENS."""
  family, layers, words = FOLDERS[name]
  tied = family == "BitNet"
  config = getattr(transformers, f"{family}Config")(
    **COMMON, num_hidden_layers=layers, tie_word_embeddings=tied
  )
  model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      noise = torch.randn_like(parameter)
      around = parameter + noise / 8 if parameter.ndim == 1 else noise / 4
      parameter.copy_(around.bfloat16().float())
  linear = {
    key: module.weight.detach().clone()
    for key, module in model.named_modules()
    if isinstance(module, torch.nn.Linear) and key != "lm_head"
  }
  replace_with_bitnet_linear(model, ["lm_head"], BitNetQuantConfig(**words))
  tensors = {}
  for key, weight in linear.items():
    module = model.get_submodule(key)
    if name == "online":
      module.weight = torch.nn.Parameter(weight)
      tensors[f"{key}.weight"] = weight.bfloat16()
      continue
    mean = weight.abs().mean().reshape(1)
    packed = pack_weights((weight / mean).round().clamp(-1, 1))
    module.weight_scale = mean if name == "offline" else 1 / mean
    module.weight = (
      torch.nn.Parameter(unpack_weights(packed, torch.float32)) if name == "offline" else packed
    )
    tensors |= {f"{key}.weight": packed, f"{key}.weight_scale": module.weight_scale.contiguous()}
  for key, parameter in model.named_parameters():
    if key.removesuffix(".weight") not in linear and not (tied and key == "lm_head.weight"):
      tensors[key] = parameter.detach().bfloat16().contiguous()
  with torch.no_grad():
    logits = model(torch.tensor([TOKENS])).logits[0].float().numpy()
  (HERE / name).mkdir(exist_ok=True)
  save_file(tensors, HERE / name / "model.safetensors", {"format": "pt"})
  table = json.loads(model.config.to_json_string(use_diff=False))
  table = {key: value for key, value in table.items() if key not in ("id2label", "label2id")}
  table |= {
    "architectures": [f"{family}ForCausalLM"],
    "quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": None, **words},
  }
  (HERE / name / "config.json").write_text(json.dumps(table, indent=1) + "\n")
  return logits


if __name__ == "__main__":
  warnings.simplefilter("ignore")
  torch.manual_seed(21)
  np.savez_compressed(
    HERE / "logits.npz", tokens=np.array(TOKENS), **{name: make(name) for name in FOLDERS}
  )
