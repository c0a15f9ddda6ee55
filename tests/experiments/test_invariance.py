"""The comparison of bits, on a small model by the reference kernels."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.invariance import run


def test_every_program_is_compared_and_timed(capsys: pytest.CaptureFixture[str]):
  case, parts = run.small(), ("layers", "keys", "values", "logits")
  assert run.main(["--small"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == len(parts) * (len(case.widths) + len(case.lengths))
  for what, counts in (("decode", case.widths), ("prefill", case.lengths)):
    for rows in counts:
      compared = [line.split() for line in lines if line.split()[1:3] == [what, str(rows)]]
      assert sorted(words[3] for words in compared) == sorted(parts)
      for words in compared:
        # All rows are compared, with those of the widest: that one with itself.
        equal, of = int(words[4]), int(words[6])
        tokens = rows if what == "decode" else max(case.lengths)
        assert of == (tokens // case.every if (what, words[3]) == ("prefill", "logits") else tokens)
        assert equal == of if rows == max(counts) else 0 <= equal <= of
        assert float(words[10].rstrip(",")) < 0.05


def test_a_single_bit_is_a_difference():
  rows = {"layers": np.ones((3, 4), jnp.bfloat16)}
  other = {"layers": np.ones((5, 4), jnp.bfloat16)}
  assert list(run.compare(rows, other)) == [("layers", 3, 3, 0.0)]
  other["layers"][1, 2] = np.nextafter(other["layers"][1, 2], jnp.bfloat16(2))
  [(_, equal, of, difference)] = run.compare(rows, other)
  assert (equal, of) == (2, 3) and 0 < difference < 0.01
  rows["layers"][0, 0] = np.nan
  with pytest.raises(ValueError, match="not finite"):
    list(run.compare(rows, other))


def test_chunks_divide_the_prompt_and_rows_fit_the_slots():
  case = run.small()
  assert all(max(case.lengths) % length == 0 for length in case.lengths)
  assert max(case.lengths) < case.capacity and max(case.widths) <= case.slots
  assert min(case.lengths) >= case.every


def test_without_a_gpu_it_says_what_it_needs(capsys: pytest.CaptureFixture[str]):
  assert run.main([]) == 1
  assert "--small" in capsys.readouterr().err
