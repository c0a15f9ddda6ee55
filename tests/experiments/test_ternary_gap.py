"""The runs that the experiment asks for, its bookkeeping with a stand-in for training, and its fits."""

import csv
import dataclasses
import itertools
import math
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest

from experiments.ternary_gap import figure, fit, plan, run
from experiments.ternary_gap.plan import Plan, Row, Run
from neurojax import count
from neurojax.cli import main
from neurojax.config import from_dict
from neurojax.scaling.presets import PRESETS
from neurojax.train.config import TrainConfig
from neurojax.train.run_folder import differences
from neurojax.train.settings import merged

PLAN = Plan.load()

STAND_IN = """
import json, os, signal, sys, time
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
workdir, steps = options["--workdir"], int(options["--steps"])
os.makedirs(workdir + "/checkpoints", exist_ok=True)
path = workdir + "/metrics.jsonl"
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
def write(**record):
  with open(path, "a") as out:
    out.write(json.dumps(record) + chr(10))
with open(workdir + "/data.json", "w") as out:
  json.dump({"identity": os.path.basename(options["--data.folder"]) * 12}, out)
with open(workdir + "/env.json", "w") as out:
  versions = {"jax": "1", "jaxlib": "1", "optax": "1"}
  json.dump([{"time": "2026-01-02T03", "versions": versions, "commit": None}], out)
begins = sum(1 for _ in open(path)) if os.path.exists(path) else 0
mode = os.environ.get("STAND_IN", "")
if mode == "crash":
  sys.exit("no such thing")
for step in range(begins + 1, steps + 1):
  if mode == "diverges" and step == 5:
    write(step=step, loss=None, finite=False, verdict="back")
    sys.exit(1)
  write(step=step, loss=float(step), tokens_per_s=100.0 + step)
  if mode == "slow":
    time.sleep(0.02)
  if asked:
    sys.exit(143)
write(event="evaluation", step=steps, valid_loss=3.5, valid_tokens=7)
"""


@pytest.fixture
def small() -> Plan:
  return dataclasses.replace(PLAN, steps=60, warmup_steps=5)


@pytest.fixture
def runner(tmp_path: Path, small: Plan):
  script = tmp_path / "stand_in.py"
  script.write_text(STAND_IN)

  def make(**more) -> run.Runner:
    given = {"data": tmp_path / "d", "workdir": tmp_path / "runs", "results": tmp_path / "r.csv"}
    given["program"] = (sys.executable, str(script))
    return run.Runner(small, **(given | more))

  return make


def resolved(one: Run) -> TrainConfig:
  arguments = one.arguments(PLAN, Path("data"), Path("work"))
  table = tomllib.loads(Path(arguments[2]).read_text(encoding="utf-8"))
  overrides = [*arguments[5:]]
  return from_dict(TrainConfig, merged(table, overrides, TrainConfig))


def test_every_run_is_on_the_same_tokens_and_twins_differ_in_what_they_should():
  runs = PLAN.runs()
  assert len(set(runs)) == len(runs) and len({r.size for r in runs}) >= 4
  for one in runs:
    config = resolved(one)
    assert config.model == PRESETS[f"neurollm-{one.size}"][1]
    assert config.steps * config.tokens_per_step == PLAN.tokens
    assert config.optimizer.peak_lr == one.learning_rate
    assert config.data == resolved(runs[0]).data
    other = resolved(dataclasses.replace(one, weights="bf16"))
    names = {name for name, _, _ in differences(other, config)}
    differs = {"quantization.weights", "quantization.group_size", "quantization.activations"}
    assert names == (
      differs | {"optimizer.second_weight_decay"} if one.weights == "ternary" else set()
    )


def test_each_size_has_three_rates_and_both_weights_the_same():
  for size in PLAN.sizes:
    assert len(set(size.learning_rates)) >= 3
    rates = [
      {r.learning_rate for r in PLAN.runs() if (r.size, r.weights) == (size.name, weights)}
      for weights in plan.WEIGHTS
    ]
    assert rates[0] == rates[1]
  # The table of all sizes comes before other learning rates.
  first = PLAN.runs()[: 2 * len(PLAN.sizes)]
  assert {(r.size, r.weights) for r in first} == set(
    itertools.product([s.name for s in PLAN.sizes], plan.WEIGHTS)
  )


