"""What the README shows comes from what experiments measured."""

from experiments.cpu_decode import run
from experiments.readme import block


def test_the_readmes_table_is_the_one_of_the_results_file():
  assert block("cpu_decode") == run.table()


def test_the_readme_shows_the_demo_and_its_verdict():
  assert "$ make demo" in block("demo") and "same tokens" in block("demo")
