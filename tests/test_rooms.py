"""The house: a room imports only itself and rooms before it, files of a room import each other in no
circle, and rooms marked * import no JAX."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "neurojax"

ROOMS = (
  "forms*",
  "config*",
  "folders*",
  "count*",
  "plan*",
  "scaling*",
  "tokenizer*",
  "wire*",
  "layout",
  "weights",
  "kernels",
  "model",
  "files",
  "data",
  "train",
  "stage",
  "engine",
  "pipeline",
  "serve",
  "measure",
  "api",
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


def module_of(path: Path) -> str:
  parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(files: dict[str, Path]) -> dict[str, set[str]]:
  """Modules by the modules they import, wherever in the file; `from package import module` is the module."""
  graph: dict[str, set[str]] = {}
  for module, path in files.items():
    used = graph[module] = set()
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        used |= {alias.name for alias in node.names}
      elif isinstance(node, ast.ImportFrom):
        for alias in node.names:
          inner = f"{node.module}.{alias.name}"
          used.add(inner if inner in files else str(node.module))
    used &= set(files)
    used.discard(module)
  return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
  """Modules of a circle, or an empty list."""
  left = {module: set(used) for module, used in graph.items()}
  while free := [module for module, used in left.items() if not used & set(left)]:
    for module in free:
      del left[module]
  if not left:
    return []
  path = [min(left)]
  while True:
    path.append(min(left[path[-1]] & set(left)))
    if path[-1] in path[:-1]:
      return path[path.index(path[-1]) :]


def test_files_import_each_other_in_no_circle():
  found = circle(import_graph({module_of(path): path for path in FILES}))
  assert not found, " -> ".join(found)


def test_a_circle_is_found():
  assert circle({"a": {"b"}, "b": set()}) == []
  assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_the_checks_can_fail(tmp_path: Path):
  bad = tmp_path / "bad.py"
  bad.write_text("def f():\n  from neurojax import cli\n  import jax.numpy\n")
  assert imports(bad) == {"neurojax.cli", "jax.numpy"}
