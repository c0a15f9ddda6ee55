"""Names that stand for no model are refused with a short error."""

import pytest

from neurojax.files.described import described
from neurojax.files.find import model_path


@pytest.mark.parametrize("suffix", ["", ".gguf"])
def test_a_name_longer_than_a_path_may_be_is_cut(suffix: str):
  with pytest.raises(FileNotFoundError, match=r"^x{60}[.]{3}: no such file") as caught:
    model_path("x" * 5000 + suffix)
  assert len(str(caught.value)) < 200


def test_an_empty_name_is_refused():
  with pytest.raises(ValueError, match="give a model"):
    model_path("")


def test_a_name_that_stands_for_no_architecture_either():
  with pytest.raises(
    ValueError, match=r"^model 'nope': no such file, .* no architecture of this name"
  ):
    described("nope")
  with pytest.raises(ValueError, match=r"^model 'x{60}[.]{3}'") as caught:
    described("x" * 5000)
  assert "x" * 61 not in str(caught.value)
