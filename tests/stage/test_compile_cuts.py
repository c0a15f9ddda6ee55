"""Stages of fused programs, compiled as users have them: the bits of any cut are those of the whole."""

from pathlib import Path

import pytest

from neurojax.stage.kernels import REFERENCE
from tests.stage.compiling import check_any_cut, write

pytestmark = pytest.mark.optimized


@pytest.mark.parametrize(
  ("family", "mode", "cut"),
  [("llama", "w2a16", ((0, 0), (1, 1), (2, 2))), ("qwen3", "w2a8", ((0, 1), (2, 2)))],
)
def test_any_cut_gives_the_whole_stages_bits(
  tmp_path: Path, family: str, mode: str, cut: tuple[tuple[int, int], ...]
):
  check_any_cut(write(tmp_path)[family], mode, REFERENCE, cut)
