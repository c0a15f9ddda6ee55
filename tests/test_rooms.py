"""The house: a room imports only itself and rooms before it; rooms marked * import no JAX."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "neurojax"

ROOMS = (
  "config*",
  "folders*",
  "scaling*",
  "tokenizer*",
  "layout",
  "quant",
  "ternary",
  "kernels",
  "model",
  "files",
  "data",
  "train",
  "stage",
  "engine",
  "pipeline",
  "cli",
)
"""A new room chooses its place here."""

ORDER = [room.rstrip("*") for room in ROOMS]
JAX = ("jax", "jaxlib", "flax", "optax", "orbax", "grain")


def room_of(path: Path) -> str:
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
  """Modules that a file imports, wherever in the file."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: write imports in full"
      # `from neurojax import x` names a room in its aliases.
      names = (
        {f"{node.module}.{alias.name}" for alias in node.names}
        if node.module == "neurojax"
        else {node.module}
      )
      found |= names
  return found


FILES = sorted(
  path
  for path in PACKAGE.rglob("*.py")
  if path.parent != PACKAGE or path.stem not in ("__init__", "__main__")
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_itself_and_earlier_rooms(path: Path):
  room = room_of(path)
  assert room in ORDER, f"{room} is a new room: give it a place in ROOMS"
  allowed = set(ORDER[: ORDER.index(room) + 1])
  used = {module.split(".")[1] for module in imports(path) if module.startswith("neurojax.")}
  assert used <= allowed, f"{path}: imports {used - allowed}, which come after {room}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_marked_rooms_import_no_jax(path: Path):
  if f"{room_of(path)}*" in ROOMS:
    assert not {module for module in imports(path) if module.split(".")[0] in JAX}


def test_marked_rooms_come_first():
  stars = [room.endswith("*") for room in ROOMS]
  assert stars == sorted(stars, reverse=True), (
    "a room without JAX can only import rooms without JAX"
  )


def test_the_checks_can_fail(tmp_path: Path):
  bad = tmp_path / "bad.py"
  bad.write_text("def f():\n  from neurojax import cli\n  import jax.numpy\n")
  assert imports(bad) == {"neurojax.cli", "jax.numpy"}
