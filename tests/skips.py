"""Fails a run in which a test was skipped that `tests/skips.txt` does not name with its reason."""

import collections
import dataclasses
import fnmatch
from pathlib import Path

import pytest

LIST = Path(__file__).parent / "skips.txt"


@dataclasses.dataclass(frozen=True)
class Allowed:
  """A line of the list: tests that may be skipped, and the reason pytest must be given.

  Attributes:
    tests: Pattern of test ids, for `fnmatch`.
    reason: Pattern of the reason, for `fnmatch`.
    line: Number of the line in the list.
  """

  tests: str
  reason: str
  line: int


def read(path: Path) -> tuple[Allowed, ...]:
  """Read a list. Raises ValueError: a line is not `TESTS -> REASON`."""
  found = []
  for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
    if not line.strip() or line.startswith("#"):
      continue
    tests, arrow, reason = (part.strip() for part in line.partition(" -> "))
    if not (tests and arrow and reason):
      raise ValueError(f"{path}:{number} is not TESTS -> REASON: {line}")
    found.append(Allowed(tests, reason, number))
  return tuple(found)


class Skips:
  """A pytest plugin that compares the skipped tests of a run with a list.

  Under xdist it works in the process that collects the workers' reports.
  """

  def __init__(self, path: Path = LIST) -> None:
    self.path = path
    self.allowed = read(path)
    self.counts: collections.Counter[Allowed] = collections.Counter()
    self.unlisted: dict[str, str] = {}

  def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
    # An expected failure is reported as skipped too.
    if report.skipped and not hasattr(report, "wasxfail"):
      self._count(report)

  def pytest_collectreport(self, report: pytest.CollectReport) -> None:
    if report.skipped:
      self._count(report)

  def pytest_sessionfinish(self, session: pytest.Session) -> None:
    if self.unlisted and session.exitstatus in (
      pytest.ExitCode.OK,
      pytest.ExitCode.NO_TESTS_COLLECTED,
    ):
      session.exitstatus = pytest.ExitCode.TESTS_FAILED

  def pytest_terminal_summary(self, terminalreporter, config: pytest.Config) -> None:
    if self.counts:
      counts: collections.Counter[str] = collections.Counter()
      for line, count in self.counts.items():
        counts[line.reason] += count
      text = "; ".join(f"{count} {reason}" for reason, count in counts.most_common())
      terminalreporter.write_line(f"skipped: {text}")
    for test, reason in self.unlisted.items():
      text = f"{test} was skipped, and {self.path.name} does not name it with: {reason}"
      terminalreporter.write_line(text, red=True)
    unused = [str(line.line) for line in self.allowed if line not in self.counts]
    if unused and _whole(config):
      text = f"warning: no test was skipped by these lines of {self.path.name}: {', '.join(unused)}"
      terminalreporter.write_line(text, yellow=True)

  def _count(self, report: pytest.TestReport | pytest.CollectReport) -> None:
    reason = _reason(report)
    for line in self.allowed:
      if fnmatch.fnmatchcase(report.nodeid, line.tests) and fnmatch.fnmatchcase(
        reason, line.reason
      ):
        self.counts[line] += 1
        return
    self.unlisted[report.nodeid] = reason


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
  text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
  return text.removeprefix("Skipped: ")


def _whole(config: pytest.Config) -> bool:
  """Tell whether every test of the project was asked for."""
  selected = any(
    config.getoption(name, None)
    for name in ("keyword", "markexpr", "deselect", "lf", "ignore", "ignore_glob", "maxfail")
  )
  return config.args_source is pytest.Config.ArgsSource.TESTPATHS and not selected
