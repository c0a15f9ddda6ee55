"""Blocks of Markdown files that experiments write: between `<!-- NAME -->` and `<!-- /NAME -->`."""

import os
import re
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
DOCS = README.parent / "docs"


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


def runnable(path: Path) -> list[tuple[str, str]]:
  """Return the code blocks of a Markdown file that run as printed, in order.

  Their fences are marked "run": ```sh run, or ```python run.

  Returns: Language and text of each.
  """
  text = path.read_text(encoding="utf-8")
  return re.findall(r"^```(sh|python) run\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def scratch(folder: Path) -> dict[str, str]:
  """Make a folder in which commands of the documentation run as in a checkout, with their results.

  Returns: The environment for them, in which `neurojax` and `python` are those of this process.
  """
  for path in ("README.md", "docs", "configs", "experiments", "neurojax"):
    (folder / path).symlink_to(README.parent / path)
  programs = folder / ".programs"
  programs.mkdir()
  for name, arguments in (("python", ""), ("neurojax", "-m neurojax ")):
    program = programs / name
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n', encoding="utf-8")
    program.chmod(0o755)
  return {
    **os.environ,
    "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": str(README.parent),
  }
