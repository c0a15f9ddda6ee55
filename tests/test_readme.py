"""Demo, packaged model's card and sizes show what experiments measured; tests/test_docs.py has the rest."""

import experiments.embedded.run
import experiments.seed_sizes.run
from experiments.readme import block


def test_the_packaged_models_card_has_the_tables_of_the_results_files():
  card = (experiments.embedded.run.MODELS / "README.md").read_text(encoding="utf-8")
  assert experiments.embedded.run.losses_table() in card
  assert experiments.embedded.run.perplexity_table() in card


def test_the_readme_shows_the_demo_and_its_verdict():
  assert "$ make demo" in block("demo") and "same tokens" in block("demo")


def test_the_seeds_sizes_and_the_transcript_are_what_is_counted_now(tmp_path):
  run = experiments.seed_sizes.run
  run.measure(tmp_path / "results.csv")
  assert (tmp_path / "results.csv").read_text() == run.RESULTS.read_text()
  run.check()
  assert block("seed_sizes", path=run.README) == run.table()
  assert block("size", path=run.SIZING) == run.transcript()
  assert block("plan", path=run.SIZING) == run.printed("plan", run.PLAN)
  assert block("simulate", path=run.SIZING) == run.printed("simulate", run.SIMULATE)
