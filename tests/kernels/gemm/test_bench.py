"""The benchmark of products, at a size that says nothing of speed."""

import pytest

from neurojax.kernels import timing
from neurojax.kernels.gemm import bench


def test_every_implementation_has_a_row_beside_xla():
  rates = timing.rates(1 << 22, 128)
  assert rates.read_bytes_per_s > 0 and rates.bf16_flops_per_s > 0
  # Rates this low make the loops short.
  slow = timing.Rates(1.0, 1.0, 1.0)
  told = []
  bench_rows = list(
    bench.run(((256, 128),), (2,), ("w2a8",), rates=slow, runs=1, skipped=told.append)
  )
  assert bench_rows[0].implementation == "xla" and bench_rows[0].speedup == 1
  assert {row.implementation for row in bench_rows[1:]} | {t.split()[-1] for t in told}
  for row in bench_rows:
    assert row.flops_per_s == pytest.approx(2 * 2 * 256 * 128 / row.us * 1e6)
  assert bench_rows[0].bytes_per_s * bench_rows[0].us == pytest.approx(2 * 256 * 128 * 1e6)
  assert "256x128" in bench.report(bench_rows)


def test_a_shape_without_size_is_refused():
  with pytest.raises(ValueError, match="positive"):
    next(bench.run(((0, 128),), (1,)))


def test_what_would_take_minutes_is_refused_with_the_way_on():
  rates = timing.Rates(1e10, 1e10, 1e11)
  with pytest.raises(ValueError, match=r"minutes on .*--shapes"):
    next(bench.run(((24576, 4096),), (2048,), rates=rates, most_s=60))


def test_a_cpu_measures_small_products_by_default():
  products, rows = bench.defaults()
  assert max(n * k for n, k in products) < 2**24 and max(rows) <= 8
