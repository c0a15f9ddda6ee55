"""Cuts long texts into parts that can be encoded alone."""

_PART = 1 << 17


def parts_at_spaces(text: str) -> list[str]:
  """Cuts a long text in front of spaces between two letters; a short text comes back whole."""
  parts: list[str] = []
  start, cut = 0, _PART
  while (cut := text.find(" ", cut)) >= 0:
    if cut + 1 < len(text) and text[cut - 1].isalpha() and text[cut + 1].isalpha():
      parts.append(text[start:cut])
      start, cut = cut, cut + _PART
    else:
      cut += 1
  parts.append(text[start:])
  return parts
