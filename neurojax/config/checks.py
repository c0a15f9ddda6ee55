"""Checks of single numbers, for every configuration."""

import math
from typing import Any


def check_count(name: str, value: Any) -> None:
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    raise ValueError(f"{name} = {value!r}: it must be a positive integer")


def check_positive(name: str, value: Any) -> None:
  if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
    raise ValueError(f"{name} = {value!r}: it must be positive and finite")
