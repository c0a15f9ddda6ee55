"""Weights that a Hugging Face folder keeps narrower than 16 bits, as NumPy arrays.

A module's weight is rows of output channels, `[N, K]`, whatever its tensors look like:

  AWQ      qweight int32 [K, N/8], qzeros int32 [K/g, N/8], scales float16 [K/g, N]: eight 4-bit
           integers to a word, of which nibble i is column 8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i];
           w = (q - z) * scale (AutoAWQ, awq/modules/linear/gemm.py and awq/utils/packing_utils.py)
  BitNet   weight uint8 [N/4, K], weight_scale [1]: bits 2i and 2i + 1 of row r are row i N/4 + r,
           as -1, 0, 1 plus 1 (transformers, integrations/bitnet.py)
  FP8      weight float8 [N, K] with weight_scale_inv or weight_scale, one for the matrix, for each
           row, or for each block of rows and columns; w = q * scale (transformers,
           integrations/finegrained_fp8.py; compressed-tensors, "float-quantized")
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from neurojax.files.names.architecture import Demand, Fault, short
from neurojax.weights.codecs import gather

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization:
  """The quantization_config of a config.json.

  Attributes:
    method: Its quant_method.
    block: Rows and columns of an FP8 matrix that share a scale, None where whole rows or matrices do.
    group_size: AWQ's; None: a whole column shares a scale.
    is_inverse: BitNet's scales divide (linear_class "bitlinear").
    is_online: BitNet's weights are numbers that are rounded to ternary when they are used.
    kept: Modules whose weights are not, as names or their ends.
  """

  method: Literal["fp8", "awq", "bitnet"]
  block: tuple[int, int] | None = None
  group_size: int | None = None
  is_inverse: bool = False
  is_online: bool = False
  kept: tuple[str, ...] = ()

  def is_converted(self, module: str) -> bool:
    """Whether a linear module's weights are quantized (transformers, `should_convert_module`)."""
    return not any(
      module == name or module.startswith(f"{name}.") or module.endswith(name) for name in self.kept
    )


def quantization(table: Mapping[str, Any]) -> Quantization:
  """Read a quantization_config. Raises: Demand: it is not read; Fault: a value that makes no sense."""
  method = table.get("quant_method")
  if method == "awq" or (method is None and "w_bit" in table):
    return _awq(table)
  if method == "bitnet":
    return _bitnet(table)
  if method in ("fp8", "fbgemm_fp8"):
    _check_keys(table, _FP8_KEYS)
    return Quantization(method="fp8", block=_block(table.get("weight_block_size")))
  if method == "compressed-tensors":
    return _compressed_tensors(table)
  raise Demand(
    f"quantization_config: quant_method = {short(method)}; awq, bitnet, fp8, fbgemm_fp8 and"
    " compressed-tensors (float-quantized) are read"
  )


# Keys and the values under which the weights are what the readers take them for (None: any). How
# activations are rounded is not the file's to say: they are not.
_Keys = Mapping[str, tuple[object, ...] | None]
_FP8_KEYS: _Keys = {
  **dict.fromkeys((
    "quant_method", "activation_scheme", "weight_block_size", "dequantize", "scale_fmt",
    "modules_to_not_convert", "ignored_layers", "activation_scale_ub",
  )),
  "fmt": ("e4m3", "e5m2"),
  "expert_dtype": ("fp8",),
}  # fmt: skip
_AWQ_KEYS: _Keys = {
  **dict.fromkeys((
    "quant_method", "group_size", "q_group_size", "modules_to_not_convert", "backend", "do_fuse",
    "fuse_max_seq_len", "modules_to_fuse", "exllama_config", "damp_percent", "true_sequential",
    "ignore",
  )),
  "bits": (4,), "w_bit": (4,), "zero_point": (True,), "version": ("gemm", "GEMM"),
  "format": ("gemm", "GEMM"), "sym": (False,), "desc_act": (False,),
}  # fmt: skip
_BITNET_KEYS: _Keys = {
  "quant_method": None, "modules_to_not_convert": None, "rms_norm_eps": None, "bits": (2,),
  "linear_class": ("bitlinear", "autobitlinear"), "quantization_mode": ("offline", "online"),
  "use_rms_norm": (False,),
}  # fmt: skip
_COMPRESSED_KEYS: _Keys = {
  **dict.fromkeys((
    "quant_method", "config_groups", "ignore", "global_compression_ratio", "version",
  )),
  "format": ("float-quantized", "naive-quantized"), "quantization_status": ("compressed",),
  "kv_cache_scheme": (), "sparsity_config": ({}, {"format": "dense"}), "transform_config": ({},),
}  # fmt: skip


def _check_keys(table: Mapping[str, Any], known: _Keys) -> None:
  for key, value in table.items():
    allowed = known.get(key, ())
    unknown_and_off = key not in known and value in (False, [], {}, "")
    if value is None or allowed is None or value in allowed or unknown_and_off:
      continue
    raise Demand(f"quantization_config: {key} = {short(value)}")


