"""The tables of docs/formats.md are those of the readers, the writers and the goldens."""

import re
import runpy

import pytest

from experiments.readme import DOCS, block
from neurojax.files import names
from neurojax.files.write.transformers_config import CLASSES


@pytest.mark.parametrize("name", ["families", "types"])
def test_tables_are_what_their_script_writes(name: str):
  made = runpy.run_path(str(DOCS / "formats.py"))
  assert block(name, path=DOCS / "formats.md") == made[name](), "run: python docs/formats.py"


def test_the_page_names_every_family_and_architecture():
  text = (DOCS / "formats.md").read_text(encoding="utf-8")
  assert set(CLASSES) == set(names.FOLDER_FAMILIES)
  for name in (*CLASSES, *names.ARCHITECTURES):
    assert f"`{name}`" in text, name


@pytest.mark.parametrize("page", ["formats.md", "adding-a-model-family.md"])
def test_files_that_the_page_names_exist(page: str):
  text = (DOCS / page).read_text(encoding="utf-8")
  for path in re.findall(r"`((?:neurojax|tests|docs)/[\w/.-]+)`", text):
    assert (DOCS.parent / path).exists(), path
