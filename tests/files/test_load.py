"""From a file to the parameters of a span: the right tensors, in the right form, and no others."""

import dataclasses
import math
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from neurojax import count
from neurojax.config import Span
from neurojax.files import load
from neurojax.files.dummy import write_dummy
from neurojax.files.load import load_span, ternary_matrices
from neurojax.files.open import open_model
from neurojax.forms import Scales
from neurojax.model import params
from neurojax.stage.cut import cut
from neurojax.weights.codecs import CODECS
from neurojax.weights.grouped import GroupedArray
from neurojax.weights.ternary import TernaryArray
from tests import tinymodel
from tests.files import tiny


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return tinymodel.write(tmp_path_factory.mktemp("load") / "tiny.gguf")


def leaves(model) -> list[np.ndarray]:
  return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]


SPANS = [(0, 5), (0, 1), (2, 4), (5, 5)]


@pytest.mark.parametrize(("first", "last"), SPANS)
@pytest.mark.parametrize("weights", ["dense", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_span_is_the_cut_of_the_loaded_whole_and_as_large_as_counted(
  path: Path, first: int, last: int, weights: str, dtype: str
):
  span = Span(first_layer=first, last_layer=last, num_layers=6)
  with open_model(path) as file:
    part = load_span(file, span, weights=weights, dtype=jnp.dtype(dtype))
    whole = load_span(file, weights=weights, dtype=jnp.dtype(dtype))
  for a, b in zip(leaves(part), leaves(cut(whole, span)), strict=True):
    np.testing.assert_array_equal(a, b)
  wanted = count.span_bytes(part.config, span, dtype=dtype, weights=weights)
  # The activation levels of an int8 matrix stand once per layer as well.
  assert tinymodel.parameter_bytes(part) == wanted


def test_values_arrive_under_their_names(path: Path):
  values = tiny.parameters(tinymodel.CONFIG)
  with open_model(path) as file:
    model = load_span(file)
  pure = nnx.to_pure_dict(nnx.state(model))
  scale = np.float32(0.2)
  np.testing.assert_array_equal(pure["embedding_VD"], values["embedding_VD"] * scale)
  for layer in range(6):
    found = pure["layers"]["attention"]["q_DNH"][layer]
    np.testing.assert_array_equal(found, values[f"q_DNH/{layer}"] * scale)
    np.testing.assert_array_equal(
      pure["layers"]["ffn"]["down_FD"][layer], values[f"down_FD/{layer}"] * scale
    )


def test_progress_counts_layers(path: Path):
  seen = []
  with open_model(path) as file:
    load_span(file, Span(first_layer=1, last_layer=3, num_layers=6), progress=seen.append)
  assert seen == [1, 2, 3]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, bad: float, monkeypatch):
  spoiled = tinymodel.write(tmp_path / "bad.gguf")
  with open_model(spoiled) as file:
    info = file.info("up_DF", 3)
  raw = bytearray(spoiled.read_bytes())
  raw[info.offset + 40 : info.offset + 44] = np.float32(bad).tobytes()
  spoiled.write_bytes(raw)
  with open_model(spoiled) as file:
    with pytest.raises(ValueError, match=r"up_DF of layer 3 holds NaN or infinity"):
      load_span(file)
    # A stage that does not hold that layer does not care.
    load_span(file, Span(first_layer=0, last_layer=2, num_layers=6))


WIDE = dataclasses.replace(
  tiny.WIDE, num_layers=3, num_kv_heads=2, ffn_dim=512, rope_style="half", qk_norm=True
)
MATRICES = {"q_DNH", "k_DKH", "v_DKH", "o_NHD", "gate_DF", "up_DF", "down_FD", "embedding_VD"}


def values(model) -> dict[str, object]:
  """The parameters of a model by canonical name, TernaryArrays whole."""
  pure = nnx.to_pure_dict(nnx.state(model))
  names = {**params.LAYER, **params.FIRST, **params.LAST}
  found = {}
  for name, path in names.items():
    try:
      found[name] = params.get(pure, path)
    except KeyError:
      continue
  return found


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", CODECS)
def test_ternary_matrices_stay_packed_and_mean_the_same(tmp_path: Path, kind: str, tied: bool):
  config = dataclasses.replace(WIDE, tied_embedding=tied)
  write_dummy(tmp_path / "m.gguf", config, kind)
  with open_model(tmp_path / "m.gguf") as file:
    packed = values(load_span(file, weights="w2a8"))
    dense = values(load_span(file))
    for layer in range(3):
      codes, scales, _ = file.read_ternary("down_FD", layer)
      np.testing.assert_array_equal(packed["down_FD"].codes[layer], codes)
      np.testing.assert_array_equal(packed["down_FD"].scales[layer], scales)
  outer = set(params.FIRST) | set(params.LAST) - ({"head_DV"} if tied else set())
  assert packed.keys() == dense.keys() == set(dict(params.layer_names(config))) | outer
  for name, value in packed.items():
    assert isinstance(value, TernaryArray) == (name in MATRICES | {"head_DV"})
    if isinstance(value, TernaryArray):
      assert (value.mode, value.group_size) == ("w2a8", CODECS[kind].group_size)
      assert value.scales.dtype == CODECS[kind].scale_dtype
      assert value.shape == dense[name].shape
      value = value.dequantize()
    np.testing.assert_array_equal(value, dense[name], err_msg=name)


@pytest.mark.parametrize(("first", "last"), [(0, 2), (0, 0), (1, 1), (1, 2)])
@pytest.mark.parametrize("kind", ["TQ2_0", "I2_S", "Q2_0 (group 64)"])
@pytest.mark.parametrize("outer", [None, "Q8_0"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_span_is_the_cut_of_the_packed_whole_and_as_large_as_counted(
  tmp_path: Path, first: int, last: int, kind: str, outer: str | None, tied: bool
):
  config = dataclasses.replace(WIDE, tied_embedding=tied)
  write_dummy(tmp_path / "m.gguf", config, kind, outer=outer)
  span = Span(first_layer=first, last_layer=last, num_layers=3)
  with open_model(tmp_path / "m.gguf") as file:
    part = load_span(file, span, weights="w2a16", dtype=jnp.bfloat16)
    whole = load_span(file, weights="w2a16", dtype=jnp.bfloat16)
    ternary = ternary_matrices(file)
  assert len(ternary) == (9 if outer is None and not tied else 8 if outer is None else 7)
  assert jax.tree.structure(nnx.state(part)) == jax.tree.structure(nnx.state(cut(whole, span)))
  for a, b in zip(leaves(part), leaves(cut(whole, span)), strict=True):
    np.testing.assert_array_equal(a, b)
  wanted = count.span_bytes(config, span, dtype="bfloat16", weights="w2a16", forms=ternary)
  assert tinymodel.parameter_bytes(part) == wanted
  table = values(part).get("embedding_VD")
  if table is not None and outer is not None:
    assert table.dtype == jnp.bfloat16, "a matrix of another type is dense in the dtype"


@pytest.mark.parametrize("kind", ["TQ2_0", "I2_S", "Q2_0 (group 128)"])
def test_experts_stay_packed(tmp_path: Path, kind: str):
  config = dataclasses.replace(
    tiny.WIDE, num_layers=2, num_kv_heads=2, ffn_dim=512, num_experts=3, experts_per_token=2
  )
  write_dummy(tmp_path / "m.gguf", config, kind, seed=3)
  with open_model(tmp_path / "m.gguf") as file:
    assert file.config == config
    ternary = ternary_matrices(file)
    packed, dense = load_span(file, weights="w2a16"), load_span(file)
    part = load_span(file, Span(first_layer=1, last_layer=1, num_layers=2), weights="w2a16")
  assert {"gate_EDF", "up_EDF", "down_EFD", "q_DNH", "embedding_VD"} <= set(ternary)
  experts = values(packed)["down_EFD"]
  assert isinstance(experts, TernaryArray)
  assert experts.shape == (2, 3, 512, 256) and experts.weight_shape == (512, 256)
  np.testing.assert_array_equal(experts.dequantize(), values(dense)["down_EFD"])
  for a, b in zip(leaves(part.layers), leaves(packed.layers), strict=True):
    np.testing.assert_array_equal(a[0], b[1])
  wanted = count.span_bytes(
    config, Span.whole(config), dtype="float32", weights="w2a16", forms=ternary
  )
  assert tinymodel.parameter_bytes(packed) == wanted
  # A token and several are computed in two ways.
  for ids in ([[3]], [[1, 5, 2, 7, 6, 0, 4]]):
    found, plain = (np.asarray(model(jnp.asarray(ids))[0]) for model in (packed, dense))
    np.testing.assert_allclose(found, plain, rtol=2e-4, atol=2e-4)


def test_quantized_experts_stay_so(tmp_path: Path):
  config = dataclasses.replace(
    tiny.WIDE, num_layers=1, num_kv_heads=2, num_experts=3, experts_per_token=2
  )
  kind = gguf.GGMLQuantizationType.Q8_0
  arrays = tiny.parameters(config)
  raw = {
    name: (gguf.quantize(tiny.as_stored(value, name), kind), kind)
    for name, value in arrays.items()
    if params.is_expert(name.split("/")[0])
  }
  assert len(raw) == 3
  tiny.write_gguf(tmp_path / "m.gguf", config, arrays, raw=raw)
  with open_model(tmp_path / "m.gguf") as file:
    narrow, dense = values(load_span(file, weights="stored")), values(load_span(file))
  for name in ("gate_EDF", "up_EDF", "down_EFD"):
    assert isinstance(narrow[name], GroupedArray)
    np.testing.assert_array_equal(narrow[name].dequantize(), dense[name])


def test_a_matrix_is_packed_where_all_its_layers_can_be_stacked(tmp_path: Path):
  config = dataclasses.replace(tiny.WIDE, num_layers=2)
  arrays = tiny.parameters(config)
  kind = gguf.GGMLQuantizationType

  def other(name: str, to: gguf.GGMLQuantizationType):
    return gguf.quantize(tiny.as_stored(arrays[name], name), to), to

  raw = {"gate_DF/0": other("gate_DF/0", kind.Q8_0), "up_DF/1": other("up_DF/1", kind.TQ1_0)}
  tiny.write_gguf(tmp_path / "m.gguf", config, arrays, kind=kind.TQ2_0, raw=raw)
  with open_model(tmp_path / "m.gguf") as file:
    # A span without the odd layer is held as the whole model is.
    span = Span(first_layer=1, last_layer=1, num_layers=2)
    for model in (load_span(file, weights="w2a16"), load_span(file, span, weights="w2a16")):
      found = values(model)
      assert isinstance(found["gate_DF"], jax.Array)
      assert isinstance(found["up_DF"], TernaryArray)
    assert ternary_matrices(file) == {name: Scales(256, 2) for name in MATRICES - {"gate_DF"}}


def test_a_file_without_ternary_matrices_is_refused_with_the_remedy(path: Path):
  with open_model(path) as file:
    assert ternary_matrices(file) == {}
    with pytest.raises(ValueError, match=r"'w2a16', .*\(F32\): choose 'dense' or 'int8'") as caught:
      load_span(file, weights="w2a16")
  assert str(path) in str(caught.value)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (2, 1, 0)])
@pytest.mark.parametrize("shape", [(3, 130, 7), (200, 1, 5), (1, 1, 1), (70, 3, 64)])
def test_copies_of_swapped_axes_are_copies(shape: tuple[int, ...], order: tuple[int, ...]):
  leaf = np.arange(math.prod(shape), dtype=np.int32).reshape(shape).transpose(order)
  into = np.zeros(leaf.shape, np.int32)
  load._copy(into, leaf)
  np.testing.assert_array_equal(into, leaf)
  load._copy(into, leaf[:, ::-1])
  np.testing.assert_array_equal(into, leaf[:, ::-1])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_not_finite_is_seen(dtype: str):
  array = np.ones((5, 7), jnp.dtype(dtype)).T
  array[3, 2] = np.finfo(np.float16).max
  assert load._is_finite(array)
  for bad in (np.inf, -np.inf, np.nan):
    array[3, 2] = bad
    assert not load._is_finite(array)


def test_damage_is_found_on_loading(tmp_path: Path):
  path = tmp_path / "m.gguf"
  write_dummy(path, WIDE, "Q2_0 (group 128)")
  with open_model(path) as file:
    info = file.info("up_DF", 1)
  raw = bytearray(path.read_bytes())
  raw[info.offset : info.offset + 2] = np.float16(np.nan).tobytes()
  path.write_bytes(raw)
  with open_model(path) as file:
    with pytest.raises(ValueError, match=r"'blk.1.ffn_up.weight': row 0, .* scale is nan"):
      load_span(file, weights="w2a16")
    load_span(file, Span(first_layer=2, last_layer=2, num_layers=3), weights="w2a16")
