"""The documentation: its numbers, commands, links, words and figures are those of the project."""

import contextlib
import functools
import io
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import experiments.cache_int8.run
import experiments.cpu_decode.run
import experiments.cpu_ternary.run
import experiments.engine_load.run
import experiments.gpu_decode.run
import experiments.numbers
import neurojax
from experiments.readme import DOCS, README, block, runnable, scratch
from tests.test_rooms import ORDER

ROOT = README.parent
PAGES = [README, *sorted(DOCS.glob("*.md"))]
EXPERIMENTS = ROOT / "experiments"


def named(path: Path) -> str:
  return str(path.relative_to(ROOT))


# ---- numbers


@pytest.mark.parametrize(
  "name", ["cpu_decode", "cpu_ternary", "gpu_decode", "engine_load", "cache_int8"]
)
def test_tables_are_those_of_the_results_files(name: str):
  assert block(name, path=DOCS / "running.md") == getattr(experiments, name).run.table()


def test_tables_of_several_results_files():
  assert block("numbers") == experiments.numbers.readme_table()
  assert block("weights", path=DOCS / "running.md") == experiments.numbers.weights_table()


def test_the_first_training_was_run_as_printed():
  text = block("first_training", path=DOCS / "training.md")
  [(_, commands), *_] = runnable(DOCS / "training.md")
  shown = [line for line in text.splitlines() if line.startswith("$ neurojax ")]
  assert len(shown) == len(commands.splitlines())
  assert "step 300/300" in text and re.search(r"Together \d+ s on \d+ cores", text)


# ---- commands


def commands(path: Path) -> list[str]:
  """Every command line of a page: of sh blocks, indented blocks, transcripts, and inline code."""
  text = path.read_text(encoding="utf-8")
  found = []
  for language, inside in re.findall(r"^```(\w*).*?\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
    if language == "sh":
      found += inside.replace("\\\n", " ").splitlines()
    elif not language:
      found += re.findall(r"^\$ (.*)$", inside, re.MULTILINE)
  outside = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
  found += re.findall(r"^    (?:[\w-]+\$ )?(\S.*)$", outside, re.MULTILINE)
  found += re.findall(r"`(neurojax [^`]*)`", outside)
  return found


def invocations(path: Path) -> list[list[str]]:
  """Arguments of each call of neurojax on a page, as far as the page gives them."""
  found = []
  for line in commands(path):
    for part in re.split(r"\s\|\s", line.split("  #")[0]):
      words = shlex.split(part.partition(" > ")[0])
      if words and Path(words[0]).name == "neurojax":
        found.append(words[1:])
  return found


@functools.cache
def help_of(*verb: str) -> str:
  from neurojax.cli import main

  out = io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
    assert main([*verb, "--help"]) == 0
  return out.getvalue()


GROUPS = ("data", "eval", "bench")


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_pages_name_only_verbs_and_options_that_exist(path: Path):
  for words in invocations(path):
    if not words or words[0] in ("VERB", "--help", "--version"):
      continue
    verb = words[: 2 if words[0] in GROUPS and len(words) > 1 else 1]
    text = help_of(*verb)
    assert f"usage: neurojax {' '.join(verb)}" in text, f"{named(path)}: no verb {verb}"
    for option in (word.partition("=")[0] for word in words if re.match(r"--\w", word)):
      if verb == ["train"] and option not in text:
        continue  # keys of the configuration: tests/train
      assert re.search(rf"{option}\b(?!-)", text), f"{named(path)}: {verb} has no {option}"


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_words_in_prose_that_look_like_options_exist(path: Path):
  prose = re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
  every = " ".join([help_of(), *(help_of(*verb) for verb in _verbs())])
  for option in re.findall(r"`[^`]*?(--[a-z][\w-]*)[^`.]*`", prose):
    if option not in ("--tracker", "--no-deps"):
      assert re.search(rf"{option}\b(?!-)", every), f"{named(path)}: no verb has {option}"


def _verbs() -> list[tuple[str, ...]]:
  from neurojax.cli.verbs import VERBS

  return [tuple(name.split()) for name in VERBS]


@pytest.mark.optimized
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", [path for path in PAGES if runnable(path)], ids=named)
def test_blocks_marked_run_run_as_printed(path: Path, tmp_path: Path):
  environment = scratch(tmp_path)
  for language, text in runnable(path):
    program = ["sh", "-e"] if language == "sh" else [sys.executable]
    done = subprocess.run(
      program, input=text, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert done.stdout.strip(), f"nothing was printed by\n{text}"


# ---- links, words, figures


def anchors(path: Path) -> set[str]:
  heads = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
  return {re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-") for head in heads}


EVERY_PAGE = [*PAGES, *sorted(EXPERIMENTS.rglob("*.md")), ROOT / "neurojax/packaged/README.md"]


@pytest.mark.parametrize("path", EVERY_PAGE, ids=named)
def test_links_resolve(path: Path):
  for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
    if re.match(r"https?://", target):
      continue
    file, _, anchor = target.partition("#")
    where = (path.parent / file).resolve() if file else path
    assert where.exists(), f"{named(path)}: no {target}"
    assert not anchor or anchor in anchors(where), f"{named(path)}: no {target}"


def test_every_page_is_reached_from_the_readme():
  seen, todo = set(), [README]
  while todo:
    path = todo.pop()
    if path in seen:
      continue
    seen.add(path)
    for target in re.findall(r"\]\(([^)#\s]+\.md)", path.read_text(encoding="utf-8")):
      todo.append((path.parent / target).resolve())
  assert set(PAGES) <= seen
  assert {
    folder / "README.md" for folder in EXPERIMENTS.iterdir() if (folder / "run.py").exists()
  } <= seen


def terms() -> list[str]:
  rows = re.findall(r"^\| ([^|]+) \|", (DOCS / "glossary.md").read_text("utf-8"), re.MULTILINE)
  return [term.strip() for row in rows[1:] if set(row) - set("- ") for term in row.split(",")]


@pytest.mark.parametrize("term", terms())
def test_every_term_of_the_glossary_is_used(term: str):
  """In the package or on a page, else nobody needs the word."""
  pattern = re.compile(rf"\b{re.escape(term)}(s|es)?\b", re.IGNORECASE)
  pages = (path for path in PAGES if path.name != "glossary.md")
  sources = sorted((ROOT / "neurojax").rglob("*.py"))
  assert any(pattern.search(path.read_text(encoding="utf-8")) for path in (*pages, *sources))


def test_figures_are_what_their_script_draws():
  drawn = runpy.run_path(str(DOCS / "figures" / "draw.py"))["FIGURES"]
  assert {path.name for path in (DOCS / "figures").glob("*.svg")} == set(drawn)
  for name, draw in drawn.items():
    assert (DOCS / "figures" / name).read_text(encoding="utf-8") == draw()


def test_the_python_interface_is_described_as_its_docstrings_say():
  made = runpy.run_path(str(DOCS / "names.py"))
  assert sorted(sum(made["GROUPS"].values(), ("__version__",))) == neurojax.__all__
  assert block("names", path=DOCS / "python.md") == made["reference"](), "run: python docs/names.py"


def test_every_room_is_named():
  text = (DOCS / "concepts.md").read_text(encoding="utf-8")
  for room in ORDER:
    assert re.search(rf"`{room}(\.py)?`", text), f"docs/concepts.md names no room {room}"


def test_the_readme_stays_short():
  assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_index_of_experiments_has_all_of_them():
  text = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
  for folder in EXPERIMENTS.iterdir():
    if (folder / "run.py").exists():
      assert f"[{folder.name}]({folder.name}/README.md)" in text
