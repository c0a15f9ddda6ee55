"""`neurojax bench train`: a row for each recipe, and what its numbers are of."""

import csv
import dataclasses

import pytest

from neurojax import count
from neurojax.cli import USAGE, main
from neurojax.config import to_toml
from neurojax.kernels import timing
from tests.train import tiny


def test_a_row_for_the_twin_and_one_for_ternary_weights(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(timing, "rates", lambda: timing.Rates(1e9, 1e9, 1e10))
  model = dataclasses.replace(tiny.MODEL, num_layers=1)
  (tmp_path / "one-layer.toml").write_text(to_toml(model))
  out = tmp_path / "rows.csv"
  command = ["bench", "train", "--arch", str(tmp_path / "one-layer.toml"), "--batch", "2"]
  command += ["--seq-len", "16", "--group-size", "0", "--steps", "1", "--repetitions", "1"]
  assert main([*command, "--remat", "none", "--out", str(out)]) == 0
  with out.open() as lines:
    twin, ternary = csv.DictReader(lines)
  assert (twin["weights"], ternary["weights"]) == ("none", "ternary")
  assert twin["overhead"] == "" and twin["mfu"] == "" and ternary["group_size"] == ""
  flops = count.flops_per_token(model, context=16, mode="train")
  for row in (twin, ternary):
    assert int(row["flops_per_token"]) == flops
    assert float(row["tokens_per_s"]) == pytest.approx(32 / float(row["step_ms"]) * 1e3, rel=1e-4)
    reached = flops * float(row["tokens_per_s"]) / float(row["matmul_flops_per_s"])
    assert float(row["matmul_fraction"]) == pytest.approx(reached, rel=1e-3)
  shown = capsys.readouterr().out
  assert "ternary tensor int8" in shown and "6 N + causal attention" in shown


def test_nothing_to_measure_is_said(capsys):
  assert main(["bench", "train", "--arch", "neurollm-3m", "--batch", "0"]) == USAGE
  assert "--batch 0: at least 1" in capsys.readouterr().err
