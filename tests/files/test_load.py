"""From a file to the parameters of a span: the right tensors, in the right form, and no others."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from neurojax.config import Span
from neurojax.files.load import load_span, parameter_bytes
from neurojax.files.source import open_model
from neurojax.scaling import count
from neurojax.stage.cut import cut
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
  assert parameter_bytes(part) == wanted


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
