import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from neurojax.config import to_toml
from neurojax.scaling import law

IN_TOKENS = [known for known in law.LAWS.values() if known.B]
positive = st.floats(6, 14).map(lambda power: 10.0**power)


@pytest.mark.parametrize("known", IN_TOKENS, ids=lambda known: known.name)
@given(flops=st.floats(17, 27).map(lambda power: 10.0**power))
@settings(max_examples=25, deadline=None)
def test_the_closed_form_is_the_numeric_minimum(known: law.Law, flops: float):
  parameters, tokens = law.compute_optimal(known, flops)
  assert 6 * parameters * tokens == pytest.approx(flops, rel=1e-9)

  def loss(log_n: float) -> float:
    return known.loss(math.exp(log_n), flops / 6 / math.exp(log_n)).value

  numeric = minimize_scalar(
    loss, bounds=(math.log(parameters) - 4, math.log(parameters) + 4), method="bounded",
    options={"xatol": 1e-9},
  )  # fmt: skip
  assert loss(math.log(parameters)) <= numeric.fun + 1e-12
  assert math.exp(numeric.x) == pytest.approx(parameters, rel=1e-3)
  assert law.optimal_tokens(known, parameters) == pytest.approx(tokens, rel=1e-9)


@pytest.mark.parametrize("known", law.LAWS.values(), ids=lambda known: known.name)
@given(parameters=positive, tokens=positive, more=st.floats(1.01, 100))
@settings(max_examples=25, deadline=None)
def test_more_of_either_is_never_worse_and_the_limit_is_E(known, parameters, tokens, more):
  here = known.loss(parameters, tokens)
  assert known.loss(more * parameters, tokens).value < here.value
  assert known.loss(parameters, more * tokens).value <= here.value
  assert here.value > known.E
  assert known.loss(1e300, 1e300).value == pytest.approx(known.E)
  if known.standard_errors:
    assert here.low is not None and here.high is not None
    assert here.low < here.value < here.high
    assert here.high - here.low > 2 * known.standard_errors.E
  else:
    assert here.low is here.high is None


def test_values_by_hand():
  loss = law.CHINCHILLA_HOFFMANN.loss(70e9, 1.4e12)
  assert loss.value == pytest.approx(1.69 + 406.4 / 70e9**0.34 + 410.7 / 1.4e12**0.28)
  assert loss.value == pytest.approx(1.937, abs=1e-3)
  loss = law.TERNARY_SPECTRA11.loss(1e9, 100e9)
  assert loss.value == pytest.approx(2.19 + 4.73 / 1000**0.32 + 5.18 / 100**0.81)
  # The exponents of parameters in compute that the two fits imply.
  for known, exponent in ((law.CHINCHILLA_HOFFMANN, 0.452), (law.CHINCHILLA_BESIROGLU, 0.513)):
    small, large = (law.compute_optimal(known, flops)[0] for flops in (1e20, 1e21))
    assert math.log10(large / small) == pytest.approx(exponent, abs=1e-3)
  # Besiroglu's refit wants about 20 tokens per parameter where Chinchilla was trained.
  assert 15 < law.optimal_tokens(law.CHINCHILLA_BESIROGLU, 70e9) / 70e9 < 30


def test_the_band_is_the_numeric_propagation():
  known = law.CHINCHILLA_BESIROGLU
  errors = dataclasses.asdict(known.standard_errors)
  variance = 0.0
  for name, error in errors.items():
    at = getattr(known, name)
    step = 1e-6 * at
    up, down = (
      dataclasses.replace(known, **{name: at + sign * step}).loss(1e9, 20e9).value
      for sign in (1, -1)
    )
    variance += ((up - down) / (2 * step) * error) ** 2
  loss = known.loss(1e9, 20e9)
  assert (loss.high - loss.low) / 2 == pytest.approx(math.sqrt(variance), rel=1e-5)


def test_extrapolation_is_said():
  known = law.CHINCHILLA_BESIROGLU
  assert known.loss(1e9, 20e9).extrapolated is None
  assert (
    known.loss(160e9, 20e9).extrapolated == "1.6e+11 parameters are 10 times the most of the fit"
  )
  said = known.loss(7e6, 15e12).extrapolated
  assert "10 times less than the least" in said and "30 times the most" in said
  unknown = dataclasses.replace(known, fitted_range=None)
  assert "not known" in unknown.loss(1e9, 20e9).extrapolated


@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf])
def test_what_is_not_positive_is_refused(bad: float):
  known = law.CHINCHILLA_BESIROGLU
  for call in (
    lambda: known.loss(bad, 1e9),
    lambda: known.loss(1e9, bad),
    lambda: law.compute_optimal(known, bad),
    lambda: law.optimal_tokens(known, bad),
    lambda: law.ternary_gap(bad),
    lambda: dataclasses.replace(known, alpha=bad),
  ):
    with pytest.raises(ValueError, match="must be positive and finite"):
      call()


def test_a_law_of_parameters_alone_has_no_optimum():
  for call in (law.compute_optimal, law.optimal_tokens):
    with pytest.raises(ValueError, match="no term in tokens"):
      call(law.TERNARY_SPECTRA1, 1e20)


def test_own_fits_come_from_toml(tmp_path):
  path = tmp_path / "own.toml"
  for known in law.LAWS.values():
    path.write_text(to_toml(known))
    assert law.read_law(str(path)) == known
    assert law.read_law(known.name) is known
  path.write_text(to_toml(law.CHINCHILLA_HOFFMANN) + "gamma = 1.0\n")
  with pytest.raises(ValueError, match="unknown key 'gamma'"):
    law.read_law(str(path))
  with pytest.raises(ValueError, match="choose one of besiroglu"):
    law.read_law("kaplan")
  with pytest.raises(ValueError, match="no such file"):
    law.read_law(str(tmp_path / "none.toml"))


def test_only_what_was_compared_with_its_source_is_called_verified():
  assert {known.name for known in law.LAWS.values() if known.verified} == {"hoffmann", "besiroglu"}


def test_gaps_of_ternary_weights_are_those_published_near_a_size():
  assert law.ternary_gap(1e9) == (0.0036, 0.23)
  assert law.ternary_gap(3e9) == law.ternary_gap(1e12) == (-0.013, 0.13)
  assert law.ternary_gap(1e6) == (0.28, 0.28)
