"""The Llama, Qwen3 and BitNet decoders in plain numpy, from canonical arrays: what the reader's axes must mean."""

import numpy as np

from neurojax.config import ModelConfig
from neurojax.files import names
from neurojax.files.model_file import ModelFile


class Oracle:
  def __init__(self, model: ModelFile) -> None:
    self.config = model.config
    known = model.interpretation.tensors
    self.whole = {
      name: model.read(name)
      for name in names.WHOLE_MODEL
      if name != "head_DV" or not self.config.tied_embedding
    }
    self.layers = [
      {name: model.read(name, layer) for name in names.PER_LAYER if name in known}
      for layer in range(self.config.num_layers)
    ]

  def logits_TV(self, ids_T: list[int]) -> np.ndarray:
    c = self.config
    x_TD = self.whole["embedding_VD"][ids_T]
    for w in self.layers:
      h_TD = _norm(x_TD, c) * w["attn_norm_D"]
      q_TNH, k_TKH = np.tensordot(h_TD, w["q_DNH"], 1), np.tensordot(h_TD, w["k_DKH"], 1)
      if c.qk_norm:
        q_TNH, k_TKH = _norm(q_TNH, c) * w["q_norm_H"], _norm(k_TKH, c) * w["k_norm_H"]
      q_TNH, k_TKH = _rotate(q_TNH, c), _rotate(k_TKH, c)
      v_TKH = np.tensordot(h_TD, w["v_DKH"], 1)
      k_TNH, v_TNH = (a.repeat(c.group_size, axis=1) for a in (k_TKH, v_TKH))
      scores_NTS = np.einsum("tnh,snh->nts", q_TNH, k_TNH) / np.sqrt(c.head_dim)
      scores_NTS += np.triu(np.full(scores_NTS.shape[1:], -np.inf, np.float32), 1)
      p_NTS = np.exp(scores_NTS - scores_NTS.max(-1, keepdims=True))
      p_NTS /= p_NTS.sum(-1, keepdims=True)
      out_TNH = np.einsum("nts,snh->tnh", p_NTS, v_TNH)
      if c.sub_norm:
        flat = out_TNH.reshape(len(out_TNH), -1)
        out_TNH = _norm(flat, c).reshape(out_TNH.shape) * w["attn_sub_norm_NH"]
      x_TD = x_TD + np.tensordot(out_TNH, w["o_NHD"], 2)
      h_TD = _norm(x_TD, c) * w["ffn_norm_D"]
      gate_TF = h_TD @ w["gate_DF"]
      inner_TF = gate_TF / (1 + np.exp(-gate_TF)) * (h_TD @ w["up_DF"])
      if c.sub_norm:
        inner_TF = _norm(inner_TF, c) * w["ffn_sub_norm_F"]
      x_TD = x_TD + inner_TF @ w["down_FD"]
    x_TD = _norm(x_TD, c) * self.whole["final_norm_D"]
    head_DV = self.whole.get("head_DV")
    return x_TD @ (self.whole["embedding_VD"].T if head_DV is None else head_DV)


def _norm(x: np.ndarray, c: ModelConfig) -> np.ndarray:
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(c.norm_eps))


def _rotate(x_TNH: np.ndarray, c: ModelConfig) -> np.ndarray:
  inverse = c.rope_base ** (-np.arange(0, c.head_dim, 2) / c.head_dim)
  angle = (np.arange(len(x_TNH))[:, None] * inverse).astype(np.float32)[:, None, :]
  h = c.head_dim
  first, second = (
    (np.arange(0, h, 2), np.arange(1, h, 2))
    if c.rope_style == "interleaved"
    else (np.arange(h // 2), np.arange(h // 2, h))
  )
  a, b = x_TNH[..., first], x_TNH[..., second]
  out = np.empty_like(x_TNH)
  out[..., first] = a * np.cos(angle) - b * np.sin(angle)
  out[..., second] = a * np.sin(angle) + b * np.cos(angle)
  return out
