"""Blocks of Markdown files that experiments write: between `<!-- NAME -->` and `<!-- /NAME -->`."""

from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def block(name: str, text: str | None = None, path: Path = README) -> str:
  """Read a block of a Markdown file, or replace it and leave the rest of the file as it is.

  Args:
    text: What to write between the marks; None only reads.
    path: The file; the project's README if absent.
  Raises: ValueError: the file has no such block.
  """
  whole = path.read_text(encoding="utf-8")
  opening, closing = f"<!-- {name} -->\n", f"<!-- /{name} -->"
  before, found, rest = whole.partition(opening)
  inside, ended, after = rest.partition(closing)
  if not (found and ended):
    raise ValueError(f"{path} has no block {name}")
  if text is not None:
    path.write_text(f"{before}{opening}{text}{closing}{after}", encoding="utf-8")
  return inside if text is None else text
