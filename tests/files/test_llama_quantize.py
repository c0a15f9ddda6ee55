"""Files of llama.cpp's own tool: their numbers are what it expands them to, and so are the logits.

The golden file is always tested. NEUROJAX_LLAMA_QUANTIZE names llama.cpp's llama-quantize, and
NEUROJAX_LLAMA_PYTHON a Python that has llama-cpp-python: with them, files of every type are made anew.
"""

import dataclasses
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from neurojax.files.load import load_span, ternary_matrices
from neurojax.files.model_file import ModelFile
from neurojax.files.open import open_model
from neurojax.weights.ternary import TernaryArray
from tests.golden.llama_quantize import make

QUANTIZE = os.environ.get("NEUROJAX_LLAMA_QUANTIZE")
PYTHON = os.environ.get("NEUROJAX_LLAMA_PYTHON")
needs_llama_cpp = pytest.mark.skipif(
  QUANTIZE is None or PYTHON is None,
  reason="NEUROJAX_LLAMA_QUANTIZE and NEUROJAX_LLAMA_PYTHON do not name llama.cpp's programs",
)
# IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S and IQ3_XXS are left out: it makes none without a matrix of importance.
TYPES = (
  "TQ1_0", "TQ2_0", "Q2_0", "Q1_0", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_S", "Q6_K", "Q4_0", "Q4_1",
  "Q5_0", "Q5_1", "Q8_0", "IQ3_S", "IQ4_NL", "IQ4_XS", "F16", "BF16",
)  # fmt: skip


def ours(file: ModelFile, weights: str) -> np.ndarray:
  model = load_span(file, weights=weights)
  return np.asarray(nnx.jit(model)(jnp.array([make.IDS]))[0][0])


@pytest.mark.parametrize("weights", ["dense", "w2a16", "stored"])
def test_the_golden_file_gives_the_logits_of_llama_cpp(weights: str):
  with open_model(make.FILE) as file:
    assert {info.type for info in file.tensors.values()} == {
      "TQ1_0", "TQ2_0", "Q2_0 (group 64)", "F32",
    }  # fmt: skip
    assert len(ternary_matrices(file)) == 8
    found_TV, model = ours(file, weights), load_span(file, weights=weights)
  is_packed = isinstance(model.layers.ffn.down_FD.get_value(), TernaryArray)
  assert is_packed == (weights != "dense")
  wanted_TV = np.load(make.LOGITS)
  assert np.abs(found_TV - wanted_TV).max() < 3e-5 * wanted_TV.std()


@needs_llama_cpp
@pytest.mark.parametrize("kind", TYPES)
def test_a_file_of_llama_quantize(tmp_path: Path, kind: str):
  config = dataclasses.replace(make.CONFIG, num_layers=2, tied_embedding=False)
  source = make.write_float(tmp_path / "f32.gguf", config)
  made = make.quantize(str(QUANTIZE), source, tmp_path / "made.gguf", kind)
  expanded = make.quantize(str(QUANTIZE), made, tmp_path / "expanded.gguf", "F32")
  with open_model(made) as file, open_model(expanded) as floats:
    assert {info.type for info in floats.tensors.values()} == {"F32"}
    assert any(info.type.startswith(kind.partition("_K")[0]) for info in file.tensors.values())
    for name in ("embedding_VD", "head_DV"):
      np.testing.assert_array_equal(file.read(name), floats.read(name))
    for layer in range(2):
      for name in ("q_DNH", "k_DKH", "v_DKH", "o_NHD", "gate_DF", "up_DF", "down_FD"):
        np.testing.assert_array_equal(file.read(name, layer), floats.read(name, layer))
    wanted_TV = make.logits(str(PYTHON), expanded, make.IDS)
    found_TV = ours(file, "stored")
  assert np.abs(found_TV - wanted_TV).max() < 1e-4 * wanted_TV.std()
