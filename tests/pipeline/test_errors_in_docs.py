"""Every error text that the documentation explains is one that the code raises."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "docs/serving-across-hosts.md").read_text(encoding="utf-8")
ROWS = [line.split("|")[1] for line in TABLE.splitlines() if line.startswith("| `")]
TEXTS = [text for row in ROWS for text in re.findall("`([^`]+)`", row)]
# Strings that are continued on the next line are joined, and what is filled in is dropped.
SOURCE = re.sub(
  r"\{[^{}]*\}",
  "...",
  re.sub(
    r'"\s*\n\s*f?"',
    "",
    "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "neurojax").rglob("*.py"))),
  ),
)


def test_the_table_has_rows():
  assert len(TEXTS) > 15


@pytest.mark.parametrize("text", TEXTS)
def test_the_code_has_the_text(text: str):
  # "N", "60" and "HOST" stand for what is filled in.
  for part in re.split(r"\.\.\.|\bN\b|\b60\b|\bHOST\b", text):
    assert part.strip(" ()") in SOURCE or part.strip(" ()") in DISAGREEMENTS, part


DISAGREEMENTS = "".join(
  f"{name.replace('_', ' ')} is  here and  there"
  for name in ("protocol", "package", "model_sha256")
)
"""Built from the names of fields, by `neurojax.wire.identity.disagreement`."""
