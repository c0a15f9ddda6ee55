"""What llama.cpp makes of a file: run by a Python that has llama-cpp-python, which need not be ours.

Reads {"model": path, "ids": [...], "text": "...", "tensors": [...]} from standard input; a tensor is
{"type": "TQ2_0", "count": elements, "bytes": hex}. Prints one JSON object: the logits of every
position, the ids that llama.cpp's tokenizer gives for the text, and the values of the tensors.
"""

import ctypes
import json
import sys

import llama_cpp

asked = json.load(sys.stdin)
model = llama_cpp.Llama(
  asked["model"],
  n_ctx=max(64, len(asked["ids"])),
  n_batch=512,
  logits_all=True,
  n_threads=2,
  # As exact as it goes: float32 keys and values.
  type_k=llama_cpp.GGML_TYPE_F32,
  type_v=llama_cpp.GGML_TYPE_F32,
  flash_attn=False,
  verbose=False,
)
model.eval(asked["ids"])


def decoded(tensor: dict) -> list[float]:
  # ggml-quants.h: void dequantize_row_tq2_0(const block_tq2_0 *, float *, int64_t), and its like.
  function = getattr(llama_cpp.llama_cpp._lib, f"dequantize_row_{tensor['type'].lower()}")
  function.argtypes, function.restype = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64], None
  values = (ctypes.c_float * tensor["count"])()
  function(bytes.fromhex(tensor["bytes"]), ctypes.byref(values), tensor["count"])
  return list(values)


result = {
  "logits": model.scores[: len(asked["ids"])].tolist(),
  "text_ids": model.tokenize(asked["text"].encode(), add_bos=True, special=False),
  "tensors": [decoded(tensor) for tensor in asked["tensors"]],
}
json.dump(result, sys.stdout)