def test_the_command_line_takes_the_options(capsys: pytest.CaptureFixture[str]):
  arguments = Run("3m", "ternary", 6e-3, 2).arguments(PLAN, Path("data"), Path("work"))
  assert main([*arguments, "--show"]) == 0
  shown = from_dict(TrainConfig, tomllib.loads(capsys.readouterr().out))
  assert shown == resolved(Run("3m", "ternary", 6e-3, 2)) and shown.seed == 2


def test_a_finished_run_is_a_row_and_is_not_run_again(runner, small: Plan, tmp_path: Path):
  runs = [r for r in small.runs() if r.size == "3m"][:4]
  first = runner(jobs=2)
  assert first.go(runs) == 0 and not first.failed
  rows = plan.read(tmp_path / "r.csv")
  assert {row.run for row in rows} == set(runs)
  row = next(row for row in rows if row.run == runs[0])
  model = PRESETS["neurollm-3m"][1]
  assert row.parameters == count.parameters(model)
  assert row.non_embedding == row.parameters - 8192 * 256
  assert (row.train_loss, row.valid_loss) == (np.mean(range(11, 61)), 3.5)
  assert (row.tokens, row.tokens_per_s) == (60 * 65536, 130)
  assert not list((tmp_path / "runs").glob("*/checkpoints"))
  before = (tmp_path / "r.csv").read_bytes()
  again = runner(program=("false",))
  assert again.go(runs) == 0
  # Nor where the row was lost, as on a machine whose results did not come back.
  (tmp_path / "r.csv").unlink()
  again = runner(program=("false",), jobs=2)
  assert again.go(runs) == 0 and not again.failed
  assert (tmp_path / "r.csv").read_bytes() == before


