"""A notebook that switched JAX to 64-bit numbers hears of it before anything is computed."""

import jax
import pytest

from neurojax.model.neurollm import NeuroLLM
from tests import tinymodel


def test_64_bit_numbers_are_refused_with_the_way_out():
  with jax.enable_x64(True), pytest.raises(ValueError, match="jax_enable_x64"):
    NeuroLLM.abstract(tinymodel.CONFIG)
  NeuroLLM.abstract(tinymodel.CONFIG)
