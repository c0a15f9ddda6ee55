"""gap.svg: losses and fits on the left, the gap on the right."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.ternary_gap import fit, plan
from experiments.ternary_gap.plan import Plan, Row

FIGURE = plan.HERE / "gap.svg"
_COLOURS = {"ternary": "#b5402a", "bf16": "#2a5db5"}


def draw(rows: Sequence[Row], config: Plan, path: Path = FIGURE) -> None:
  """Raises: ValueError: matplotlib is not installed, or there are too few sizes."""
  try:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
  except ImportError as error:
    raise ValueError(
      '--plot needs matplotlib: `make setup EXTRA=plot`, or `pip install "CHECKOUT[plot]"`'
    ) from error
  fit.check(rows, config)
  found = fit.gaps(rows, config)
  # The same file for the same numbers.
  with matplotlib.rc_context({"svg.hashsalt": "ternary_gap", "svg.fonttype": "none"}):
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    losses, gap = figure.subplots(1, 2)
    _losses(losses, rows, config)
    _gap(gap, found)
    FigureCanvasSVG(figure).print_svg(str(path), metadata={"Date": None})


def _losses(axes, rows: Sequence[Row], config: Plan) -> None:
  for weights, colour in _COLOURS.items():
    every = [r for r in rows if r.weights == weights and r.valid_loss is not None]
    axes.plot(
      [r.parameters for r in every], [r.valid_loss for r in every], ".", color=colour, alpha=0.3
    )
    points = [b for size in config.sizes if (b := fit.best(rows, size.name, weights))]
    n, y = [b.row.parameters for b in points], [b.loss for b in points]
    axes.plot(n, y, "o", color=colour, label=f"{weights}, best learning rate, mean of seeds")
    along = np.geomspace(min(n) / 1.3, max(n) * 1.3)
    for alpha in fit.FIXED.values():
      style = "-" if alpha is None else ":"
      axes.plot(along, fit.fit(n, y, alpha).loss(along), style, color=colour, linewidth=1)
  axes.set_xscale("log")
  axes.set_xlabel("parameters, all")
  axes.set_ylabel("held-out loss, nats a token")
  axes.set_title(
    f"{config.tokens / 1e6:.0f} million tokens; solid: alpha free, dotted: published alphas",
    fontsize=10,
  )
  axes.legend(frameon=False)


def _gap(axes, found: Sequence[dict[str, object]]) -> None:
  n = [g["parameters"] for g in found]
  axes.errorbar(
    n, [float(g["gap"]) for g in found], yerr=[2 * float(g["gap_sd"]) for g in found], fmt="o",
    color="black", capsize=3, label="measured, ± 2 standard deviations",
  )  # fmt: skip
  axes.plot(
    n, [float(g["spectra1_gap_unverified"]) for g in found], "--", color="grey",
    label="Spectra 1 at 300 billion tokens, unverified, extrapolated",
  )  # fmt: skip
  axes.axhline(0, color="lightgrey", linewidth=1)
  axes.set_xscale("log")
  axes.set_xlabel("parameters, all")
  axes.set_ylabel("ternary minus bf16, nats a token")
  axes.legend(frameon=False, fontsize=8)
