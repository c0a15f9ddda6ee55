"""Folders: narrow weights against their formulas in float64, what a stage reads, what is refused."""

import hashlib
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from rich.console import Console
from safetensors.numpy import save_file

from neurojax.config import Span
from neurojax.files import inspect
from neurojax.files.folder.file import FolderFile
from neurojax.files.folder.safetensors import SafetensorsFile
from neurojax.files.load import load_span, stored_forms, ternary_matrices
from neurojax.files.open import open_model
from neurojax.forms import Grouped, Scales
from neurojax.model import params
from neurojax.weights.grouped import GroupedArray
from neurojax.weights.ternary import TernaryArray
from tests.files import families
from tests.files.families import FAMILIES

LINEARS = {"q_DNH": "q", "k_DKH": "k", "v_DKH": "v", "o_NHD": "o", "gate_DF": "gate", "up_DF": "up", "down_FD": "down"}  # fmt: skip
RNG = np.random.default_rng(5)


def wide(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """The config.json and tensors of a family, of 128 channels and 256 in the FFN."""
  table = dict(FAMILIES[name].table) | {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32,
    "num_key_value_heads": 2,
  }  # fmt: skip
  shapes = {
    "model.embed_tokens.weight": (24, 128), "model.norm.weight": (128,), "lm_head.weight": (24, 128),
  }  # fmt: skip
  for layer in range(3):
    place = f"model.layers.{layer}."
    shapes |= {
      place + "self_attn.q_proj.weight": (128, 128), place + "self_attn.k_proj.weight": (64, 128),
      place + "self_attn.v_proj.weight": (64, 128), place + "self_attn.o_proj.weight": (128, 128),
      place + "mlp.gate_proj.weight": (256, 128), place + "mlp.up_proj.weight": (256, 128),
      place + "mlp.down_proj.weight": (128, 256), place + "input_layernorm.weight": (128,),
      place + "post_attention_layernorm.weight": (128,),
    }  # fmt: skip
  if table["tie_word_embeddings"]:
    del shapes["lm_head.weight"]
  return table, {
    key: RNG.standard_normal(shape, np.float32) / np.float32(8) for key, shape in shapes.items()
  }


def is_linear(name: str) -> bool:
  return "proj.weight" in name


def numbers(model: FolderFile, name: str) -> np.ndarray:
  """A layer's matrix as the folder has it: rows of output channels."""
  canonical = {
    "q_proj": "q_DNH", "k_proj": "k_DKH", "v_proj": "v_DKH", "o_proj": "o_NHD",
    "gate_proj": "gate_DF", "up_proj": "up_DF", "down_proj": "down_FD",
  }[name.split(".")[-2]]  # fmt: skip
  array = model.read(canonical, int(name.split(".")[2]))
  if canonical == "o_NHD":
    return array.reshape(-1, array.shape[-1]).T
  return array.reshape(array.shape[0], -1).T


def awq(n: int, k: int, group: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """A module of AutoAWQ's GEMM layout, packed word by word, and its weight in float64."""
  q, zeros = RNG.integers(0, 16, (k, n)), RNG.integers(0, 16, (k // group, n))
  scales = (RNG.random((k // group, n)) / 50).astype(np.float16)

  def packed(values: np.ndarray) -> np.ndarray:
    words = np.zeros((len(values), n // 8), np.uint32)
    for column in range(n // 8):
      # AutoAWQ, awq/modules/linear/gemm.py: order_map.
      for nibble, place in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
        words[:, column] |= (values[:, 8 * column + place] << 4 * nibble).astype(np.uint32)
    return words.view(np.int32)

  groups = np.arange(k) // group
  weight = (q - zeros[groups]) * scales.astype(np.float64)[groups]
  return {"qweight": packed(q), "qzeros": packed(zeros), "scales": scales}, weight.T


@pytest.fixture(scope="module")
def awq_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
  table, tensors = wide("llama")
  weights = {}
  for name in [name for name in tensors if is_linear(name)]:
    n, k = tensors.pop(name).shape
    parts, weights[name] = awq(n, k, 128)
    tensors |= {name.replace("weight", part): value for part, value in parts.items()}
  tensors = {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in tensors.items()}
  table["quantization_config"] = {
    "quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm",
    "modules_to_not_convert": None,
  }  # fmt: skip
  path = tmp_path_factory.mktemp("awq")
  return families.write_folder(path / "m", table, tensors), weights


def test_awq_is_q_minus_z_times_the_scale_of_its_group(awq_folder) -> None:
  path, weights = awq_folder
  with open_model(path) as model:
    assert not model.interpretation.demands + model.interpretation.faults
    for name, weight in weights.items():
      # (q - z) is exact, the product rounds once.
      np.testing.assert_array_equal(numbers(model, name), weight.astype(np.float32), err_msg=name)
    info = model.info("down_FD", 1)
    assert (info.name, info.type) == ("model.layers.1.mlp.down_proj.weight", "AWQ int4 (group 128)")
    assert info.shape == (128, 256) and info.nbytes == 128 * 256 // 2 + 2 * 128 * 2 + 2 * 128 // 2
    assert "model.layers.0.mlp.up_proj.qzeros" not in model.tensors


@pytest.mark.parametrize("group", [8, 32, -1])
def test_awq_of_other_groups(tmp_path: Path, group: int) -> None:
  table, tensors = wide("llama")
  weights = {}
  for name in [name for name in tensors if is_linear(name)]:
    n, k = tensors.pop(name).shape
    parts, weights[name] = awq(n, k, k if group == -1 else group)
    tensors |= {name.replace("weight", part): value for part, value in parts.items()}
  table["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": group}
  with open_model(families.write_folder(tmp_path / "m", table, tensors)) as model:
    assert not model.interpretation.demands + model.interpretation.faults
    for name, weight in weights.items():
      np.testing.assert_array_equal(numbers(model, name), weight.astype(np.float32), err_msg=name)
    rows = model.read_grouped("up_DF", 1)
    np.testing.assert_array_equal(rows.values().T, model.read("up_DF", 1))


def test_awq_stays_narrow_in_memory_and_computes_the_same(awq_folder) -> None:
  path, _ = awq_folder
  ids = jnp.asarray([[1, 5, 7, 2]])
  with open_model(path) as model:
    forms = stored_forms(model)
    form = Grouped(bits=4, offset=0, group_size=128, scale="float16", minima="zero")
    assert {name: forms[name] for name in LINEARS} == dict.fromkeys(LINEARS, form)
    narrow, dense = load_span(model, weights="stored"), load_span(model)
  pure = nnx.to_pure_dict(nnx.state(narrow))
  place = dict(params.layer_names(narrow.config))["down_FD"]
  held = params.get(pure, place)
  assert isinstance(held, GroupedArray)
  assert held.nbytes < 3 * 128 * 256 * 0.6
  np.testing.assert_allclose(narrow(ids)[0], dense(ids)[0], atol=2e-5)


def test_experts_of_awq_and_bitnet_stay_narrow(tmp_path: Path) -> None:
  table = dict(FAMILIES["mixtral"].table) | {"hidden_size": 128, "intermediate_size": 256}
  _, plain = wide("llama")
  table |= {"num_attention_heads": 4, "head_dim": 32, "num_hidden_layers": 1}
  plain = {k: v for k, v in plain.items() if "layers" not in k or "layers.0." in k}
  place = "model.layers.0.block_sparse_moe."
  plain = {k: v for k, v in plain.items() if ".mlp." not in k}
  plain[place + "gate.weight"] = RNG.standard_normal((4, 128), np.float32)
  for method, words in (("awq", {"bits": 4, "group_size": 64}), ("bitnet", {})):
    tensors = dict(plain)
    for expert in range(4):
      for part, (n, k) in (("w1", (256, 128)), ("w2", (128, 256)), ("w3", (256, 128))):
        module = f"{place}experts.{expert}.{part}."
        if method == "awq":
          tensors |= {module + key: value for key, value in awq(n, k, 64)[0].items()}
        else:
          _, tensors[module + "weight"] = bitnet(n, k)
          tensors[module + "weight_scale"] = np.array([expert + 2], np.float32)
    config = table | {"quantization_config": {"quant_method": method, **words}}
    with open_model(families.write_folder(tmp_path / method, config, tensors)) as model:
      assert not model.interpretation.demands + model.interpretation.faults
      narrow = load_span(model, weights="stored")
      dense = load_span(model)
    for name in ("gate_EDF", "up_EDF", "down_EFD"):
      path = dict(params.layer_names(narrow.config))[name]
      held, wanted = (params.get(nnx.to_pure_dict(nnx.state(one)), path) for one in (narrow, dense))
      assert isinstance(held, GroupedArray if method == "awq" else TernaryArray)
      np.testing.assert_array_equal(held.dequantize(), wanted)


@pytest.mark.parametrize(
  ("change", "part"),
  [
    ({"group_size": 64}, "qzeros' is I32 .*: AWQ of groups of 64 and"),
    ({"bits": 8}, "bits = 8"),
    ({"version": "gemv"}, "version = 'gemv'"),
    ({"zero_point": False}, "zero_point = False"),
    ({"quant_method": "gptq"}, "quant_method = 'gptq'"),
    ({"group_size": "128"}, "group_size = '128'"),
  ],
)
def test_other_forms_of_awq_are_refused(awq_folder, tmp_path: Path, change: dict, part: str):
  path, _ = awq_folder
  table = json.loads((path / "config.json").read_text())
  table["quantization_config"] |= change
  (tmp_path / "config.json").write_text(json.dumps(table))
  (tmp_path / "model.safetensors").symlink_to(path / "model.safetensors")
  with pytest.raises((ValueError, NotImplementedError), match=part), open_model(tmp_path) as model:
    model.check()


def fp8(weight: np.ndarray, kind: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """Parts of a module and its weight in float64."""
  n, k = weight.shape
  dtype = ml_dtypes.float8_e5m2 if kind == "tensor" else ml_dtypes.float8_e4m3fn
  codes = (weight * 100).astype(dtype)
  values = codes.astype(np.float64)
  if kind == "tensor":
    scale = np.float32(0.013)
    return {"weight": codes, "weight_scale": np.array(scale).reshape(1)}, values * scale
  if kind == "row":
    scales = RNG.random((n, 1), np.float32)
    parts = {"weight": codes, "weight_scale": scales.astype(ml_dtypes.bfloat16)}
    return parts, values * parts["weight_scale"].astype(np.float64)
  if kind == "fbgemm":
    # transformers, integrations/fbgemm_fp8.py: a float32 for each output channel, [N, 1].
    scales = RNG.random((n, 1), np.float32)
    return {"weight": codes, "weight_scale": scales}, values * scales.astype(np.float64)
  # Blocks of 96 x 100, the last of them cut.
  scales = RNG.random((math.ceil(n / 96), math.ceil(k / 100)), np.float32)
  whole = np.kron(scales.astype(np.float64), np.ones((96, 100)))[:n, :k]
  return {"weight": codes, "weight_scale_inv": scales}, values * whole


FP8: Mapping[str, dict[str, Any]] = {
  "tensor": {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
  "row": {
    "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
    "config_groups": {
      "group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
    },
    "kv_cache_scheme": None, "quantization_status": "compressed",
  },
  "fbgemm": {
    "quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"],
  },
  "block": {
    "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [96, 100],
    "fmt": "e4m3",
  },
}  # fmt: skip


def save(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
  """A file by the safetensors package, which takes 8-bit floats as bytes that we name anew."""
  plain, kinds = {}, {}
  for name, value in tensors.items():
    kind = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "bfloat16": "BF16"}.get(
      value.dtype.name
    )
    if kind is not None:
      kinds[name] = kind
      value = value.view(np.uint8 if value.dtype.itemsize == 1 else np.uint16)
    plain[name] = np.ascontiguousarray(value)
  save_file(plain, path)
  raw = path.read_bytes()
  nbytes = int.from_bytes(raw[:8], "little")
  header = json.loads(raw[8 : 8 + nbytes])
  for name, kind in kinds.items():
    header[name]["dtype"] = kind
  text = json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + nbytes :])


@pytest.mark.parametrize("kind", FP8)
def test_fp8_is_the_number_times_the_scale_of_its_part(tmp_path: Path, kind: str) -> None:
  table, tensors = wide("llama")
  weights = {}
  for name in [name for name in tensors if is_linear(name)]:
    parts, weights[name] = fp8(tensors.pop(name), kind)
    tensors |= {name.replace("weight", part): value for part, value in parts.items()}
    tensors[name.replace("weight", "input_scale")] = np.ones(1, np.float32)
  families.write_folder(tmp_path, table | {"quantization_config": FP8[kind]}, {})
  save(tmp_path / "model.safetensors", tensors)
  with open_model(tmp_path) as model:
    assert not model.interpretation.demands + model.interpretation.faults
    for name, weight in weights.items():
      np.testing.assert_array_equal(numbers(model, name), weight.astype(np.float32), err_msg=name)
    # Rows of 128 and 256 are no whole blocks of 100: these are computed with as numbers.
    forms = {name: model.narrow_form(name, 1) for name in LINEARS}
    if kind == "block":
      assert set(forms.values()) == {None}
      return
    float8 = "e5m2" if kind == "tensor" else "e4m3"
    assert all(isinstance(form, Grouped) and form.float8 == float8 for form in forms.values())
    narrow, dense = load_span(model, weights="stored"), load_span(model)
  ids = jnp.asarray([[1, 5, 7, 2]])
  np.testing.assert_allclose(narrow(ids)[0], dense(ids)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [64, 128])
def test_fp8_stays_narrow_in_memory_in_whole_blocks(tmp_path: Path, size: int) -> None:
  table, tensors = wide("llama")
  words = {"quant_method": "fp8", "weight_block_size": [96, size]}
  for name in [name for name in tensors if is_linear(name)]:
    weight = tensors.pop(name)
    codes = (weight * 100).astype(ml_dtypes.float8_e4m3fn)
    blocks = math.ceil(len(weight) / 96), weight.shape[1] // size
    tensors |= {name: codes, name + "_scale_inv": RNG.random(blocks, np.float32)}
  families.write_folder(tmp_path, table | {"quantization_config": words}, {})
  save(tmp_path / "model.safetensors", tensors)
  with open_model(tmp_path) as model:
    forms = stored_forms(model)
    form = Grouped(bits=8, offset=0, group_size=size, scale="float32", float8="e4m3")
    assert {name: forms[name] for name in LINEARS} == dict.fromkeys(LINEARS, form)
    rows = model.read_grouped("up_DF", 2)
    np.testing.assert_array_equal(rows.values().T, model.read("up_DF", 2))
    narrow = load_span(model, weights="stored")
    up, down = model.read("up_DF", 1), model.read("down_FD", 1)
  places = dict(params.layer_names(narrow.config))
  for name, wanted in (("up_DF", up), ("down_FD", down)):
    held = params.get(nnx.to_pure_dict(nnx.state(narrow)), places[name])
    assert isinstance(held, GroupedArray)
    k, n = wanted.shape
    assert held.nbytes == 3 * form.matrix_bytes(k, n) == 3 * (n * k + 4 * n * k // size)
    one = jax.tree.map(lambda leaf: leaf[1], held)
    np.testing.assert_array_equal(one.dequantize(), wanted)
    x = RNG.standard_normal((1, 3, k), np.float32)
    np.testing.assert_allclose(one.contract("BTD,DF->BTF", x), x @ wanted, rtol=1e-4, atol=1e-3)


def test_an_fp8_number_that_is_none_is_refused(tmp_path: Path) -> None:
  table, tensors = wide("llama")
  name = "model.layers.0.mlp.up_proj.weight"
  codes = np.zeros((256, 128), np.uint8)
  codes[7, 3] = 0xFF
  tensors[name] = codes.view(ml_dtypes.float8_e4m3fn)
  words = {"quantization_config": {"quant_method": "fp8"}}
  families.write_folder(tmp_path, table | words, {})
  save(tmp_path / "model.safetensors", tensors | {name + "_scale": np.ones(1, np.float32)})
  with open_model(tmp_path) as model:
    with pytest.raises(ValueError, match=r"up_proj.weight': row 7: a number is NaN or infinite"):
      model.read_grouped("up_DF", 0)
    with pytest.raises(ValueError, match="up_DF of layer 0 holds NaN or infinity"):
      load_span(model, Span(first_layer=0, last_layer=0, num_layers=3))


def test_scales_that_the_config_does_not_explain_are_refused(tmp_path: Path) -> None:
  table, tensors = wide("llama")
  name = "model.layers.0.mlp.up_proj.weight"
  for change, part in (
    ({name + "_scale": np.ones(1, np.float32)}, "is F32 with scales, and quantization_config does"),
    ({name: tensors[name].astype(np.int8)}, "is I8, and quantization_config does not say"),
  ):
    folder = families.write_folder(tmp_path / str(len(change)) / part[:5], table, tensors | change)
    with open_model(folder) as model, pytest.raises(ValueError, match=part):
      model.check()
  block = table | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}
  more = {name + "_scale_inv": np.ones((3, 3), np.float32)}
  with (
    open_model(families.write_folder(tmp_path / "b", block, tensors | more)) as model,
    pytest.raises(ValueError, match=r"scales of the shape \(3, 3\).*block of 64 x 64"),
  ):
    model.read("up_DF", 0)


def bitnet(n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
  """Ternary values and their bytes as transformers packs them: row r holds rows r, r + n/4, ..."""
  values = RNG.integers(-1, 2, (n, k))
  packed = np.zeros((n // 4, k), np.uint8)
  for row in range(n):
    packed[row % (n // 4)] |= (values[row] + 1).astype(np.uint8) << 2 * (row // (n // 4))
  return values, packed


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("bitnet", {"linear_class": "autobitlinear", "quantization_mode": "offline"}),
    ("llama", {"modules_to_not_convert": None}),
  ],
)
def test_bitnet_is_ternary_exactly(tmp_path: Path, name: str, words: dict[str, Any]) -> None:
  table, tensors = wide(name)
  if name == "bitnet":
    del table["head_dim"]
    for layer in range(3):
      place = f"model.layers.{layer}."
      tensors[place + "self_attn.attn_sub_norm.weight"] = np.ones(128, np.float32)
      tensors[place + "mlp.ffn_sub_norm.weight"] = np.ones(256, np.float32)
  weights = {}
  for key in [key for key in tensors if is_linear(key)]:
    n, k = tensors.pop(key).shape
    values, tensors[key] = bitnet(n, k)
    # A power of two and a number whose inverse is none.
    scale = np.array([0.03125 if "up" in key else 3.0], ml_dtypes.bfloat16)
    tensors[key + "_scale"] = scale
    factor = scale.astype(np.float64)
    weights[key] = values * (factor if name == "bitnet" else 1 / factor)
  config = table | {"quantization_config": {"quant_method": "bitnet", **words}}
  families.write_folder(tmp_path, config, {})
  save(tmp_path / "model.safetensors", tensors)
  with open_model(tmp_path) as model:
    assert not model.interpretation.demands + model.interpretation.faults
    assert ternary_matrices(model) == dict.fromkeys(LINEARS, Scales(None, 4))
    for key, weight in weights.items():
      np.testing.assert_array_equal(numbers(model, key), weight.astype(np.float32), err_msg=key)
    packed, dense = load_span(model, weights="w2a16"), load_span(model)
    assert model.info("up_DF", 0).type == "BitNet"
  place = dict(params.layer_names(packed.config))["up_DF"]
  held = params.get(nnx.to_pure_dict(nnx.state(packed)), place)
  assert isinstance(held, TernaryArray) and held.group_size is None
  plain = params.get(nnx.to_pure_dict(nnx.state(dense)), place)
  np.testing.assert_array_equal(held.dequantize(), plain)
  ids = jnp.asarray([[1, 5, 7, 2]])
  np.testing.assert_allclose(packed(ids)[0], dense(ids)[0], rtol=1e-4, atol=1e-4)


def test_bitnet_that_is_rounded_when_used_is_rounded_when_read(tmp_path: Path) -> None:
  table, tensors = wide("llama")
  words = {
    "quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online",
    "modules_to_not_convert": ["lm_head", "down_proj"],
  }  # fmt: skip
  families.write_folder(tmp_path, table | {"quantization_config": words}, tensors)
  with open_model(tmp_path) as model:
    assert set(ternary_matrices(model)) == set(LINEARS) - {"down_FD"}
    for name, weight in tensors.items():
      if not is_linear(name):
        continue
      wanted = weight
      if "down_proj" not in name:
        # transformers, integrations/bitnet.py, WeightQuant.
        scale = 1 / np.abs(weight.astype(np.float64)).mean()
        wanted = np.clip(np.rint(weight * scale), -1, 1) / scale
      np.testing.assert_allclose(numbers(model, name), wanted, rtol=1e-6, err_msg=name)
    np.testing.assert_array_equal(model.read("head_DV").T, tensors["lm_head.weight"])


def test_damaged_bitnet_is_refused_by_file_tensor_and_place(tmp_path: Path) -> None:
  table, tensors = wide("llama")
  name = "model.layers.0.mlp.up_proj.weight"
  _, tensors[name] = bitnet(256, 128)
  config = table | {"quantization_config": {"quant_method": "bitnet"}}
  for change, part in (
    ({name: tensors[name] | 3}, r"up_proj.weight': row 0, element 0: the code 3"),
    ({name + "_scale": np.zeros(1, np.float32)}, r"up_proj.weight_scale' is \[0.0\]: one positive"),
    ({name + "_scale": np.array([np.nan], np.float32)}, "one positive"),
    ({name + "_scale": np.ones(2, np.float32)}, "one positive"),
  ):
    changed = tensors | {name + "_scale": np.ones(1, np.float32)} | change
    folder = families.write_folder(
      tmp_path / hashlib.md5(part.encode()).hexdigest(), config, changed
    )
    with open_model(folder) as model, pytest.raises(ValueError, match=part) as caught:
      model.read("up_DF", 0)
    assert str(folder) in str(caught.value)
  for words in ({"use_rms_norm": True}, {"linear_class": "x"}, {"modules_to_not_convert": ["a.*"]}):
    config = table | {"quantization_config": {"quant_method": "bitnet", **words}}
    folder = families.write_folder(tmp_path / "w", config, tensors)
    with (
      open_model(folder) as model,
      pytest.raises(NotImplementedError, match=next(iter(words))),
    ):
      model.check()


def test_bfloat16_and_float16_are_read_exactly_and_kept(tmp_path: Path, monkeypatch) -> None:
  table, tensors = wide("llama")
  reads: list[str] = []
  real = FolderFile.read
  for dtype in (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)):
    folder = families.write_folder(tmp_path / dtype.name, table, {})
    stored = {name: value.astype(dtype) for name, value in tensors.items()}
    save(folder / "model.safetensors", stored)
    with open_model(folder) as model:
      plain = model.read_plain("up_DF", 2)
      assert plain.dtype == dtype
      values = stored["model.layers.2.mlp.up_proj.weight"].T
      np.testing.assert_array_equal(plain, values)
      np.testing.assert_array_equal(model.read("up_DF", 2), values.astype(np.float32))
      assert model.stored_bytes("up_DF", 2).tobytes() == values.T.tobytes()
      narrow = load_span(model, weights="stored")
      with monkeypatch.context() as patch:
        patch.setattr(FolderFile, "read", lambda *a: reads.append(a[1]) or real(*a))
        dense = load_span(model, dtype=dtype)
      assert reads and all("_norm_" in name for name in reads), "matrices need no float32"
    for a, b in zip(*(jax.tree.leaves(nnx.state(m.layers)) for m in (dense, narrow)), strict=True):
      np.testing.assert_array_equal(a, b)
    held = jax.tree.leaves(nnx.state(narrow.layers))
    assert {leaf.dtype for leaf in held if leaf.ndim > 2} == {jnp.dtype(dtype)}


def test_a_stage_reads_its_own_tensors_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
  family = FAMILIES["llama"]
  tensors = families.huggingface_tensors("llama", families.parameters(family))
  families.write_folder(tmp_path, family.table, tensors, shards=4)
  read: list[str] = []
  array = SafetensorsFile.array
  monkeypatch.setattr(
    SafetensorsFile, "array", lambda self, name: read.append(name) or array(self, name)
  )
  with open_model(tmp_path) as model:
    assert not read
    load_span(model, Span(first_layer=1, last_layer=1, num_layers=3))
    assert len(read) == 9 and all(name.startswith("model.layers.1.") for name in read)
    assert model.file_bytes == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    whole = model.sha256()
  with open_model(tmp_path) as model:
    assert model.sha256() == whole
    shard = tmp_path / "model-00002-of-00004.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(ValueError, match="replaced, changed or removed"):
      model.check_unchanged()
  with open_model(tmp_path) as model:
    assert model.sha256() != whole


def test_inspect_tells_what_is_left_aside(awq_folder, tmp_path: Path) -> None:
  path, _ = awq_folder
  with open_model(path) as model:
    said = inspect.describe(model)
  assert (said["format"], said["version"], said["architecture"]) == (
    "huggingface", "5.24.0", "llama",
  )  # fmt: skip
  assert said["unsupported"] == said["ignored"] == [] and said["tokenizer"] is None
  assert said["file_bytes"] == (path / "model.safetensors").stat().st_size
  kinds = {row["type"]: row for row in said["types"]}
  assert set(kinds) == {"AWQ int4 (group 128)", "F16"}
  assert kinds["AWQ int4 (group 128)"]["bits_per_weight"] == 4 + 20 / 128
  family = FAMILIES["gemma3"]
  tensors = families.huggingface_tensors("gemma3", families.parameters(family))
  tensors = {name.replace("model.", "model.language_model."): w for name, w in tensors.items()}
  table = {
    "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": dict(family.table),
  }  # fmt: skip
  tower = {"model.vision_tower.patch.weight": np.ones((3, 3), np.float32)}
  with open_model(families.write_folder(tmp_path, table, tensors | tower)) as model:
    said = inspect.describe(model)
    assert model.config == family.config
  assert said["ignored"] == ["vision tower: 1 tensors, of which text needs none"]
  console = Console(width=100, record=True, file=io.StringIO())
  console.print(inspect.render(said))
  assert "vision tower: 1 tensors" in console.export_text()


def sharded(tmp_path: Path, change: Any) -> Path:
  """A folder of two shards whose index was changed."""
  family = FAMILIES["llama"]
  tensors = families.huggingface_tensors("llama", families.parameters(family))
  families.write_folder(tmp_path, family.table, tensors, shards=2)
  path = tmp_path / "model.safetensors.index.json"
  index = json.loads(path.read_text())
  change(index["weight_map"])
  path.write_text(json.dumps(index))
  return tmp_path


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM = "model.norm.weight"


@pytest.mark.parametrize(
  ("change", "part"),
  [
    (lambda m: m.update({NORM: "../model.safetensors"}), "is named by its name alone"),
    (lambda m: m.update({NORM: "/etc/passwd.safetensors"}), "is named by its name alone"),
    (lambda m: m.update({NORM: "a\\b.safetensors"}), "is named by its name alone"),
    (lambda m: m.update({NORM: "config.json"}), "is named by its name alone"),
    (lambda m: m.update({NORM: 7}), "is named by its name alone"),
    (lambda m: m.update({NORM: "model-00003.safetensors"}), "model-00003.safetensors is missing"),
    (lambda m: m.update({NORM: TWO if m[NORM] == ONE else ONE}), "which does not hold it"),
    (lambda m: m.update({"model.other": ONE}), "which does not hold it"),
    (lambda m: m.clear(), "no weight_map"),
  ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path: Path, change: Any, part: str) -> None:
  with pytest.raises(ValueError, match=part):
    open_model(sharded(tmp_path, change))


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
  folder = sharded(tmp_path, lambda m: None)
  with SafetensorsFile(folder / ONE) as file:
    name = next(iter(file.tensors))
  save_file({name: np.ones(3, np.float32)}, folder / TWO)
  with pytest.raises(ValueError, match=f"'{name}' is in {ONE} and in {TWO}"):
    open_model(folder)


def test_what_is_no_folder_of_a_model_is_said(tmp_path: Path) -> None:
  family = FAMILIES["llama"]
  with pytest.raises(ValueError, match=r"a folder without config\.json"):
    open_model(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps(dict(family.table)))
  with pytest.raises(ValueError, match=r"neither model\.safetensors nor model\.safetensors\.index"):
    open_model(tmp_path)
  (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
  with pytest.raises(NotImplementedError, match="convert them to safetensors"):
    open_model(tmp_path)
  families.write_folder(tmp_path, family.table, {"a": np.ones(3, np.float32)})
  with pytest.raises(ValueError, match="name its folder"):
    open_model(tmp_path / "model.safetensors")
  with pytest.raises(ValueError, match="carries its tokenizer"):
    open_model(tmp_path, tmp_path / "config.json")
  for text, part in (
    ("", "not valid JSON"), ("[]", "no JSON object"), ('{"a": 1, "a": 2}', "'a' appears twice"),
    ('{"a": NaN}', "NaN is no number"), ("[" * 10_000, "not valid JSON"), ("\xff", "not valid JSON"),
  ):  # fmt: skip
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=part) as caught:
      open_model(tmp_path)
    assert "config.json" in str(caught.value)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
  return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HOSTILE: list[tuple[Any, int, str]] = [
  ({"a": entry()}, 7, "reaches to byte"),
  ({"a": entry()}, 9, "1 bytes behind the last tensor"),
  ({"a": entry(), "b": entry()}, 8, "'b' overlaps 'a'|'a' overlaps 'b'"),
  ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, "'b' overlaps 'a'"),
  ({"a": entry(), "b": entry(offsets=(12, 20))}, 20, "'b' leaves a gap behind 'a'"),
  ({"a": entry(offsets=(8, 0))}, 8, "the first one first"),
  ({"a": entry(offsets=(0, 2**60))}, 8, "its place in the file has"),
  ({"a": entry(offsets=(-8, 0))}, 8, "two bytes"),
  ({"a": entry(offsets=(0, 8.0))}, 8, "two bytes"),
  ({"a": entry(offsets=(False, 8))}, 8, "two bytes"),
  ({"a": entry(shape=(2**40, 2**40))}, 8, "at most 8 counts"),
  ({"a": entry(shape=(3,))}, 8, "96 bits, and its place in the file has 8 bytes"),
  ({"a": entry(shape=(-2,))}, 8, "at most 8 counts"),
  ({"a": entry(shape=[1] * 9)}, 8, "at most 8 counts"),
  ({"a": entry(dtype="F31")}, 8, "dtype 'F31': choose one of"),
  ({"a": entry(dtype=["F32"])}, 8, "choose one of"),
  ({"a": entry(dtype="F4", shape=(3,), offsets=(0, 1))}, 1, "12 bits"),
  ({"a": {"dtype": "F32", "shape": [2]}}, 8, "must have dtype, shape and data_offsets"),
  ({"a": 7}, 8, "must have dtype, shape and data_offsets"),
  ({"__metadata__": {"a": 1}}, 0, "map strings to strings"),
  ({"__metadata__": []}, 0, "map strings to strings"),
  ([], 0, "no JSON object"),
]


@pytest.mark.parametrize(("header", "nbytes", "part"), HOSTILE)
def test_hostile_headers_are_refused(tmp_path: Path, header: Any, nbytes: int, part: str) -> None:
  text = json.dumps(header).encode()
  path = tmp_path / "model.safetensors"
  path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(nbytes))
  with pytest.raises(ValueError, match=part) as caught:
    SafetensorsFile(path)
  assert str(path) in str(caught.value)


def test_hostile_lengths_are_refused(tmp_path: Path) -> None:
  path = tmp_path / "model.safetensors"
  for raw, part in (
    (b"", "empty"),
    (b"1234567", "7 bytes: this is no safetensors file"),
    ((2**63).to_bytes(8, "little") + b"{}", "does not fit into the 2 that follow"),
    ((9 << 20).to_bytes(8, "little") + bytes(9 << 20), "at most 8388608 are read"),
    ((2).to_bytes(8, "little") + b"{\xff", "not valid JSON"),
    ((19).to_bytes(8, "little") + b'{"a":1,"a":{"b":2}}', "'a' appears twice"),
  ):
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=part):
      SafetensorsFile(path)


def test_a_shortened_or_closed_file_is_an_error_and_no_crash(tmp_path: Path) -> None:
  family = FAMILIES["qwen2"]
  tensors = families.huggingface_tensors("qwen2", families.parameters(family))
  families.write_folder(tmp_path, family.table, tensors)
  with open_model(tmp_path) as model:
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-4096])
    with pytest.raises(ValueError, match="do not write to a file in use"):
      model.read("up_DF", 0)
    (tmp_path / "model.safetensors").write_bytes(whole)
  with pytest.raises(ValueError, match="the file is closed"):
    model.read("up_DF", 0)
  with pytest.raises(ValueError, match="layer = 3 of 'up_DF'"):
    model.read("up_DF", 3)
