"""Every family against transformers: tiny models through the loader of folders, past windows and past the
length before rotary scaling."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurojax.files.load import load_span
from neurojax.files.open import open_model
from neurojax.measure.quality.logits import logits
from neurojax.model.neurollm import NeuroLLM
from neurojax.stage.compile import CompiledStage
from tests.golden.families import recipe

NAMES = sorted(path.stem for path in recipe.HERE.glob("*.npy"))


def load(folder: Path, name: str) -> NeuroLLM:
  with open_model(recipe.write_folder(folder, name)) as file:
    return load_span(file)


def error(found: np.ndarray, wanted: np.ndarray) -> float:
  """Of the worst row, relative to its length."""
  return (np.linalg.norm(found - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)).max()


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(tmp_path: Path, name: str):
  wanted = np.load(recipe.HERE / f"{name}.npy")
  model = load(tmp_path, name)
  tokens = recipe.tokens(model.config.vocab_size)
  # A prompt of two calls, the second padded, and 64 tokens one by one.
  stage = CompiledStage(model, context_length=len(tokens), buckets=(1, 32))
  assert error(logits([stage], tokens, decode_from=recipe.PROMPT), wanted) < 1e-4
  if name in ("gemma3", "gemma4", "lfm2"):
    # All at once, without a cache.
    whole, _ = jax.jit(lambda model, ids: model(ids))(model, jnp.asarray(tokens)[None])
    assert error(np.asarray(whole[0]), wanted) < 1e-4
