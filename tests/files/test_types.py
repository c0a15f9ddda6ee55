"""Every element type of ggml: the numbers are those of the gguf package, and stay in their width."""

import dataclasses
import math
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gguf import GGMLQuantizationType

from neurojax import count
from neurojax.config import Span
from neurojax.files.gguf.blocks import BLOCKS
from neurojax.files.load import load_span, stored_forms
from neurojax.files.open import open_model
from neurojax.forms import Grouped, Plain
from neurojax.model import params
from neurojax.weights.grouped import GroupedArray
from tests import tinymodel
from tests.files import blocks, tiny
from tests.files.oracle import Oracle

# What the package counts and does not decode.
OURS = ("Q1_0", "Q8_K")
IDS = [3, 1, 4, 1, 5]


def single(path: Path, kind: GGMLQuantizationType, raw: np.ndarray) -> Path:
  """A model file whose only matrix of this type is the embedding."""
  values = tiny.parameters(tiny.WIDE)
  return tiny.write_gguf(path, tiny.WIDE, values, raw={"embedding_VD": (raw, kind)})


@pytest.mark.parametrize("kind", sorted(BLOCKS.keys() - set(OURS)))
def test_integers_and_scales_stand_for_the_very_numbers(kind: str):
  raw = blocks.anything(kind, 6, 512)
  with np.errstate(all="raise"):
    # Scales of these bytes may be infinite or none, of which `check_finite` tells.
    found = BLOCKS[kind].rows(raw.reshape(-1), 6, 512)
  assert found.codes.max() < 1 << found.form.bits
  with np.errstate(all="ignore"):
    wanted = gguf.quants.dequantize(raw, GGMLQuantizationType[kind])
  np.testing.assert_array_equal(found.values(), wanted)


def test_types_that_the_package_does_not_decode():
  # block_q1_0: float16 d, then a bit per weight: d where it is set, else -d. block_q8_K: float32 d,
  # 256 int8, and sums that only products use.
  raw = blocks.modest("Q1_0", 1, 128)
  d = float(raw[0, :2].view("<f2")[0])
  bits = [raw[0, 2 + i // 8] >> i % 8 & 1 for i in range(128)]
  found = BLOCKS["Q1_0"].rows(raw.reshape(-1), 1, 128).values()
  np.testing.assert_array_equal(found[0], [d if bit else -d for bit in bits])
  raw = blocks.modest("Q8_K", 1, 256)
  d = float(raw[0, :4].view("<f4")[0])
  found = BLOCKS["Q8_K"].rows(raw.reshape(-1), 1, 256).values()
  np.testing.assert_array_equal(found[0], raw[0, 4:260].view(np.int8) * np.float32(d))


@pytest.mark.parametrize("kind", sorted(GGMLQuantizationType.__members__))
def test_every_type_of_the_package_is_read_or_named(tmp_path: Path, kind: str):
  qtype, shape = GGMLQuantizationType[kind], (8, 256)
  numbers = {"F64": "<f8", "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
  if kind in numbers:
    raw = np.arange(-1024, 1024).reshape(shape).clip(-128, 127).astype(numbers[kind])
    wanted = raw.astype(np.float32)
  elif kind in ("F32", "F16", "BF16"):
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    raw = gguf.quantize(values, qtype)
    wanted = gguf.quants.dequantize(raw, qtype)
  else:
    raw = blocks.modest(kind, *shape)
    if kind in ("TQ1_0", "TQ2_0"):
      raw = gguf.quantize(np.random.default_rng(0).standard_normal(shape, np.float32), qtype)
    if kind == "Q8_1":
      wanted = None
    elif kind in OURS:
      wanted = BLOCKS[kind].rows(raw.reshape(-1), *shape).values()
    else:
      wanted = gguf.quants.dequantize(raw, qtype)
  with open_model(single(tmp_path / "m.gguf", qtype, raw)) as file:
    if wanted is None:
      assert any(kind in problem for problem in file.problems())
      with pytest.raises(NotImplementedError, match=r"'token_embd\.weight' has the type Q8_1"):
        file.read("embedding_VD")
      return
    assert file.problems() == []
    np.testing.assert_array_equal(file.read("embedding_VD"), wanted)
    form = file.narrow_form("embedding_VD")
    if isinstance(form, Grouped):
      np.testing.assert_array_equal(file.read_grouped("embedding_VD").values(), wanted)
    if form is not None:
      # Nothing that is held as its file has it takes more than 16 bits a weight.
      assert form.matrix_bytes(256, 8) <= 2 * math.prod(shape)


# K-quants as llama-quantize mixes them over layers, 16-bit numbers, and blocks of 32.
MIXES = {
  "Q4_K and Q6_K": ("Q4_K", "Q6_K"), "Q8_0": ("Q8_0", "Q8_0"), "Q5_1 and Q4_0": ("Q5_1", "Q4_0"),
  "F16": ("F16", "F16"), "BF16": ("BF16", "BF16"),
}  # fmt: skip


@pytest.mark.parametrize("kinds", MIXES.values(), ids=MIXES)
def test_a_model_keeps_what_is_stored_and_computes_with_it(tmp_path: Path, kinds: tuple[str, str]):
  config = dataclasses.replace(tiny.WIDE, num_layers=2, tied_embedding=False)
  values = {name: 0.1 * value for name, value in tiny.parameters(config).items()}
  raw = {}
  for i, (name, value) in enumerate(values.items()):
    canonical, _, layer = name.partition("/")
    if params.is_matrix(canonical):
      kind, stored = kinds[int(layer or 0)], tiny.as_stored(value, name)
      qtype = GGMLQuantizationType[kind]
      plain = kind in ("F16", "BF16")
      data = gguf.quantize(stored, qtype) if plain else blocks.modest(kind, *stored.shape, seed=i)
      raw[name] = (data, qtype)
  tiny.write_gguf(tmp_path / "m.gguf", config, values, raw=raw)
  with open_model(tmp_path / "m.gguf") as file:
    forms = stored_forms(file)
    model = load_span(file, weights="stored")
    wanted_TV = Oracle(file).logits_TV(IDS)
    span = Span.whole(config)
    for part in (span, Span(first_layer=1, last_layer=1, num_layers=2)):
      loaded = model if part == span else load_span(file, part, weights="stored")
      assert tinymodel.parameter_bytes(loaded) == count.span_bytes(
        config, part, dtype="float32", weights="stored", forms=forms
      )
  assert set(forms) == {name.partition("/")[0] for name in raw}
  down = model.layers.ffn.down_FD.get_value()
  if kinds[0].endswith("F16"):
    assert forms["down_FD"] == Plain(down.dtype.name)
  else:
    assert isinstance(down, GroupedArray)
    assert down.form == forms["down_FD"]
  found_TV = np.asarray(nnx.jit(model)(jnp.array([IDS]))[0][0])
  assert np.abs(found_TV - wanted_TV).max() < 2e-5 * wanted_TV.std()


def test_a_scale_that_is_not_finite_is_refused_by_name(tmp_path: Path):
  raw = blocks.modest("Q4_0", 8, 256)
  raw[5, :2] = np.array([np.inf], "<f2").view(np.uint8)
  path = single(tmp_path / "m.gguf", GGMLQuantizationType.Q4_0, raw)
  wanted = r"'token_embd\.weight': row 5: a scale is NaN or infinite"
  with open_model(path) as file, pytest.raises(ValueError, match=wanted):
    load_span(file, weights="stored")
