"""Perplexity and golden comparison, over engines whose numbers are known by hand."""

import asyncio
import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurojax.engine.api import EngineError, Request, Scores, Token
from neurojax.engine.fake import FakeEngine
from neurojax.measure.quality.golden import (
  EXCUSED_MARGIN,
  Case,
  judge,
  make,
  read_golden,
  read_prompts,
  write_golden,
)
from neurojax.measure.quality.perplexity import perplexity, windows
from tests.engine.test_text import TOKENIZER
from tests.tinymodel import VOCAB


class Recorder(FakeEngine):
  """Log-probability of a token is -id/100; keeps what it was asked."""

  def __init__(self, **sizes: int):
    super().__init__(vocab_size=len(VOCAB), **sizes)
    self.asked: list[tuple[list[int], int]] = []

  async def score(self, tokens, *, first=1, top=0):
    self.asked.append((list(tokens), first))
    return Scores(np.array([-token / 100 for token in tokens[first:]], np.float32))


def measure(text: str, **options):
  engine = Recorder()
  result = asyncio.run(perplexity(engine, TOKENIZER, text, **options))
  return engine, result


def test_llama_cpps_windows_score_the_second_half_after_a_bos():
  text = "abcdefghij" * 3
  ids = TOKENIZER.encode(text, add_special=True)
  engine, result = measure(text, ctx=8)
  assert [first for _, first in engine.asked] == [5] * (len(ids) // 8)
  for index, (tokens, _) in enumerate(engine.asked):
    assert tokens == [TOKENIZER.bos_id, *ids[8 * index + 1 : 8 * index + 8]]
  scored = [t for i in range(len(ids) // 8) for t in ids[8 * i + 5 : 8 * i + 8]]
  assert result.tokens == len(scored) and result.windows == len(ids) // 8
  assert result.nll == pytest.approx(np.mean(scored) / 100)
  assert result.perplexity == pytest.approx(math.exp(result.nll))
  _, two = measure(text, ctx=8, chunks=2)
  assert two.windows == 2 and two.tokens == 6


@given(length=st.integers(2, 200), ctx=st.integers(4, 40), stride=st.integers(1, 40))
def test_strided_windows_score_every_token_but_the_first_exactly_once(length, ctx, stride):
  stride = min(stride, ctx - 1)
  scored = []
  for start, end, first in windows(length, ctx=ctx, stride=stride):
    assert 0 <= start < end <= length and end - start <= ctx and first >= 1
    scored += range(start + first, end)
  assert scored == list(range(1, length))


@pytest.mark.parametrize(
  ("options", "named"),
  [
    ({"ctx": 3}, "ctx = 3"),
    ({"ctx": 65}, "context is 64"),
    ({"ctx": 8, "stride": 8}, "stride = 8"),
    ({"ctx": 8, "stride": 0}, "stride = 0"),
    ({"ctx": 8, "chunks": 0}, "chunks = 0"),
    ({"ctx": 64}, "at least 64 are needed"),
  ],
)
def test_bad_measures_are_refused(options: dict, named: str):
  with pytest.raises(ValueError, match=named):
    measure("abc", **options)


# The fake engine answers (sum of the prompt + i) with log-probability -log(vocab).
PROMPT = "ab"
IDS = TOKENIZER.encode(PROMPT, parse_special=True, add_special=True)
ANSWER = [(sum(IDS) + i) % len(VOCAB) for i in range(6)]
LOGPROB = -math.log(len(VOCAB))
GOOD = Case(PROMPT, IDS, ANSWER, [LOGPROB] * 6, [1.0] * 6, None)


def verdict(case: Case, tolerance: float = 0.003):
  engine = FakeEngine(vocab_size=len(VOCAB))
  return asyncio.run(judge(engine, TOKENIZER, case, tolerance=tolerance))


def test_an_equal_case_passes():
  found = verdict(GOOD)
  assert found.ok and found.equal == 6 and found.first_difference is None and found.note == ""


@pytest.mark.parametrize(("margin", "ok"), [(0.0199, True), (0.02, False), (0.5, False)])
def test_a_difference_is_excused_by_a_small_margin_alone(margin: float, ok: bool):
  tokens = [*ANSWER[:3], 0, 0, 0]
  # What comes after an excused difference is not judged: its log-probability is far off.
  logprobs = [*[LOGPROB] * 4, -99.0, -99.0]
  margins = [1.0, 1.0, 1.0, margin, 1.0, 1.0]
  found = verdict(dataclasses.replace(GOOD, tokens=tokens, logprobs=logprobs, margins=margins))
  assert (
    found.ok is ok and found.first_difference == 3 and found.margin == margin and found.equal == 3
  )


def test_a_log_probability_that_is_off_fails():
  off = dataclasses.replace(GOOD, logprobs=[*[LOGPROB] * 5, LOGPROB + 0.0031])
  assert not verdict(off).ok and verdict(off, tolerance=0.004).ok
  assert not verdict(dataclasses.replace(GOOD, logprobs=[math.nan] * 6)).ok


def test_prompt_tokens_that_differ_fail():
  found = verdict(dataclasses.replace(GOOD, prompt="ba"))
  assert not found.ok and "prompt tokens differ" in found.note


@pytest.mark.parametrize(
  ("change", "named"),
  [
    ("[]", "non-empty list of cases"),
    ("{", "not valid JSON"),
    ({"cases": []}, "non-empty list"),
    ({"cases": [3]}, "case 0: expected an object"),
    ({"cases": [{"prompt": 1}]}, "prompt is missing or no str"),
    ({"cases": [dataclasses.asdict(GOOD) | {"margins": [1.0]}]}, "equally many"),
    ({"cases": [dataclasses.asdict(GOOD) | {"margins": ["a"] * 6}]}, "margins holds 'a'"),
    ({"cases": [dataclasses.asdict(GOOD) | {"logprobs": [None] * 6}]}, "logprobs holds None"),
    ({"cases": [dataclasses.asdict(GOOD)], "sha256": 5}, "sha256 = 5"),
  ],
)
def test_golden_files_that_are_none_are_refused(tmp_path, change, named: str):
  path = tmp_path / "golden.json"
  path.write_text(change if isinstance(change, str) else json.dumps(change))
  with pytest.raises(ValueError, match=named):
    read_golden(path)


def test_golden_files_read_back(tmp_path):
  path = tmp_path / "golden.json"
  path.write_text(json.dumps({"file": "f", "sha256": "s", "cases": [dataclasses.asdict(GOOD)]}))
  golden = read_golden(path)
  assert golden.cases == (GOOD,) and (golden.file, golden.sha256) == ("f", "s")


class TwoAhead(FakeEngine):
  """After token x, x + 1 has the probability `first` and x + 2 `second`; draws take it every third seed."""

  def __init__(self, first: float, second: float, *, draws: bool = True):
    super().__init__(vocab_size=len(VOCAB))
    self.first, self.second, self.draws, self.drawn = first, second, draws, 0

  async def generate(self, request: Request):
    sampling, last = request.sampling, request.prompt[-1]
    if sampling.temperature:
      assert sampling.top_k == 2 and request.max_tokens == 1
      self.drawn += 1
      if self.draws and sampling.seed % 3 == 2:
        yield Token(last + 2, math.log(self.second), 0, "length")
        return
    for index in range(request.max_tokens):
      reason = "length" if index + 1 == request.max_tokens else None
      yield Token(last + 1 + index, math.log(self.first), index, reason)


def made(engine: FakeEngine) -> Case:
  return asyncio.run(make(engine, TOKENIZER, PROMPT, max_tokens=6))


def test_a_case_that_is_made_holds_the_greedy_answer_and_is_agreed_with():
  engine = TwoAhead(0.4, 0.3)
  case = made(engine)
  assert (case.prompt, case.prompt_tokens) == (PROMPT, IDS)
  assert case.tokens == [IDS[-1] + 1 + i for i in range(6)]
  assert case.logprobs == [math.log(0.4)] * 6 and engine.drawn == 3 * 6
  assert case.margins == pytest.approx([math.log(0.4 / 0.3)] * 6)
  assert asyncio.run(judge(engine, TOKENIZER, case, tolerance=0.0)).ok


@pytest.mark.parametrize("first", [0.51, 0.9, 1.0])
def test_a_token_that_no_other_can_be_near_is_not_drawn_for(first: float):
  engine = TwoAhead(first, 0.0)
  case = made(engine)
  assert engine.drawn == 0 and min(case.margins) > EXCUSED_MARGIN
  assert all(math.isfinite(margin) for margin in case.margins)


def test_margins_are_never_negative_and_an_engine_that_draws_no_second_is_refused():
  assert made(TwoAhead(0.3, 0.3)).margins == [0.0] * 6
  with pytest.raises(EngineError, match="were all equal"):
    made(TwoAhead(0.3, 0.3, draws=False))


def test_a_golden_file_that_is_written_reads_back(tmp_path):
  path, case = tmp_path / "golden.json", made(TwoAhead(0.4, 0.3))
  write_golden(path, [case], file="m.gguf", sha256="s" * 64, engine={"dtype": "float32"})
  golden = read_golden(path)
  assert golden.cases == (case,) and (golden.file, golden.sha256) == ("m.gguf", "s" * 64)
  table = json.loads(path.read_text())
  assert set(table["versions"]) == {"neurojax", "jax"} and table["date"] >= "2026"


def test_prompts_are_lines(tmp_path):
  path = tmp_path / "prompts.txt"
  path.write_text("one\n\n two \n")
  assert read_prompts(path) == ("one", " two ")
  path.write_text(" \n")
  with pytest.raises(ValueError, match="one on each line"):
    read_prompts(path)
  path.write_bytes(b"\xff")
  with pytest.raises(ValueError, match="not UTF-8"):
    read_prompts(path)


def test_a_fake_request_is_what_a_person_computes():
  async def work():
    return [
      t async for t in FakeEngine(vocab_size=10).generate(Request(prompt=[4, 5], max_tokens=3))
    ]

  assert [t.id for t in asyncio.run(work())] == [9, 0, 1]
