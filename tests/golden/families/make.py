"""Make the goldens beside this file: logits of tiny random models, by transformers on a CPU.

    pip install torch transformers safetensors numpy
    python tests/golden/families/make.py [NAME ...]

For each family NAME.json holds config.json as transformers writes it, with the names and shapes of the
tensors that it saves, and NAME.npy the float32 logits after each of the tokens. Weights and tokens
follow from `recipe.py`, and are kept nowhere. The models are so small that a sliding window, the length
before rotary scaling and all kinds of layers are passed within 112 positions.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import recipe  # beside this file, which runs as a script
import torch
import transformers
from safetensors import safe_open

COMMON = {
  "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
  "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
  "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
LOCAL, WHOLE = "sliding_attention", "full_attention"

FAMILIES = {
  "tinyllama": ("LlamaForCausalLM", {"rope_parameters": PLAIN, "tie_word_embeddings": False}),
  "llama31": (
    "LlamaForCausalLM",
    {
      "head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": False,
      "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
      },
    },
  ),
  "mistral": (
    "MistralForCausalLM",
    {
      "head_dim": 12, "sliding_window": 11, "tie_word_embeddings": False,
      "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
  ),
  "qwen2": ("Qwen2ForCausalLM", {"rope_parameters": PLAIN, "tie_word_embeddings": True}),
  "qwen3": (
    "Qwen3ForCausalLM",
    {
      "head_dim": 16, "tie_word_embeddings": True,
      "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1_000_000.0, "factor": 4.0,
        "original_max_position_embeddings": 32,
      },
    },
  ),
  "gemma3": (
    "Gemma3ForCausalLM",
    {
      "head_dim": 16, "num_hidden_layers": 4, "layer_types": [LOCAL, LOCAL, WHOLE, LOCAL],
      "sliding_window": 9, "query_pre_attn_scalar": 24, "final_logit_softcapping": 4.0,
      "attn_logit_softcapping": 5.0, "pad_token_id": 0,
      "rope_parameters": {
        LOCAL: PLAIN,
        WHOLE: {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
      },
    },
  ),
  "gemma4": (
    "Gemma4ForCausalLM",
    {
      "head_dim": 8, "num_hidden_layers": 6, "layer_types": [LOCAL, LOCAL, WHOLE] * 2,
      "sliding_window": 9, "final_logit_softcapping": 4.0, "pad_token_id": 0,
      "global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
      "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 96,
      "rope_parameters": {
        LOCAL: PLAIN,
        WHOLE: {
          "rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25,
        },
      },
    },
  ),
  "lfm2": (
    "Lfm2ForCausalLM",
    {
      "num_hidden_layers": 5, "layer_types": ["conv", "conv", WHOLE, "conv", WHOLE],
      "conv_L_cache": 3, "block_auto_adjust_ff_dim": False, "norm_eps": 1e-5, "rms_norm_eps": None,
      "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
  ),
  "bitnet": (
    "BitNetForCausalLM",
    {"hidden_act": "relu2", "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
  ),
  "mixtral": (
    "MixtralForCausalLM",
    {
      "num_local_experts": 4, "num_experts_per_tok": 2,
      "rope_parameters": PLAIN, "tie_word_embeddings": False,
    },
  ),
  "qwen3_moe": (
    "Qwen3MoeForCausalLM",
    {
      "head_dim": 16, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
      "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
      "rope_parameters": PLAIN, "tie_word_embeddings": False,
    },
  ),
}  # fmt: skip


def make(name: str) -> None:
  """Write NAME.json and NAME.npy."""
  torch.manual_seed(0)
  class_name, changes = FAMILIES[name]
  model_class = getattr(transformers, class_name)
  words = {key: value for key, value in (COMMON | changes).items() if value is not None}
  model = model_class(model_class.config_class(**words))
  with tempfile.TemporaryDirectory() as place:
    saved = Path(place) / "saved"
    model.to(torch.float32).save_pretrained(saved)
    with safe_open(saved / "model.safetensors", "np") as file:
      shapes = {key: file.get_slice(key).get_shape() for key in sorted(file.keys())}
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    kept = {"config": config, "tensors": shapes}
    (recipe.HERE / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    folder = recipe.write_folder(Path(place) / "made", name)
    model = model_class.from_pretrained(
      folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
      ids = torch.from_numpy(recipe.tokens(config["vocab_size"]).astype(np.int64))[None]
      logits = model(ids, use_cache=False).logits[0].float().numpy()
  assert np.isfinite(logits).all()
  np.save(recipe.HERE / f"{name}.npy", logits.astype(np.float32))
  print(
    f"{name}: logits {logits.shape}, std {logits.std():.2f}, transformers {transformers.__version__}"
  )


if __name__ == "__main__":
  for each in sys.argv[1:] or FAMILIES:
    make(each)
