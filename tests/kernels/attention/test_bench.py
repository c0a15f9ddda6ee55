"""The benchmark of attention, at a size that says nothing of speed."""

import pytest

from neurojax.kernels import timing
from neurojax.kernels.attention import bench
from neurojax.kernels.attention.bench import Case
from neurojax.kernels.attention.shapes import SMOLLM2_135M

# Rates this low make the loops short.
SLOW = timing.Rates(1e6, 1e6, 1e6)
CASES = [
  Case("decode", SMOLLM2_135M, 2, 24, 1),
  Case("chunk", SMOLLM2_135M, 1, 24, 8),
  Case("prompt", SMOLLM2_135M, 1, 16, 16),
]


def test_every_case_has_its_bound_and_a_baseline(monkeypatch):
  monkeypatch.setattr(bench, "_MOST_LAYERS", 2)
  rows = list(bench.run(CASES, rates=SLOW, runs=1))
  assert [(row.what, row.implementation) for row in rows] == [
    ("decode", "reference"), ("chunk", "reference"), ("prompt", "reference"),
  ]  # fmt: skip
  for row, case in zip(rows, CASES, strict=True):
    assert row.speedup == 1
    assert row.bytes_per_s * row.us == pytest.approx(case.nbytes * 1e6)
    assert row.flops_per_s * row.us == pytest.approx(case.flops * 1e6)
    assert row.bound_fraction * row.us == pytest.approx(row.bound_us)
  text = bench.report(rows)
  assert "smollm2-135m" in text and timing.origin()["jaxlib"] in text


def test_work_is_counted_by_keys_that_are_seen():
  decode, chunk, prompt = CASES
  heads = 4 * 9 * 64
  assert decode.flops == heads * 2 * 24
  assert chunk.flops == heads * sum(range(17, 25))
  assert prompt.flops == heads * sum(range(1, 17))
  assert decode.nbytes == 2 * 2 * 24 * 3 * 64 * 2


def test_what_is_no_measurement_is_refused():
  with pytest.raises(ValueError, match="at least 1"):
    next(bench.run([Case("decode", SMOLLM2_135M, 0, 8, 1)], rates=SLOW))
  with pytest.raises(ValueError, match=r"minutes on .*--shape"):
    next(bench.run(bench.cases(contexts=(4096,), batches=(64,)), rates=SLOW, most_s=60))
  assert all(case.length <= 512 for case in bench.cases())
