"""Blocks of the project's README that experiments write: between `<!-- NAME -->` and `<!-- /NAME -->`."""

from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def block(name: str, text: str | None = None) -> str:
  """Read a block, or write it and leave the rest as it is. Raises ValueError: no such block."""
  whole = README.read_text(encoding="utf-8")
  opening, closing = f"<!-- {name} -->\n", f"<!-- /{name} -->"
  before, found, rest = whole.partition(opening)
  inside, ended, after = rest.partition(closing)
  if not (found and ended):
    raise ValueError(f"{README} has no block {name}")
  if text is not None:
    README.write_text(f"{before}{opening}{text}{closing}{after}", encoding="utf-8")
  return inside if text is None else text
