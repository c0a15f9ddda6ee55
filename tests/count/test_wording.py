import pytest

from neurojax.count.wording import short


@pytest.mark.parametrize(
  ("value", "digits", "text"),
  [(0.0416, 3, "0.0416"), (41.44, 3, "41.4"), (99.96, 3, "100"), (482.4, 3, "482"), (1000.0, 3, "1,000"),
   (12345.6, 4, "12,346"), (123.45, 4, "123.5"), (-2500.0, 3, "-2,500"), (0.0, 3, "0")],
)  # fmt: skip
def test_no_number_has_an_exponent_for_its_size(value: float, digits: int, text: str):
  assert short(value, digits) == text
