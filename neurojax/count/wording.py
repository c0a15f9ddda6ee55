"""Numbers as people read them."""


def short(value: float, digits: int = 3) -> str:
  """A number with `digits` significant digits, but never fewer than all digits before the point.

  Large numbers get commas and no exponent: 12345.6 becomes "12,346".
  """
  return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def counted(count: int, what: str) -> str:
  """A count with its noun: "1 place", "2 places"."""
  return f"{count} {what}{'' if count == 1 else 's'}"
