"""`neurojax bench`: rows are shown as they come, and on a CPU what is not named is small."""

import dataclasses
from pathlib import Path

import pytest

from neurojax.cli import main
from neurojax.kernels import timing
from neurojax.kernels.attention import bench as attention
from neurojax.kernels.gemm import bench as gemm

RATES = {"read_bytes_per_s": 1e9, "copy_bytes_per_s": 2e9, "bf16_flops_per_s": 3e9}


def row(n: int) -> gemm.Row:
  return gemm.Row(
    n=n, k=128, rows=1, weights="w2a8", implementation="cpu", us=8.0, bytes_per_s=1e8,
    flops_per_s=1e9, read_fraction=0.1, matmul_fraction=0.25, speedup=1.5, **RATES, **timing.origin(),
  )  # fmt: skip


def test_a_row_is_shown_and_stored_before_the_next_is_measured(capsys, monkeypatch, tmp_path: Path):
  seen = []

  def measured(products, rows, modes, **options):
    yield row(111)
    seen.append((*capsys.readouterr(), (tmp_path / "out.csv").read_text()))
    yield row(222)

  monkeypatch.setattr(gemm, "run", measured)
  assert main(["bench", "gemm", "--out", str(tmp_path / "out.csv")]) == 0
  [(shown, said, stored)] = seen
  assert "111x128" in shown and "111,128" in stored and "222" not in shown + stored
  for part in (
    timing.device_name(),
    f"jax {row(1).jax}",
    f"jaxlib {row(1).jaxlib}",
    "read 1.0 GB/s",
  ):
    assert part in shown
  # The bound is a quarter of the time.
  assert "2.0" in shown.splitlines()[-1] and "25%" in shown
  assert "on a CPU what is not named is small: --shapes 2048x2048" in " ".join(said.split())
  out = capsys.readouterr().out
  assert "222x128" in out and "111x128" not in out


@pytest.mark.parametrize(
  ("argv", "named"),
  [
    (["gemm", "--shapes", "24576x4096", "--rows", "2048"], "fewer --rows"),
    (
      ["attention", "--shape", "qwen3-8b", "--batch", "512", "--context", "131072"],
      "shorter --context",
    ),
    (["attention", "--shape", "gpt-9"], "qwen3-8b, llama3.2-1b"),
    (["decode", "--arch", "bonsai-8b", "--random"], "a smaller --arch"),
  ],
)
def test_what_is_too_large_for_a_cpu_is_refused_at_the_door(capsys, monkeypatch, argv, named):
  monkeypatch.setattr(timing, "rates", lambda: timing.Rates(1e10, 1e10, 1e11))
  assert main(["bench", *argv]) == 2
  assert named in " ".join(capsys.readouterr().err.split())


def test_attention_prints_its_bound(capsys, monkeypatch):
  monkeypatch.setattr(timing, "rates", lambda: timing.Rates(1e6, 1e6, 1e6))
  monkeypatch.setattr(
    attention, "cases", lambda *_: [attention.Case("decode", attention.SMOLLM2_135M, 1, 8, 1)]
  )
  assert main(["bench", "attention", "--repetitions", "1"]) == 0
  out = capsys.readouterr().out
  assert "bound us" in out and "smollm2-135m" in out and timing.device_name() in out
  assert len(dataclasses.fields(attention.Row)) == 19
