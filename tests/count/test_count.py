import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from neurojax import count, forms
from neurojax.config import ModelConfig, Span
from neurojax.count.model import _matrix_bytes
from neurojax.forms import Scales
from neurojax.model import params
from neurojax.model.neurollm import NeuroLLM
from neurojax.weights.codecs import CODECS
from neurojax.weights.int8 import Int8Array
from neurojax.weights.ternary import TernaryArray, row_bytes
from tests.scaling.shapes import CONFIGS, configs


def tree_bytes(model: NeuroLLM) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(model)))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_count_equals_the_bytes_of_the_real_tree(path: Path, dtype: str):
  tied = ModelConfig.load(path)
  for config in (tied, dataclasses.replace(tied, tied_embedding=not tied.tied_embedding)):
    whole = NeuroLLM.abstract(config, dtype=jnp.dtype(dtype))
    assert tree_bytes(whole) == count.parameters(config) * forms.DTYPE_BYTES[dtype]
    third = config.num_layers // 3
    for first, last in ((0, third), (third + 1, 2 * third), (2 * third + 1, config.num_layers - 1)):
      span = Span(first_layer=first, last_layer=last, num_layers=config.num_layers)
      part = NeuroLLM.abstract(config, span=span, dtype=jnp.dtype(dtype))
      assert tree_bytes(part) == count.span_bytes(config, span, dtype=dtype, weights="dense")
    cache = jax.eval_shape(
      lambda c=config: NeuroLLM.abstract(c, dtype=dtype).new_cache(batch=1, capacity=256)
    )
    cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert cache_bytes == count.cache_bytes(config, config.num_layers, capacity=256, dtype=dtype)


# The page's table names parameters; `claim` is what it says, in billions. seed-1024 alone is near it.
SEED_TABLE = {
  "seed-1024": (0.294_9, 0.35),
  "seed-2048": (1.563, 3.5),
  "seed-3072": (4.533, 9.2),
  "seed-5120": (18.50, 45.0),
  "seed-7168": (48.04, 123.0),
}


