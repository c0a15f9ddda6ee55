"""llama2.c's names for its tensors (run.c, `TransformerWeights`): each kind for all layers in one
block, of which the reader cuts out the layer."""

from collections.abc import Mapping

from neurojax.files.names.architecture import Stored

LLAMA2C: Mapping[str, Stored] = {
  "embedding_VD": Stored("token_embedding_table", "V D"),
  "final_norm_D": Stored("rms_final_weight", "D"),
  "head_DV": Stored("wcls", "V D"),
  "attn_norm_D": Stored("rms_att_weight", "D"),
  "q_DNH": Stored("wq", "NH D"),
  "k_DKH": Stored("wk", "KH D"),
  "v_DKH": Stored("wv", "KH D"),
  "o_NHD": Stored("wo", "D NH"),
  "ffn_norm_D": Stored("rms_ffn_weight", "D"),
  "gate_DF": Stored("w1", "F D"),
  "up_DF": Stored("w3", "F D"),
  "down_FD": Stored("w2", "D F"),
}
