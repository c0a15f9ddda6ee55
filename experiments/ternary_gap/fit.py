"""L(N) = E + A (N / 10^6)^-alpha at a fixed number of tokens, and the gap between the two.

Source of the form: Hoffmann et al., arXiv:2203.15556, equation 2; at fixed tokens its term in them is part
of E here, so that E is not that paper's.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy.optimize import minimize_scalar

from experiments.ternary_gap import plan
from experiments.ternary_gap.plan import Plan, Row
from neurojax.scaling import law

FITS, GAPS = plan.HERE / "fit.csv", plan.HERE / "gap.csv"
README = plan.HERE / "README.md"
_MARK = "<!-- results -->\n"
ALPHAS = np.geomspace(0.02, 3.0, 501)
"""Exponents that are looked at; an interval that ends at one of its ends has no end."""
SAMPLES = 4000
_LEVELS = (0.025, 0.975)

Count = Literal["all", "without the embedding"]
COUNTS: tuple[Count, ...] = ("all", "without the embedding")
FIXED = {
  "free": None,
  "alpha 0.3478, besiroglu": law.CHINCHILLA_BESIROGLU.alpha,
  "alpha 0.26, spectra-1": law.TERNARY_SPECTRA1.alpha,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Best:
  """The learning rate of the lowest held-out loss, by the mean over its seeds.

  Attributes:
    row: One of its runs.
    loss: The mean.
    seeds: How many runs it is of.
    at_edge: No lower, or no higher, learning rate was tried: a better one may lie beyond.
  """

  row: Row
  loss: float
  seeds: int
  at_edge: bool


def best(rows: Sequence[Row], size: str, weights: str) -> Best | None:
  by_rate: dict[float, list[Row]] = {}
  for row in rows:
    if (row.size, row.weights) == (size, weights):
      by_rate.setdefault(row.lr, []).append(row)
  # A rate at which a run diverged is none to choose.
  means = {
    rate: statistics.fmean(row.valid_loss for row in group)
    for rate, group in by_rate.items()
    if all(row.valid_loss is not None for row in group)
  }
  if not means:
    return None
  rate = min(means, key=lambda each: means[each])
  return Best(
    row=by_rate[rate][0],
    loss=means[rate],
    seeds=len(by_rate[rate]),
    at_edge=rate in (min(by_rate), max(by_rate)),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise:
  """The standard deviation of one run's loss between seeds.

  `degrees`: of freedom behind it; None if it is assumed.
  """

  loss: float
  degrees: int | None

  @property
  def source(self) -> str:
    if self.degrees is None:
      return "assumed, no run was repeated"
    return f"seeds, {self.degrees} degrees of freedom"

  def of_mean(self, seeds: int) -> float:
    return self.loss / math.sqrt(seeds)

  def of_gap(self, a: Best, b: Best) -> float:
    return math.hypot(self.of_mean(a.seeds), self.of_mean(b.seeds))


def noise(rows: Sequence[Row], config: Plan) -> Noise:
  """Pooled over all runs that were repeated with other seeds."""
  groups: dict[tuple, list[float]] = {}
  for row in rows:
    if row.valid_loss is not None:
      groups.setdefault((row.size, row.weights, row.lr), []).append(row.valid_loss)
  repeated = [group for group in groups.values() if len(group) > 1]
  if not repeated:
    return Noise(loss=config.assumed_sd, degrees=None)
  sd, degrees = _pooled(repeated)
  return Noise(loss=sd, degrees=degrees)


def _pooled(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
  degrees = sum(len(group) - 1 for group in groups)
  squares = sum((len(group) - 1) * statistics.variance(group) for group in groups)
  return math.sqrt(squares / degrees), degrees


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coefficients:
  """A is the loss above E at a million parameters, in nats."""

  E: float
  A: float
  alpha: float

  def loss(self, parameters: np.ndarray | float) -> np.ndarray | float:
    return self.E + self.A * (np.asarray(parameters) / 1e6) ** -self.alpha


def fit(
  parameters: Sequence[float], losses: Sequence[float], alpha: float | None = None
) -> Coefficients:
  """Least squares, with E not below 0; alpha within ALPHAS unless it is given.

  Raises: ValueError: fewer points than coefficients.
  """
  n, y = np.asarray(parameters, float), np.asarray(losses, float)[None]
  least = 3 if alpha is None else 2
  if len(set(parameters)) < least:
    raise ValueError(f"{len(set(parameters))} sizes: a fit of {least} coefficients needs as many")
  if alpha is None:
    squares = [_linear(n, y, a)[2][0] for a in ALPHAS]
    at = int(np.argmin(squares))
    low, high = np.log(ALPHAS[max(at - 1, 0)]), np.log(ALPHAS[min(at + 1, len(ALPHAS) - 1)])
    found = minimize_scalar(
      lambda t: _linear(n, y, math.exp(t))[2][0],
      bounds=(low, high),
      method="bounded",
      options={"xatol": 1e-10},
    )
    alpha = math.exp(found.x)
  e_S, a_S, _ = _linear(n, y, alpha)
  return Coefficients(E=float(e_S[0]), A=float(a_S[0]), alpha=float(alpha))


def bootstrap(
  parameters: Sequence[float],
  fitted: Coefficients,
  sd: float | Sequence[float],
  alpha: float | None = None,
  *,
  degrees: int | None = None,
  seed: int = 0,
) -> np.ndarray:
  """(SAMPLES, 3) of E, A and alpha from the fitted curve plus normal noise of `sd`, of each point or of all.

  A deviation of few `degrees` of freedom is itself uncertain: each sample draws the true one from
  its scaled inverse chi-squared distribution, which makes the noise Student's.
  Parametric: four runs cannot be resampled. What it leaves out is that the form may be wrong.
  """
  n = np.asarray(parameters, float)
  rng = np.random.default_rng(seed)
  wider_S = np.ones(SAMPLES)
  if degrees is not None:
    wider_S = np.sqrt(degrees / rng.chisquare(degrees, SAMPLES))
  noise_SP = wider_S[:, None] * np.asarray(sd) * rng.standard_normal((SAMPLES, len(n)))
  y_SP = np.asarray(fitted.loss(n)) + noise_SP
  alphas = ALPHAS if alpha is None else np.array([alpha])
  parts = [_linear(n, y_SP, a) for a in alphas]
  squares_KS = np.stack([squares for _, _, squares in parts])
  at_S = squares_KS.argmin(axis=0)
  pick = np.arange(SAMPLES)
  e_S = np.stack([e for e, _, _ in parts])[at_S, pick]
  a_S = np.stack([a for _, a, _ in parts])[at_S, pick]
  return np.stack([e_S, a_S, alphas[at_S]], axis=1)


def _linear(
  n: np.ndarray, y_SP: np.ndarray, alpha: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """E, A and the sum of squares of the best fit for one alpha, for every row of losses."""
  x = (n / 1e6) ** -alpha
  mean, centred = x.mean(), x - x.mean()
  a_S = (y_SP @ centred) / (centred @ centred)
  e_S = y_SP.mean(axis=1) - a_S * mean
  a_S = np.where(e_S < 0, (y_SP @ x) / (x @ x), a_S)
  e_S = np.maximum(e_S, 0.0)
  rest = y_SP - e_S[:, None] - a_S[:, None] * x[None]
  return e_S, a_S, (rest**2).sum(axis=1)


def fits(rows: Sequence[Row], config: Plan) -> list[dict[str, object]]:
  """Rows of fit.csv: both weights, both ways to count parameters, alpha free and published."""
  sd = noise(rows, config)
  found = []
  for weights in plan.WEIGHTS:
    points = [b for size in config.sizes if (b := best(rows, size.name, weights))]
    for counted in COUNTS:
      n = [counting(point.row, counted) for point in points]
      y = [point.loss for point in points]
      for form, alpha in FIXED.items():
        c = fit(n, y, alpha)
        sds = [sd.of_mean(point.seeds) for point in points]
        samples = bootstrap(n, c, sds, alpha, degrees=sd.degrees)
        low, high = np.quantile(samples, _LEVELS, axis=0)
        rms = math.sqrt(statistics.fmean((np.asarray(c.loss(n)) - y) ** 2))
        row: dict[str, object] = {"weights": weights, "parameters": counted, "form": form}
        for i, name in enumerate(("E", "A", "alpha")):
          row |= {name: getattr(c, name), f"{name}_low": low[i], f"{name}_high": high[i]}
        row |= {"rms": rms, "points": len(points), "tokens": config.tokens}
        found.append(_rounded(row) | {"sd": f"{sd.loss:.4f}", "sd_from": sd.source})
  return found


def tried(rows: Sequence[Row], size: str, weights: str) -> int:
  """How many learning rates the best loss was taken from."""
  return len({row.lr for row in rows if (row.size, row.weights) == (size, weights)})


def counting(row: Row, counted: str) -> int:
  return row.parameters if counted == "all" else row.non_embedding


def gaps(rows: Sequence[Row], config: Plan) -> list[dict[str, object]]:
  """Rows of gap.csv: the gap of each size beside what published laws say of its N and D.

  The laws are evaluated with all parameters, as they count them.
  """
  sd = noise(rows, config)
  found = []
  for size in config.sizes:
    ternary, bf16 = (best(rows, size.name, weights) for weights in plan.WEIGHTS)
    if not (ternary and bf16):
      continue
    n, d = ternary.row.parameters, config.tokens
    of = {each.name: each.loss(n, d) for each in law.LAWS.values()}
    spectra1 = of["spectra-1-ternary"].value - of["spectra-1-float"].value
    row: dict[str, object] = {
      "size": size.name,
      "parameters": n,
      "tokens": d,
      "bf16_lr": bf16.row.lr,
      "bf16_loss": bf16.loss,
      "bf16_seeds": bf16.seeds,
      "bf16_lr_at_edge": bf16.at_edge,
      "ternary_lr": ternary.row.lr,
      "ternary_loss": ternary.loss,
      "ternary_seeds": ternary.seeds,
      "ternary_lr_at_edge": ternary.at_edge,
      "gap": ternary.loss - bf16.loss,
      "gap_sd": sd.of_gap(ternary, bf16),
      "besiroglu_loss": of["besiroglu"].value,
      "spectra1_gap_unverified": spectra1,
      "spectra11_ternary_loss_unverified": of["spectra-1.1-ternary"].value,
      "spectra11_extrapolated": of["spectra-1.1-ternary"].extrapolated,
    }
    found.append(_rounded(row))
  return found


def slope(found: Sequence[dict[str, object]]) -> tuple[float, float]:
  """Of the gap per factor of ten in parameters, by least squares, and its standard error.

  The error is the greater of what the noise of each gap and what the residuals give.
  """
  x = np.log10([float(g["parameters"]) for g in found])
  y = np.array([float(g["gap"]) for g in found])
  sd = np.array([float(g["gap_sd"]) for g in found])
  centred = x - x.mean()
  squares = float(centred @ centred)
  b = float(y @ centred / squares)
  rest = y - y.mean() - b * centred
  residual = math.sqrt(float(rest @ rest) / (len(y) - 2)) if len(y) > 2 else 0.0
  return b, max(float(np.linalg.norm(centred * sd)) / squares, residual / math.sqrt(squares))


def _rounded(row: dict[str, object]) -> dict[str, object]:
  return {
    key: f"{value:.5g}" if isinstance(value, float | np.floating) else value
    for key, value in row.items()
  }


def check(rows: Sequence[Row], config: Plan) -> None:
  """Raises: ValueError: too few sizes have both weights, or losses are of other tokens."""
  plan.comparable(rows, config)
  whole = [size for size in config.sizes if all(best(rows, size.name, w) for w in plan.WEIGHTS)]
  if len(whole) < 3:
    raise ValueError(
      f"results.csv has {len(whole)} sizes with both weights: a fit needs 3, better 4"
    )


def write(rows: Sequence[Row], config: Plan) -> str:
  """fit.csv, gap.csv and the README's tables. Raises: ValueError: too few sizes."""
  check(rows, config)
  plan.write_table(FITS, fits(rows, config))
  plan.write_table(GAPS, gaps(rows, config))
  text = report(rows, config)
  head = README.read_text(encoding="utf-8").partition(_MARK)[0]
  README.write_text(f"{head}{_MARK}\n{text}", encoding="utf-8")
  return text