def test_time_that_is_up_ends_a_run_which_goes_on_later(
  runner, small: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setenv("STAND_IN", "slow")
  monkeypatch.setattr(run, "_LEAST_S", 0)
  runs = small.runs()[:2]
  cut = runner(seconds=0.6)
  began = time.monotonic()
  assert cut.go(runs) == 2 and not cut.failed
  assert time.monotonic() - began < 30
  metrics = tmp_path / "runs" / runs[0].name / "metrics.jsonl"
  if metrics.exists():
    assert 0 < len(metrics.read_text().splitlines()) <= 60
  monkeypatch.delenv("STAND_IN")
  assert runner().go(runs) == 0
  steps, _ = plan._records(metrics)
  assert [record["step"] for record in steps] == list(range(1, 61))


def test_a_run_that_diverges_is_kept_and_one_that_fails_is_named(
  runner, small: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
  monkeypatch.setenv("STAND_IN", "diverges")
  runs = small.runs()[:1]
  assert runner().go(runs) == 0
  (row,) = plan.read(tmp_path / "r.csv")
  assert row.outcome == "diverged" and row.valid_loss is None and row.train_loss is None
  monkeypatch.setenv("STAND_IN", "crash")
  other = runner()
  assert other.go(small.runs()[:2]) == 1
  assert other.failed == [small.runs()[1].name]
  assert "no such thing" in capsys.readouterr().err


def test_a_folder_of_other_options_and_other_data_are_refused(
  runner, small: Plan, tmp_path: Path, capsys
):
  runs = small.runs()[:2]
  assert runner().go(runs[:1]) == 0
  (tmp_path / "r.csv").rename(tmp_path / "old.csv")
  (tmp_path / "runs" / f"{runs[0].name}.json").write_text("{}")
  refused = runner()
  assert refused.go(runs[:1]) == 1 and refused.failed
  (tmp_path / "old.csv").rename(tmp_path / "r.csv")
  refused = runner(data=tmp_path / "e")
  assert refused.go(runs) == 1 and "do not compare" in capsys.readouterr().err


def test_wrong_words_are_named():
  for arguments in (
    ["--data", "x"], ["--data", "x", "--sizes", "5m"], ["--data", "x", "--only", "3m", "int4", "1e-3"], ["--sizes", "3m"]
  ):  # fmt: skip
    with pytest.raises(SystemExit, match="ternary_gap: "):
      run.main(arguments)


def test_the_estimate_counts_what_is_missing():
  runs = PLAN.runs()
  seconds = float(run.estimate(PLAN, runs, []).split("in all ")[1].split()[0])
  assert 30 < seconds < 60
  rows = made(lambda n, w: 3.0)
  assert "in all 0.0 minutes" in run.estimate(PLAN, [row.run for row in rows], rows)
  assert "1,000 tokens/s (measured)" in run.estimate(PLAN, runs, rows)


def made(loss, *, seeds=(0,), slip: float = 0.0) -> list[Row]:
  """Rows with a known loss; learning rates other than the middle one lose `slip` each."""
  found = []
  for size, weights, seed in itertools.product(PLAN.sizes, plan.WEIGHTS, seeds):
    model = size.model
    n = count.parameters(model)
    for i, rate in enumerate(size.learning_rates):
      value = loss(n, weights) + slip * (i != 0) + 0.01 * seed
      found.append(
        Row(
          size=size.name, parameters=n, non_embedding=n - 8192 * model.model_dim, weights=weights,
          lr=rate, seed=seed, tokens=PLAN.tokens, train_loss=value, valid_loss=value, valid_tokens=9,
          outcome="done", skipped=0, tokens_per_s=1000.0, at_once=1, data="d", device="none",
          jax="0", jaxlib="0", optax="0", commit="", date="2026-01-01",
        )
      )  # fmt: skip
  return found


SIZES = [count.parameters(size.model) for size in PLAN.sizes]


@pytest.mark.parametrize("E, A, alpha", [(2.0, 3.0, 0.35), (0.0, 5.0, 0.1), (3.2, 1.0, 1.4)])
def test_losses_of_a_law_give_its_coefficients(E: float, A: float, alpha: float):
  losses = [E + A * (n / 1e6) ** -alpha for n in SIZES]
  found = fit.fit(SIZES, losses)
  np.testing.assert_allclose([found.E, found.A, found.alpha], [E, A, alpha], atol=2e-4)
  fixed = fit.fit(SIZES, losses, alpha)
  np.testing.assert_allclose([fixed.E, fixed.A], [E, A], atol=1e-9)
  assert fit.fit(SIZES, losses, alpha * 2).alpha == alpha * 2


def test_a_floor_below_zero_is_not_given_and_too_few_points_are_refused():
  falling = [4.0 - 0.9 * math.log10(n / 1e6) for n in SIZES]
  assert fit.fit(SIZES, falling, 0.1).E == 0 and fit.fit(SIZES, falling).E == 0
  with pytest.raises(ValueError, match="2 sizes"):
    fit.fit(SIZES[:2], falling[:2])


def test_intervals_hold_the_truth_as_often_as_they_say():
  truth = fit.Coefficients(E=2.0, A=3.0, alpha=0.35)
  rng = np.random.default_rng(1)
  hits = 0
  for trial in range(40):
    losses = truth.loss(np.array(SIZES)) + 0.01 * rng.standard_normal(len(SIZES))
    samples = fit.bootstrap(SIZES, fit.fit(SIZES, losses, 0.35), 0.01, 0.35, seed=trial)
    low, high = np.quantile(samples[:, 0], (0.025, 0.975))
    hits += low <= truth.E <= high
  assert hits >= 34


def test_the_bootstraps_spread_is_that_of_the_linear_model():
  # With alpha given E and A are linear in the losses: their covariance is known.
  samples = fit.bootstrap(SIZES, fit.Coefficients(E=2.0, A=3.0, alpha=0.3), 0.01, 0.3)
  x_PC = np.stack([np.ones(len(SIZES)), (np.array(SIZES) / 1e6) ** -0.3], axis=1)
  expected = 0.01**2 * np.linalg.inv(x_PC.T @ x_PC)
  np.testing.assert_allclose(np.cov(samples[:, :2].T), expected, rtol=0.1)
  # Student's with 8 degrees of freedom has 8 / 6 of the variance.
  wider = fit.bootstrap(SIZES, fit.Coefficients(E=2.0, A=3.0, alpha=0.3), 0.01, 0.3, degrees=8)
  np.testing.assert_allclose(np.cov(wider[:, :2].T), expected * 8 / 6, rtol=0.15)
  free = fit.bootstrap(SIZES, fit.Coefficients(E=2.0, A=3.0, alpha=0.3), 0.01)
  assert np.all(free.std(axis=0)[:2] > samples.std(axis=0)[:2])


def test_the_best_rate_is_taken_and_an_edge_is_said():
  rows = made(lambda n, w: 3.0, slip=0.1)
  best = fit.best(rows, "10m", "bf16")
  assert best and best.row.lr == PLAN.size("10m").learning_rates[0] and not best.at_edge
  rates = PLAN.size("10m").learning_rates
  kept = [row for row in rows if row.size != "10m" or row.lr <= rates[0]]
  assert fit.best(kept, "10m", "bf16").at_edge
  # Of several seeds the mean counts; a rate with a run that diverged does not.
  first = next(row for row in rows if (row.size, row.weights, row.lr) == ("10m", "bf16", rates[0]))
  unlucky = fit.best([*rows, dataclasses.replace(first, seed=1, valid_loss=3.4)], "10m", "bf16")
  assert unlucky.row.lr != rates[0] and unlucky.loss == pytest.approx(3.1) and unlucky.seeds == 1
  lucky = fit.best([*rows, dataclasses.replace(first, seed=1, valid_loss=3.1)], "10m", "bf16")
  assert lucky.row.lr == rates[0] and lucky.loss == pytest.approx(3.05) and lucky.seeds == 2
  burst = fit.best([*rows, dataclasses.replace(first, seed=1, valid_loss=None)], "10m", "bf16")
  assert burst.row.lr != rates[0]
  gone = [dataclasses.replace(row, valid_loss=None) for row in rows]
  assert fit.best(gone, "10m", "bf16") is None


def test_noise_is_that_between_seeds_or_said_to_be_assumed():
  assumed = fit.noise(made(lambda n, w: 3.0), PLAN)
  assert assumed.loss == PLAN.assumed_sd and "assumed" in assumed.source
  seen = fit.noise(made(lambda n, w: 3.0, seeds=(0, 1, 2)), PLAN)
  rates = sum(len(size.learning_rates) for size in PLAN.sizes)
  assert seen.degrees == (3 - 1) * 2 * rates and seen.loss == pytest.approx(0.01)
  assert seen.of_mean(4) == pytest.approx(0.005)


def test_the_gaps_noise_is_that_of_its_two_means():
  rows = made(lambda n, w: 3.0, seeds=(0, 1, 2))
  kept = [row for row in rows if row.weights == "ternary" or row.seed < 1]
  sd = fit.noise(kept, PLAN).loss
  for gap in fit.gaps(kept, PLAN):
    assert (gap["ternary_seeds"], gap["bf16_seeds"]) == (3, 1)
    assert float(gap["gap_sd"]) == pytest.approx(sd * math.sqrt(1 / 3 + 1), rel=1e-4)


def test_gap_and_its_slope():
  rows = made(lambda n, w: 3.0 + (w == "ternary") * (0.5 - 0.04 * math.log10(n)))
  found = fit.gaps(rows, PLAN)
  assert [float(g["gap"]) for g in found] == pytest.approx(
    [0.5 - 0.04 * math.log10(n) for n in SIZES], rel=1e-4
  )
  assert fit.slope(found)[0] == pytest.approx(-0.04, rel=1e-3)
  # 26 / N^0.26 + 0.09
  assert float(found[0]["spectra1_gap_unverified"]) == pytest.approx(
    26 / SIZES[0] ** 0.26 + 0.09, rel=1e-4
  )


def test_the_files_the_readme_and_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  for name in ("FITS", "GAPS", "README"):
    monkeypatch.setattr(fit, name, tmp_path / name)
  monkeypatch.setattr(fit, "SAMPLES", 200)
  (tmp_path / "README").write_text("before\n<!-- results -->\nold\n")
  rows = made(lambda n, w: 2.0 + 3 * (n / 1e6) ** -0.3 + 0.1 * (w == "ternary"), slip=0.05)
  fit.write(rows, PLAN)
  with (tmp_path / "FITS").open() as lines:
    table = list(csv.DictReader(lines))
  assert len(table) == 2 * len(fit.COUNTS) * len(fit.FIXED)
  text = (tmp_path / "README").read_text()
  assert text.startswith("before\n<!-- results -->\n") and "old" not in text
  assert "+0.100 ± " in text and "unverified" in text and "assumed" in text
  with pytest.raises(ValueError, match="do not compare"):
    fit.write([*rows, dataclasses.replace(rows[0], data="e")], PLAN)
  with pytest.raises(ValueError, match="2 sizes"):
    fit.write([row for row in rows if row.size in ("3m", "10m")], PLAN)
  pytest.importorskip("matplotlib", reason="the figure needs the extra plot")
  figure.draw(rows, PLAN, tmp_path / "a.svg")
  figure.draw(rows, PLAN, tmp_path / "b.svg")
  assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_results_that_are_there_are_those_of_the_readme():
  rows = plan.read(run.RESULTS)
  if not rows or not fit.FITS.exists():
    pytest.skip("no results yet")
  assert fit.report(rows, PLAN) in fit.README.read_text(encoding="utf-8")
