"""Writes the tables of docs/formats.md from the readers, the writers and the goldens.

python docs/formats.py
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiments.readme import DOCS, block
from neurojax.files.gguf.blocks import BLOCKS
from neurojax.files.gguf.file import GgufFile
from neurojax.files.write.gguf import KINDS
from neurojax.files.write.transformers_config import CLASSES
from neurojax.forms import Grouped
from neurojax.weights.codecs import CODECS
from tests.files.families import FAMILIES

PAGE = DOCS / "formats.md"
GOLDEN = DOCS.parent / "tests" / "golden"


def families() -> str:
  """A row for each family of transformers that is read."""
  architectures = {family.table["model_type"]: family.arch for family in FAMILIES.values()}
  theirs: dict[str, list[str]] = {}
  for path in sorted((GOLDEN / "families").glob("*.json")):
    said = json.loads(path.read_text(encoding="utf-8"))
    theirs.setdefault(said["config"]["model_type"], []).append(path.stem)
  converted: dict[str, list[str]] = {}
  for path in sorted((GOLDEN / "converted").glob("*.gguf")):
    with GgufFile(path) as file:
      found = [t for t, arch in architectures.items() if arch == file.interpretation.architecture]
      model_type = next((t for t in found if t.startswith(path.stem)), found[0])
      converted.setdefault(model_type, []).append(path.stem)
  rows = ["| model_type | class of transformers | GGUF | transformers' logits | llama.cpp's file |"]
  rows.append("|---|---|---|---|---|")
  for model_type, name in CLASSES.items():
    cells = [
      f"`{model_type}`", name, f"`{architectures[model_type]}`",
      ", ".join(theirs.get(model_type, [])) or "none",
      ", ".join(converted.get(model_type, [])) or "none",
    ]  # fmt: skip
    rows.append(f"| {' | '.join(cells)} |")
  return "\n".join(rows) + "\n"


def types() -> str:
  """A row for each quantized type of GGUF."""
  rows = ["| type | holds | form with `stored` | written |", "|---|---|---|---|"]
  for name, codec in CODECS.items():
    group = "the tensor" if codec.group_size is None else f"{codec.group_size} weights"
    rows.append(f"| {name} | ternary, a scale for {group} | ternary codes | {_written(name)} |")
  for name, blocks in BLOCKS.items():
    form = blocks.form
    rows.append(f"| {name} | {_grouped(form)} | {form.bits}-bit integers | {_written(name)} |")
  return "\n".join(rows) + "\n"


def _grouped(form: Grouped) -> str:
  more = {"minimum": " and a minimum", "zero": " and a zero", "none": ""}[form.minima]
  return f"integers, a scale{more} for {form.group_size} weights"


def _written(name: str) -> str:
  plain = {"Q2_0 (group 64)": "Q2_0", "Q2_0 (group 128)": "Q2_0_g128"}.get(name, name)
  return f"`--type {plain}`" if plain in KINDS else "copied as it is"


if __name__ == "__main__":
  block("families", families(), PAGE)
  block("types", types(), PAGE)
