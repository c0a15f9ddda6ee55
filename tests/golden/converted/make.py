"""GGUF files that llama.cpp's converter makes of tiny models of transformers, and transformers' logits.

  python make.py LLAMA_CPP

where LLAMA_CPP is a checkout of llama.cpp, in an environment with torch, transformers and what
convert_hf_to_gguf.py needs. Weights are random bfloat16 numbers, so both files hold them exactly; the
converter's vocabulary step is left out. Made with transformers 5.24.0, torch 2.14.1 and the llama.cpp
that llama-cpp-python 0.3.36 carries. BitNet is not among them: llama.cpp's computes SiLU, and
transformers' squared ReLU.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
TOKENS = [(7 * i * i + 3 * i + 5) % 32 for i in range(40)]
COMMON = {
  "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
  "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
  "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
ORIGINAL = {"original_max_position_embeddings": 16}
MODELS = {
  "llama": ("Llama", {
    "tie_word_embeddings": False, "head_dim": 8,
    "rope_parameters": {
      "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
      "high_freq_factor": 4.0, **ORIGINAL,
    },
  }),
  "mistral": ("Mistral", {"head_dim": 16, "sliding_window": None}),
  "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
  "qwen3": ("Qwen3", {
    "head_dim": 16,
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, **ORIGINAL},
  }),
  "gemma3": ("Gemma3Text", {
    "num_hidden_layers": 6, "head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 16,
    "rope_parameters": {
      "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
      "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
  }),
  "gemma4": ("Gemma4Text", {
    "num_hidden_layers": 3, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16,
    "num_global_key_value_heads": 1, "attention_k_eq_v": True, "sliding_window": 7,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 32,
    "final_logit_softcapping": 30.0,
  }),
  "lfm2": ("Lfm2", {
    "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"],
    "block_auto_adjust_ff_dim": True, "block_multiple_of": 8, "intermediate_size": 30,
  }),
  "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
  "qwen3_moe": ("Qwen3Moe", {
    "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "norm_topk_prob": True,
  }),
}  # fmt: skip


def model_of(family: str, more: dict) -> torch.nn.Module:
  config = getattr(transformers, f"{family}Config")(**(COMMON | more))
  model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      noise = torch.randn_like(parameter)
      around = parameter + noise / 8 if parameter.ndim == 1 else noise / 4
      parameter.copy_(around.bfloat16().float())
    for name, buffer in model.named_buffers():
      if name.endswith("layer_scalar"):
        buffer.fill_(0.75)
  return model


def main(llama_cpp: Path) -> None:
  sys.path[:0] = [str(llama_cpp / "gguf-py"), str(llama_cpp)]
  import gguf
  from conversion import get_model_class

  torch.manual_seed(20)
  logits = {}
  for name, (family, more) in MODELS.items():
    model = model_of(family, more)
    with torch.no_grad():
      logits[name] = model(torch.tensor([TOKENS])).logits[0].float().numpy()
    with tempfile.TemporaryDirectory() as temporary:
      # The converter takes the model's name from its folder.
      folder = Path(temporary) / f"tiny-{name}"
      model.save_pretrained(folder)
      # Gemma's step counts its tokens.
      vocabulary = {"model": {"vocab": {str(i): i for i in range(32)}}, "added_tokens": []}
      (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
      known = get_model_class(json.loads((folder / "config.json").read_text())["architectures"][0])
      without = type(
        known.__name__,
        (known,),
        {
          "set_vocab": lambda self: self.gguf_writer.add_tokenizer_model("none"),
          "model_arch": known.model_arch,
        },
      )
      without(folder, gguf.LlamaFileType.MOSTLY_BF16, HERE / f"{name}.gguf").write()
  np.savez_compressed(HERE / "logits.npz", tokens=np.array(TOKENS), **logits)


if __name__ == "__main__":
  main(Path(sys.argv[1]))