def report(rows: Sequence[Row], config: Plan) -> str:
  """Markdown of what was found."""
  sd, found = noise(rows, config), gaps(rows, config)
  out = [
    "| size | parameters | bf16 | at learning rate | ternary | at learning rate | gap | Spectra 1's gap, unverified |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for g in found:
    rates = [
      f"{g[f'{w}_lr']}, {g[f'{w}_seeds']} seed{'s' if g[f'{w}_seeds'] > 1 else ''},"
      f" of {tried(rows, g['size'], w)} rates{', edge' if g[f'{w}_lr_at_edge'] else ''}"
      for w in ("bf16", "ternary")
    ]
    out.append(
      f"| {g['size']} | {g['parameters'] / 1e6:.1f} M | {float(g['bf16_loss']):.4f} | {rates[0]}"
      f" | {float(g['ternary_loss']):.4f} | {rates[1]} | {float(g['gap']):+.3f} ± {float(g['gap_sd']):.3f}"
      f" | {float(g['spectra1_gap_unverified']):+.3f} |"
    )
  b, error = slope(found)
  out += [
    "",
    f"Held-out losses in nats a token after {config.tokens:,} tokens, the mean of the seeds, at the learning"
    ' rate whose mean is lowest; "edge": it was the lowest or highest tried, a better one may lie beyond.'
    f" A run's loss has a standard deviation of {sd.loss:.4f} ({sd.source}), from which that behind ± follows."
    f" The gap changes by {b:+.4f} ± {error:.4f} nats for ten times the parameters.",
    "",
    "| weights | parameters | form | E | A | alpha | rms of residuals |",
    "|---|---|---|---|---|---|---|",
  ]
  for f in fits(rows, config):
    values = [
      " to ".join(f"{float(f[key + end]):.3f}" for end in ("_low", "_high"))
      for key in ("E", "A", "alpha")
    ]
    values = [
      f"{float(f[key]):.3f} ({v})" for key, v in zip(("E", "A", "alpha"), values, strict=True)
    ]
    if f["form"] != "free":
      values[2] = f"{f['alpha']}, fixed"
    out.append(
      f"| {f['weights']} | {f['parameters']} | {f['form']} | {' | '.join(values)} | {float(f['rms']):.4f} |"
    )
  devices = sorted({f"{row.device}, jax {row.jax}" for row in rows})
  dates = sorted({row.date for row in rows})
  out += [
    "",
    f"In brackets 95% of {SAMPLES:,} bootstrap samples. {'; '.join(devices)}; {dates[0]} to {dates[-1]}.",
  ]
  return "\n".join(out) + "\n"
