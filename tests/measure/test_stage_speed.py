"""The benchmark of fused programs, at a size that says nothing of speed."""

import dataclasses

import jax
import numpy as np
import pytest

from neurojax import count
from neurojax.config import ModelConfig
from neurojax.kernels import timing
from neurojax.kernels.gemm import bench as gemm_bench
from neurojax.measure.speed import stage

pytestmark = pytest.mark.optimized

CONFIG = ModelConfig(
  vocab_size=256, model_dim=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32,
  ffn_dim=384, qk_norm=True, tied_embedding=False,
)  # fmt: skip
RATES = timing.Rates(read_bytes_per_s=2e9, copy_bytes_per_s=4e9, bf16_flops_per_s=8e9)


def test_rows_hold_together(monkeypatch):
  # Time says nothing here: a few distinct weights are enough, and compile sooner.
  monkeypatch.setattr(gemm_bench, "_MOST_WEIGHTS", 2)
  rows = list(
    stage.run(CONFIG, arch="tiny", batches=(2,), contexts=(3,), prompts=(16,), rates=RATES,
              steps=(1, 17), runs=3)
  )  # fmt: skip
  decode, prefill = rows
  assert (decode.what, decode.batch, decode.length) == ("decode", 2, 3)
  assert decode.tokens_per_s == pytest.approx(2e6 / decode.us)
  assert decode.weight_bytes_per_s == pytest.approx(decode.read_fraction * 2e9)
  assert (prefill.what, prefill.length) == ("prefill", 16)
  assert prefill.flops_per_s == pytest.approx(prefill.matmul_fraction * 8e9)
  for row in rows:
    assert row.bf16_us > 0 and row.speedup == pytest.approx(row.bf16_us / row.us)
  text = stage.report(rows)
  assert "tiny w2a8" in text and timing.origin()["date"] in text


@pytest.mark.parametrize("tied", [False, True])
def test_random_weights_are_ternary_and_as_large_as_the_plan_says(tied: bool):
  config = dataclasses.replace(CONFIG, tied_embedding=tied)
  model = stage.random_model(config, "w2a8", seed=3)
  codes = np.asarray(model.layers.gate_up.codes)
  fields = np.stack([codes >> shift & 3 for shift in (0, 2, 4, 6)])
  shares = np.bincount(fields.ravel(), minlength=4) / fields.size
  assert shares[3] == 0
  np.testing.assert_allclose(shares[:3], 1 / 3, atol=0.02)
  assert (codes[0] != codes[1]).any() and np.unique(np.asarray(model.head.scales)).size > 100
  c, s = config, model.layers.shape
  matrices = c.num_layers * sum(k * n for k, n in count.layer_matrices(c).values())
  matrices += (1 if tied else 2) * c.vocab_size * c.model_dim
  norms = 4 * (c.num_layers * 2 * (s.d + s.h) + s.d)
  # Two bits, and a float16 for 128 of them.
  assert model.nbytes == matrices * 17 // 64 + norms
  same = jax.tree.map(
    lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype),
    jax.eval_shape(lambda: stage.random_model(config, "w2a8")), model,
  )  # fmt: skip
  assert all(jax.tree.leaves(same))


def test_what_is_no_measurement_is_refused(tmp_path):
  with pytest.raises(ValueError, match="batch"):
    list(stage.run(CONFIG, arch="tiny", batches=(0,), rates=RATES))
  with pytest.raises(ValueError, match="groups of 128"):
    stage.random_model(dataclasses.replace(CONFIG, ffn_dim=320), "w2a8")
  rows = [RATES]
  path = tmp_path / "results" / "x.csv"
  timing.append_csv(path, rows)
  timing.append_csv(path, rows)
  assert path.read_text().splitlines()[1:] == ["2e+09,4e+09,8e+09"] * 2
  with pytest.raises(ValueError, match="columns"):
    timing.append_csv(path, [CONFIG])
  # A file whose last line was cut, an empty one, and one that is no text.
  path.write_bytes(path.read_bytes().rstrip())
  timing.append_csv(path, rows)
  assert path.read_text().splitlines()[1:] == ["2e+09,4e+09,8e+09"] * 3
  path.write_bytes(b"")
  timing.append_csv(path, rows)
  assert len(path.read_text().splitlines()) == 2
  path.write_bytes(b"\xff\xfe")
  with pytest.raises(ValueError, match=r"x\.csv: not a results file"):
    timing.append_csv(path, rows)