@pytest.mark.parametrize("name", SEED_TABLE)
def test_the_seed_pages_parameter_table(name: str):
  """Our count of each row, by hand from the page's own formulas, beside what the page claims."""
  config = ModelConfig.named(name)
  h, f, n, k = config.model_dim, config.ffn_dim, config.num_heads, config.num_kv_heads
  by_hand = config.num_layers * (2 * h * h + 2 * h * h * k // n + 3 * h * f + 2 * h) + 50257 * h + h
  assert count.parameters(config) == by_hand
  billions, claim = SEED_TABLE[name]
  assert by_hand / 1e9 == pytest.approx(billions, rel=1e-3)
  assert claim > 1.15 * by_hand / 1e9, "the page overstates every row"


@pytest.mark.parametrize(("contracted", "output"), [(8, 4), (7, 5), (64, 1), (3, 130)])
def test_int8_bytes_equal_the_real_array(contracted: int, output: int):
  array = Int8Array.quantize(np.ones((contracted, output), np.float32), contracted_axes=1)
  assert array.nbytes == _matrix_bytes(contracted, output, "float32", "int8")


def packed_bytes(config: ModelConfig, span: Span, dtype: str, ternary: forms.Forms) -> int:
  """Bytes of the real tree with TernaryArrays, shapes in place of arrays, where `ternary` says."""
  tree = nnx.to_pure_dict(nnx.state(NeuroLLM.abstract(config, span=span, dtype=jnp.dtype(dtype))))
  total = 0
  names = [*params.layer_names(config), *params.outer_names(config, span)]
  for name, path in names:
    leaf = params.get(tree, path)
    if name not in ternary:
      total += leaf.size * leaf.dtype.itemsize
      continue
    lead, shape = (leaf.shape[:1], leaf.shape[1:]) if name in params.LAYER else ((), leaf.shape)
    axes = {"o_NHD": 2, "embedding_VD": -1}.get(name, 1)
    form = ternary[name]
    scale_dtype = {2: jnp.float16, 4: jnp.float32}[form.scale_bytes]
    array = TernaryArray(None, None, shape, axes, form.group_size)
    n, k = array.contraction.n, array.contraction.k
    groups = (1, 1) if form.group_size is None else (n, -(-k // form.group_size))
    array = dataclasses.replace(
      array,
      codes=jax.ShapeDtypeStruct((*lead, n, row_bytes(k)), jnp.uint8),
      scales=jax.ShapeDtypeStruct((*lead, *groups), scale_dtype),
    )
    assert array.shape == leaf.shape
    total += array.nbytes
  return total


MATRICES = ("q_DNH", "k_DKH", "v_DKH", "o_NHD", "gate_DF", "up_DF", "down_FD")
OUTER = ("embedding_VD", "head_DV")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("form", [Scales(64, 2), Scales(256, 2), Scales(None, 4)], ids=str)
@pytest.mark.parametrize("names", [MATRICES, (*MATRICES[2:], *OUTER), OUTER[1:]], ids=len)
def test_packed_bytes_equal_the_real_tree(path: Path, form: Scales, names: tuple[str, ...]):
  loaded = ModelConfig.load(path)
  ternary = {name: form for name in names}
  if "gate_DF" in ternary:
    ternary["gate_DF"] = Scales(128, 2)
  for tied in (True, False):
    config = dataclasses.replace(loaded, tied_embedding=tied)
    end = config.num_layers - 1
    for first, last in ((0, end), (0, 0), (1, 3), (end, end)):
      span = Span(first_layer=first, last_layer=last, num_layers=config.num_layers)
      counted = count.span_bytes(config, span, dtype="bfloat16", weights="w2a8", forms=ternary)
      assert counted == packed_bytes(config, span, "bfloat16", ternary)


def test_packed_bytes_cannot_be_counted_without_knowing_what_is_ternary():
  config = ModelConfig.load(CONFIGS[0])
  span = Span.whole(config)
  with pytest.raises(ValueError, match="are not given: see files"):
    count.span_bytes(config, span, dtype="float32", weights="w2a16")
  with pytest.raises(ValueError, match="choose 'dense' or 'int8'"):
    count.span_bytes(config, span, dtype="float32", weights="w2a16", forms={})
  # Whoever does not keep it packed need not know.
  for ternary in (None, {}, {"q_DNH": Scales(64, 2)}):
    dense = count.span_bytes(config, span, dtype="float32", weights="dense", forms=ternary)
    assert dense == 4 * count.parameters(config)


def test_parameters_of_published_models():
  folder = CONFIGS[0].parent
  qwen = count.parameters(ModelConfig.load(folder / "bonsai-8b.toml"))
  assert qwen == 8_190_735_360, "the published checkpoint's sum"
  assert count.parameters(ModelConfig.load(folder / "tinyllama-1.1b.toml")) == 1_100_048_384


@pytest.mark.parametrize("name", forms.TERNARY_FORMATS)
@given(config=configs())
@settings(max_examples=2, deadline=None)
def test_uniform_formats_equal_the_real_tree(name: str, config: ModelConfig):
  ternary = count.uniform_ternary(config, forms.TERNARY_FORMATS[name])
  span = Span.whole(config)
  counted = count.span_bytes(config, span, dtype="bfloat16", weights="w2a8", forms=ternary)
  assert counted == packed_bytes(config, span, "bfloat16", ternary)


def test_formats_of_files_have_the_scales_of_their_codecs():
  for name, codec in CODECS.items():
    assert forms.TERNARY_FORMATS[name] == Scales(codec.group_size, codec.scale_dtype.itemsize)


@given(config=configs(), first=st.integers(0, 5), length=st.integers(1, 6))
@settings(max_examples=6, deadline=None)
def test_any_span_of_any_architecture(config: ModelConfig, first: int, length: int):
  first %= config.num_layers
  last = min(first + length, config.num_layers) - 1
  span = Span(first_layer=first, last_layer=last, num_layers=config.num_layers)
  part = NeuroLLM.abstract(config, span=span, dtype=jnp.bfloat16)
  assert tree_bytes(part) == 2 * count.span_parameters(config, span)
