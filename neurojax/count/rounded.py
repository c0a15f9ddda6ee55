"""Numbers for readers."""


def short(value: float, digits: int = 3) -> str:
  """`value` in so many digits, or all those before the point, never with an exponent of ten for large ones."""
  return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def number(count: int, what: str) -> str:
  return f"{count} {what}{'' if count == 1 else 's'}"
