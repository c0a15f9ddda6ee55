"""Training goes on from a model file."""

import dataclasses

import jax
import numpy as np
import pytest

from neurojax.train.pretrained import from_file
from neurojax.train.step import init_state
from tests.files import tiny as files
from tests.train import tiny


@pytest.fixture
def path(tmp_path):
  return files.write_gguf(tmp_path / "m.gguf", files.BITNET, files.parameters(files.BITNET))


def test_all_weights_are_the_files(path):
  config = tiny.config(
    model=dataclasses.replace(files.BITNET, context_length=16), init_from=str(path), batch_size=8
  )
  state = init_state(config, tiny.mesh(config))
  for name, value in files.parameters(files.BITNET).items():
    canonical, _, layer = name.partition("/")
    found = state.params[canonical]
    np.testing.assert_array_equal(found[int(layer)] if layer else found, value, err_msg=name)
  assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}
  assert state.step == 0


def test_another_architecture_is_named(path):
  other = dataclasses.replace(files.BITNET, sub_norm=False)
  with pytest.raises(ValueError, match=r"m\.gguf: sub_norm = True, and the run's model has False"):
    from_file(path, other)
