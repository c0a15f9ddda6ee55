"""Comparing an engine's greedy answers with known ones."""

import contextlib
import dataclasses
import json
import math
from pathlib import Path

from neurojax.engine.api import Engine, Request
from neurojax.tokenizer.tokenizer import Tokenizer

EXCUSED_MARGIN = 0.02
"""Below this margin another rounding may choose the runner-up."""


@dataclasses.dataclass(frozen=True)
class Case:
  """A prompt and its greedy answer. margins: see `EXCUSED_MARGIN`; natural logarithms all."""

  prompt: str
  prompt_tokens: list[int]
  tokens: list[int]
  logprobs: list[float]
  margins: list[float]
  text: str | None


@dataclasses.dataclass(frozen=True)
class GoldenFile:
  file: str
  sha256: str | None
  cases: tuple[Case, ...]


@dataclasses.dataclass(frozen=True)
class Verdict:
  """How one case went.

  Attributes:
    equal: Tokens equal before the first difference, of `length`.
    first_difference: Its index; None if there is none.
    margin: The known margin there.
    logprob_difference: Largest one over the tokens judged.
  """

  prompt: str
  ok: bool
  equal: int
  length: int
  first_difference: int | None
  margin: float | None
  logprob_difference: float
  note: str


def read_golden(path: Path) -> GoldenFile:
  """Raises: ValueError: not the format; names the case and the field."""
  try:
    table = json.loads(path.read_text(encoding="utf-8"))
  except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
    raise ValueError(f"{path}: not valid JSON: {error}") from error
  if not isinstance(table, dict) or not isinstance(table.get("cases"), list) or not table["cases"]:
    raise ValueError(f"{path}: expected an object with a non-empty list of cases")
  cases = []
  for index, raw in enumerate(table["cases"]):
    where = f"{path}: case {index}"
    if not isinstance(raw, dict):
      raise ValueError(f"{where}: expected an object")
    for name, kind in (
      ("prompt", str),
      ("prompt_tokens", list),
      ("tokens", list),
      ("logprobs", list),
      ("margins", list),
    ):
      if not isinstance(raw.get(name), kind):
        raise ValueError(f"{where}: {name} is missing or no {kind.__name__}")
    kinds = (
      ("prompt_tokens", int),
      ("tokens", int),
      ("logprobs", int | float),
      ("margins", int | float),
    )
    for name, kind in kinds:
      bad = next((v for v in raw[name] if not isinstance(v, kind) or isinstance(v, bool)), None)
      if bad is not None or None in raw[name]:
        raise ValueError(f"{where}: {name} holds {bad!r}, which is no number")
    if not raw["tokens"] or not len(raw["tokens"]) == len(raw["logprobs"]) == len(raw["margins"]):
      raise ValueError(f"{where}: tokens, logprobs and margins must be equally many, and some")
    cases.append(
      Case(
        raw["prompt"],
        raw["prompt_tokens"],
        raw["tokens"],
        raw["logprobs"],
        raw["margins"],
        raw.get("text"),
      )
    )
  if not isinstance(table.get("sha256"), str | None):
    raise ValueError(f"{path}: sha256 = {table['sha256']!r}: expected a string")
  return GoldenFile(str(table.get("file", path)), table.get("sha256"), tuple(cases))


async def judge(engine: Engine, tokenizer: Tokenizer, case: Case, *, tolerance: float) -> Verdict:
  """Tokenize the prompt, answer greedily, and compare up to the first excused difference."""
  prompt = tokenizer.encode(case.prompt, parse_special=True, add_special=True)
  notes = []
  if prompt != case.prompt_tokens:
    notes.append(f"prompt tokens differ: {prompt[:8]}... and {case.prompt_tokens[:8]}...")
  request = Request(prompt=case.prompt_tokens, max_tokens=len(case.tokens))
  equal, difference, worst = 0, None, 0.0
  async with contextlib.aclosing(engine.generate(request)) as tokens:
    async for token in tokens:
      if token.id != case.tokens[token.index]:
        difference = token.index
        break
      equal += 1
      apart = abs(token.logprob - case.logprobs[token.index])
      worst = max(worst, apart if math.isfinite(apart) else math.inf)
  margin = case.margins[difference] if difference is not None else None
  excused = margin is not None and margin < EXCUSED_MARGIN
  if difference is not None:
    notes.append("excused: a near tie" if excused else "the tokens differ")
  if worst > tolerance:
    notes.append(f"log-probabilities differ by more than {tolerance}")
  ok = prompt == case.prompt_tokens and worst <= tolerance and (difference is None or excused)
  return Verdict(
    case.prompt, ok, equal, len(case.tokens), difference, margin, worst, "; ".join(notes)
  )