def _awq(table: Mapping[str, Any]) -> Quantization:
  _check_keys(table, _AWQ_KEYS)
  size = table.get("group_size", table.get("q_group_size", 128))
  if type(size) is not int or (size != -1 and size < 1):
    raise Fault(f"quantization_config: group_size = {short(size)}: a positive integer or -1")
  return Quantization(method="awq", group_size=None if size == -1 else size)


def _bitnet(table: Mapping[str, Any]) -> Quantization:
  _check_keys(table, _BITNET_KEYS)
  is_auto = table.get("linear_class") == "autobitlinear"
  kept = table.get("modules_to_not_convert")
  if kept is None:
    kept = ["lm_head"]
  if not isinstance(kept, list) or not all(isinstance(name, str) and name for name in kept):
    raise Fault(f"quantization_config: modules_to_not_convert = {short(kept)}: expected names")
  for name in kept:
    if not re.fullmatch(r"[\w.]{1,200}", name):
      raise Demand(f"quantization_config: modules_to_not_convert has {short(name)}, a pattern")
  return Quantization(
    method="bitnet",
    is_inverse=not is_auto,
    is_online=is_auto and table.get("quantization_mode") == "online",
    kept=tuple(kept),
  )


def _compressed_tensors(table: Mapping[str, Any]) -> Quantization:
  _check_keys(table, _COMPRESSED_KEYS)
  groups = table.get("config_groups")
  if not isinstance(groups, dict) or len(groups) != 1:
    raise Demand(f"quantization_config: config_groups = {short(groups)}: one group is read")
  (group,) = groups.values()
  weights = group.get("weights") if isinstance(group, dict) else None
  if not isinstance(weights, dict):
    raise Fault(f"quantization_config: config_groups = {short(groups)}: it has no weights")
  if (weights.get("num_bits"), weights.get("type")) != (8, "float"):
    raise Demand(f"quantization_config: weights = {short(weights)}: 8-bit floats are read")
  return Quantization(method="fp8", block=_block(weights.get("block_structure")))


def _block(value: Any) -> tuple[int, int] | None:
  if value is None:
    return None
  if isinstance(value, str) and re.fullmatch("[0-9]{1,6}x[0-9]{1,6}", value):
    value = [int(part) for part in value.split("x")]
  if (
    not isinstance(value, list)
    or len(value) != 2
    or not all(type(item) is int and item > 0 for item in value)
  ):
    raise Fault(f"quantization_config: blocks of {short(value)}: two positive integers")
  return value[0], value[1]


def awq_integers(words: Int32[np.ndarray, "R C"]) -> UInt8[np.ndarray, "R N"]:
  """The 4-bit integers of AWQ's words in the order of columns, N = 8 C."""
  unsigned = words.view(np.uint32)
  values = np.empty((*words.shape, 8), np.uint8)
  for nibble, column in enumerate(_AWQ_ORDER):
    values[..., column] = unsigned >> np.uint32(4 * nibble) & np.uint32(15)
  return values.reshape(len(words), -1)


def bitnet_codes(packed: UInt8[np.ndarray, "R K"]) -> UInt8[np.ndarray, "N Y"]:
  """Rows of the packing that `weights.ternary` defines, N = 4 R. A code 3 stays one."""
  # Imports JAX, which a reader of headers does without.
  from neurojax.weights.ternary import BLOCK, row_bytes

  rows, k = packed.shape
  codes = np.empty((4, rows, row_bytes(k)), np.uint8)
  for plane in range(4):
    fields = np.ones((rows, -(-k // BLOCK) * BLOCK), np.uint8)
    fields[:, :k] = packed >> np.uint8(2 * plane) & np.uint8(3)
    codes[plane] = gather(fields)
  return codes.reshape(4 * rows, -1)


def row_scales(
  scales: np.ndarray, shape: tuple[int, int], block: tuple[int, int] | None
) -> tuple[Float32[np.ndarray, "n Q"], int]:
  """Scales of an FP8 matrix [N, K] by row: [1, 1], [N, 1] or [N, Q]; and how many elements of a row
  share one, of which the last may have fewer.

  Args:
    block: Rows and columns that share a scale, where there are more than one for a row.
  Raises: ValueError: they are of another number than the matrix asks for.
  """
  n, k = shape
  # Bytes are exponents of two (UE8M0).
  values = scales.astype(np.float32)
  if scales.dtype == np.uint8:
    values = np.exp2(values - 127)
  if values.size == 1:
    return values.reshape(1, 1), k
  if values.shape in ((n,), (n, 1)):
    return values.reshape(n, 1), k
  if block is not None and values.shape == (-(-n // block[0]), -(-k // block[1])):
    return np.repeat(values, block[0], axis=0)[:n], block[1]
  asked = "" if block is None else f", or one for each block of {block[0]} x {block[1]}"
  raise ValueError(
    f"scales of the shape {scales.shape}: a matrix {shape} has one, one for each row{asked}"
  )
