"""The cuts of products that are timed: kernels take them, and they add up in one order."""

import pytest

from experiments.gpu_tiles import run
from neurojax.kernels.gemm import mosaic, shapes, tuned
from neurojax.stage import rounded
from neurojax.stage.kernels import Kernels


@pytest.mark.parametrize("m", [1, 8, 64, 256])
@pytest.mark.parametrize("matrix", shapes.QWEN3_8B, ids=str)
def test_candidates_divide_their_product(matrix: shapes.Matrix, m: int):
  parts = run.parts_of(matrix, m)
  found = list(run.candidates(matrix, m, parts))
  assert found[0][0] == "mosaic" and len(found) > 1
  assert len({str(candidate) for candidate in found}) == len(found)
  for by, fields in found:
    assert fields["split"] == parts
    if by == "mosaic":
      cut = mosaic.Tiling(**fields)
      assert matrix.n % cut.n == 0 and matrix.k % (cut.k * parts) == 0
      assert cut.stages * (cut.n * cut.k // 4 + cut.m * cut.k) <= run.SHARED_BYTES
    else:
      assert matrix.k % (4 * fields["y"] * parts) == 0


def test_programs_take_what_was_measured(monkeypatch):
  o = shapes.QWEN3_8B[1]
  for candidate in run.candidates(o, 8, 4):
    entry = run.entry_of(o, 8, candidate)
    monkeypatch.setattr(tuned, "load", lambda device, entry=entry: (entry,))
    w = run.weights_of(o, 1)
    by, arguments = rounded.choose(8, w, Kernels(device="a card", invariant=True), parts=4)
    [found] = arguments.values()
    assert (by, vars(found)) == candidate
