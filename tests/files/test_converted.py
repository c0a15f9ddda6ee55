"""Files that others made of tiny models: the logits of transformers."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from neurojax.files.load import load_span, ternary_matrices
from neurojax.files.open import open_model

GOLDEN = Path(__file__).parents[1] / "golden" / "converted"
FILES = sorted(GOLDEN.glob("*.gguf"))


def test_every_family_that_the_converter_knows_is_there() -> None:
  with np.load(GOLDEN / "logits.npz") as golden:
    assert {path.stem for path in FILES} == set(golden.files) - {"tokens"}
  assert len(FILES) == 9


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_logits(path: Path) -> None:
  with np.load(GOLDEN / "logits.npz") as golden:
    tokens, wanted = golden["tokens"], golden[path.stem]
  with open_model(path) as model:
    model.check()
    found = np.asarray(load_span(model)(jnp.asarray(tokens)[None])[0][0])
  # The positions lie past the windows and past what yarn and llama3 take for the trained length.
  assert len(tokens) == 40 and np.abs(wanted).max() > 1
  assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


BITNET = GOLDEN.parent / "bitnet"


@pytest.mark.parametrize("name", ["bitlinear", "offline", "online"])
def test_ternary_folders_compute_what_transformers_modules_do(name: str) -> None:
  with np.load(BITNET / "logits.npz") as golden:
    tokens, wanted = golden["tokens"], golden[name]
  with open_model(BITNET / name) as model:
    model.check()
    assert set(ternary_matrices(model)) == {
      "q_DNH", "k_DKH", "v_DKH", "o_NHD", "gate_DF", "up_DF", "down_FD",
    }  # fmt: skip
    # Activations rounded to 8 bits, as transformers' modules round them.
    found = np.asarray(load_span(model, weights="w2a8")(jnp.asarray(tokens)[None])[0][0])
  assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
