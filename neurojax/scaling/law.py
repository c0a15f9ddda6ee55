"""Laws of the loss as a function of parameters and tokens: published ones, and the user's own."""

import dataclasses
import math
from collections.abc import Mapping

from neurojax.config import from_toml
from neurojax.plan.fleet import read_text

FLOPS_PER_PARAMETER_TOKEN = 6
"""Training FLOPs as the laws count them: 2 forward, 4 backward, attention left out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StandardErrors:
  """One standard error of each coefficient; their correlations are not known."""

  E: float
  A: float
  B: float
  alpha: float
  beta: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class FittedRange:
  """The range of parameters and tokens of the runs behind a law."""

  min_parameters: float
  max_parameters: float
  min_tokens: float
  max_tokens: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
  """A predicted loss in nats per token, on the law's own data and tokenizer.

  Attributes:
    value: The loss.
    low, high: One standard error below and above it; None if the law has none. Errors are taken as
      independent. Those of A and alpha, and of B and beta, are correlated and partly cancel, so the true
      band is narrower.
    extrapolated: Words for the values outside the fitted range, and how far; None if all are inside.
  """

  value: float
  low: float | None
  high: float | None
  extrapolated: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Law:
  """L(N, D) = E + A / n**alpha + B / d**beta, with n = N / parameters_unit, d = D / tokens_unit.

  Attributes:
    E, A, B, alpha, beta: Coefficients; B is 0 in a law of parameters alone.
    source: Where the coefficients were published.
    verified: The coefficients were compared with their source.
    parameters_unit, tokens_unit: Units of parameters and tokens.
    standard_errors: Errors of the coefficients, if published.
    fitted_range: Range of the runs that the law was fitted to, if published.
  """

  name: str
  E: float
  A: float
  B: float
  alpha: float
  beta: float
  source: str
  verified: bool
  parameters_unit: float = 1.0
  tokens_unit: float = 1.0
  standard_errors: StandardErrors | None = None
  fitted_range: FittedRange | None = None

  def __post_init__(self) -> None:
    for name in ("A", "alpha", "beta", "parameters_unit", "tokens_unit"):
      value = getattr(self, name)
      if not 0 < value < math.inf:
        raise ValueError(f"{name} = {value!r}: it must be positive and finite")
    for name in ("E", "B"):
      value = getattr(self, name)
      if not 0 <= value < math.inf:
        raise ValueError(f"{name} = {value!r}: it must be finite and not negative")

  def loss(self, parameters: float, tokens: float) -> Loss:
    """Predict the loss after one pass over `tokens`. Raises: ValueError: one of them is not positive."""
    n, d = self._units(parameters, tokens)
    of_n, of_d = self.A * n**-self.alpha, self.B * d**-self.beta
    value = self.E + of_n + of_d
    low = high = None
    if (s := self.standard_errors) is not None:
      parts = [
        s.E,
        s.A * n**-self.alpha,
        of_n * math.log(n) * s.alpha,
        s.B * d**-self.beta,
        of_d * math.log(d) * s.beta,
      ]
      error = math.hypot(*parts)
      low, high = value - error, value + error
    return Loss(
      value=value, low=low, high=high, extrapolated=self._extrapolated(parameters, tokens)
    )

  def _units(self, parameters: float, tokens: float) -> tuple[float, float]:
    _check(parameters=parameters, tokens=tokens)
    return parameters / self.parameters_unit, tokens / self.tokens_unit

  def _extrapolated(self, parameters: float, tokens: float) -> str | None:
    if (fitted := self.fitted_range) is None:
      return "the range of the fit is not known"
    found = []
    for what, value, low, high in (
      ("parameters", parameters, fitted.min_parameters, fitted.max_parameters),
      ("tokens", tokens, fitted.min_tokens, fitted.max_tokens),
    ):
      if value > high:
        found.append(f"{value:.3g} {what} are {_times(value / high)} the most of the fit")
      elif value < low:
        found.append(f"{value:.3g} {what} are {_times(low / value)} less than the least of the fit")
    return "; ".join(found) or None


def compute_optimal(law: Law, flops: float) -> tuple[float, float]:
  """Parameters and tokens of least loss for 6 N D = `flops`.

  Raises: ValueError: flops are not positive, or the law has no term in tokens.
  Source: Hoffmann et al., arXiv:2203.15556, equation 4.
  """
  _check(flops=flops)
  _needs_tokens(law)
  a, b = law.alpha, law.beta
  product = flops / FLOPS_PER_PARAMETER_TOKEN / law.parameters_unit / law.tokens_unit
  g = (a * law.A / (b * law.B)) ** (1 / (a + b))
  n, d = g * product ** (b / (a + b)), product ** (a / (a + b)) / g
  return n * law.parameters_unit, d * law.tokens_unit


def optimal_tokens(law: Law, parameters: float) -> float:
  """Tokens for which a model of `parameters` is the compute-optimal one.

  Raises: ValueError: parameters are not positive, or the law has no term in tokens.
  """
  _check(parameters=parameters)
  _needs_tokens(law)
  n = parameters / law.parameters_unit
  d = (law.beta * law.B / (law.alpha * law.A) * n**law.alpha) ** (1 / law.beta)
  return d * law.tokens_unit


_CHINCHILLA_RUNS = FittedRange(
  min_parameters=70e6, max_parameters=16e9, min_tokens=5e9, max_tokens=500e9
)

CHINCHILLA_HOFFMANN = Law(
  name="hoffmann",
  E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28,
  source="Hoffmann et al. 2022, arXiv:2203.15556, approach 3; its fit stopped early, says Besiroglu",
  verified=True,
  fitted_range=_CHINCHILLA_RUNS,
)  # fmt: skip

CHINCHILLA_BESIROGLU = Law(
  name="besiroglu",
  E=1.8169, A=482.01, B=2085.43, alpha=0.3478, beta=0.3659,
  source="Besiroglu et al. 2024, arXiv:2404.10102, a refit of Hoffmann's runs read off a figure",
  verified=True,
  standard_errors=StandardErrors(E=0.0257, A=124.5, B=1293.0, alpha=0.0154, beta=0.0206),
  fitted_range=_CHINCHILLA_RUNS,
)  # fmt: skip

TERNARY_SPECTRA11 = Law(
  name="spectra-1.1-ternary",
  E=2.19, A=4.73, B=5.18, alpha=0.32, beta=0.81, parameters_unit=1e6, tokens_unit=1e9,
  source="Spectra 1.1, arXiv:2506.23025; coefficients from memory, units (millions of parameters, "
  "billions of tokens) presumed because others give no sensible loss",
  verified=False,
  fitted_range=FittedRange(
    min_parameters=99e6, max_parameters=1.1e9, min_tokens=20e9, max_tokens=150e9
  ),
)  # fmt: skip

TERNARY_SPECTRA1 = Law(
  name="spectra-1-ternary",
  E=1.76, A=185.0, B=0.0, alpha=0.26, beta=1.0,
  source="TriLM of Spectra 1, arXiv:2407.12327, after 300 billion tokens; the exponent is confirmed, "
  "the rest from memory",
  verified=False,
  fitted_range=FittedRange(
    min_parameters=99e6, max_parameters=3.9e9, min_tokens=300e9, max_tokens=300e9
  ),
)  # fmt: skip

FLOAT_SPECTRA1 = dataclasses.replace(
  TERNARY_SPECTRA1,
  name="spectra-1-float",
  E=1.67,
  A=159.0,
  source=TERNARY_SPECTRA1.source.replace("TriLM", "FloatLM"),
)

LAWS: Mapping[str, Law] = {
  law.name: law
  for law in (
    CHINCHILLA_BESIROGLU,
    CHINCHILLA_HOFFMANN,
    TERNARY_SPECTRA11,
    TERNARY_SPECTRA1,
    FLOAT_SPECTRA1,
  )
}


def read_law(text: str) -> Law:
  """Read a law by its name in LAWS, or from a TOML file with the fields of `Law`.

  Raises: ValueError: there is no such law, or the file cannot be read.
  """
  if text.endswith(".toml"):
    return from_toml(Law, read_text(text, "the law"), where=text)
  if text not in LAWS:
    raise ValueError(f"law {text!r}: choose one of {', '.join(LAWS)}, or give a TOML file")
  return LAWS[text]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gap:
  """The published loss of a ternary model minus that of its twin, in nats per token."""

  parameters: float
  nats: float
  source: str


_BITNET = "BitNet b1.58, arXiv:2402.17764, perplexities 12.33/12.87, 11.25/11.29, 10.04/9.91"
_PARETOQ = "ParetoQ, arXiv:2502.02631, WikiText perplexity of MobileLLM"
TERNARY_GAPS: tuple[Gap, ...] = (
  *(
    Gap(parameters=n, nats=nats, source=_PARETOQ)
    for n, nats in ((125e6, 0.28), (350e6, 0.32), (600e6, 0.23), (1e9, 0.22), (1.5e9, 0.13))
  ),
  *(
    Gap(parameters=n, nats=nats, source=_BITNET)
    for n, nats in ((700e6, 0.043), (1.3e9, 0.0036), (3e9, -0.013))
  ),
)
"""Gaps at equal parameters and tokens. BitNet is trained from the start on 100 billion tokens of its own data;
ParetoQ is fine-tuned."""


def ternary_gap(parameters: float) -> tuple[float, float]:
  """Least and greatest published gap near a size, in nats.

  Near is within a factor of 2; a larger model takes those near the largest, 3 billion, a smaller one
  those near the smallest. That says little about either: no law is fitted to so few pairs.
  Raises: ValueError: parameters are not positive.
  """
  _check(parameters=parameters)
  sizes = [gap.parameters for gap in TERNARY_GAPS]
  size = min(max(parameters, min(sizes)), max(sizes))
  near = [gap.nats for gap in TERNARY_GAPS if size / 2 <= gap.parameters <= 2 * size]
  return min(near), max(near)


def _check(**values: float) -> None:
  for name, value in values.items():
    if not 0 < value < math.inf:
      raise ValueError(f"{name} = {value!r}: it must be positive and finite")


def _times(ratio: float) -> str:
  return f"{ratio:,.0f} times" if ratio >= 9.95 else f"{ratio:.2g} times"


def _needs_tokens(law: Law) -> None:
  if not law.B:
    raise ValueError(
      f"law {law.name!r} has no term in tokens: choose one that has, such as 'besiroglu'"
    )
