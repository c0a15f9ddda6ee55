"""The list of allowed skips: a skip that it does not name fails the run."""

from pathlib import Path

import pytest

from tests import skips

pytest_plugins = ["pytester"]

TESTS = """
import pytest

def test_that_runs():
  pass

@pytest.mark.skip(reason="there is no GPU at /dev/gpu0")
@pytest.mark.parametrize("n", [1, 2])
def test_on_a_gpu(n):
  pass

@pytest.mark.xfail(reason="known")
def test_of_a_known_defect():
  raise ValueError
"""

UNNEEDED = ("cacheprovider", "hypothesispytest", "anyio", "timeout")


@pytest.fixture
def ran(pytester: pytest.Pytester):
  """Run TESTS, or another text, under a list of allowed skips: in this process, or with a worker."""
  pytester.makeini("[pytest]\ntestpaths = test_a.py")
  # Of this process: 8 devices and the like would only take time.
  root = Path(skips.__file__).parents[1]
  pytester.makeconftest(
    f"import sys; sys.path.insert(0, {str(root)!r})\n"
    "from pathlib import Path\n"
    "from tests import skips\n"
    "def pytest_configure(config):\n"
    "  config.pluginmanager.register(skips.Skips(Path('skips.txt')))\n"
  )

  def run(allowed: str, *arguments: str, tests: str = TESTS) -> pytest.RunResult:
    pytester.path.joinpath("skips.txt").write_text(allowed, encoding="utf-8")
    pytester.path.joinpath("test_a.py").write_text(tests, encoding="utf-8")
    # Plugins that these tests do not need take longer to import than all tests to run.
    unneeded = (word for name in UNNEEDED for word in ("-p", f"no:{name}"))
    return pytester.runpytest_inprocess(*unneeded, *arguments)

  return run


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "xdist"])
def test_a_listed_skip_passes_and_is_counted(ran, workers):
  result = ran("# a comment\n\ntest_a.py::test_on_a_gpu* -> there is no GPU*\n", *workers)
  assert result.ret == 0
  result.stdout.fnmatch_lines(["skipped: 2 there is no GPU*"])
  assert "warning: no test was skipped" not in result.stdout.str()


@pytest.mark.parametrize(
  ("allowed", "workers"),
  [
    ("", ()),
    ("test_a.py::test_on_a_gpu[[]1] -> there is no GPU*", ()),
    ("test_a.py::test_on_a_gpu[[]1] -> there is no GPU*", ("-n", "1")),
    ("test_a.py::test_on_a_gpu* -> there is no TPU*", ()),
    ("test_b.py::* -> there is no GPU*", ()),
  ],
)
def test_another_skip_fails_the_run_and_is_named(ran, allowed, workers):
  result = ran(allowed, *workers)
  assert result.ret == 1
  result.stdout.fnmatch_lines(["test_a.py::test_on_a_gpu?2? was skipped, *there is no GPU at *"])


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "xdist"])
def test_a_module_that_skips_itself_is_a_skip_too(ran, workers):
  module = "import pytest\npytest.skip('not here', allow_module_level=True)\n"
  assert ran("", *workers, tests=module).ret == 1
  assert ran("test_a.py -> not here\n", *workers, tests=module).ret != 1


def test_lines_that_match_nothing_are_said_where_every_test_runs(ran):
  allowed = "test_a.py::test_on_a_gpu* -> there is no GPU*\ntest_b.py -> *\n"
  whole, part = ran(allowed), ran(allowed, "-k", "gpu")
  assert (whole.ret, part.ret) == (0, 0)
  whole.stdout.fnmatch_lines(["warning: no test was skipped by these lines of skips.txt: 2"])
  assert "warning: no test" not in part.stdout.str()


def test_a_line_without_a_reason_is_refused(tmp_path: Path):
  path = tmp_path / "skips.txt"
  path.write_text("tests/a.py\n")
  with pytest.raises(ValueError, match=r"skips\.txt:1 is not TESTS -> REASON"):
    skips.read(path)
