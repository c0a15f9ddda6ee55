"""Golden files: prompts with the exact tokens that a reference gave, to compare an engine with."""

import contextlib
import dataclasses
import datetime
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

import neurojax
from neurojax.config import Sampling
from neurojax.engine.api import Engine, EngineError, Request, Token
from neurojax.files.put import stored
from neurojax.tokenizer.tokenizer import Tokenizer

EXCUSED_MARGIN = 0.02
"""Below this margin, in nats, another order of summation may choose the runner-up."""

PROMPTS = (
  "The capital of France is",
  "Once upon a time there was a little robot who",
  "def fibonacci(n):\n",
  "The three most important things in life are",
  "Q: What is 12 times 12?\nA:",
  "El agua hierve a",
  "In 1969 the first people",
  "1, 2, 3, 4, 5,",
)
"""Prompts for models of general text."""

_SURE = 1 / (1 + math.exp(-EXCUSED_MARGIN))
"""A token at least as probable as this is ahead of any other by EXCUSED_MARGIN or more."""

_DRAWS = 64
"""Draws from the two likeliest tokens, almost equally often each, until the second one comes."""


@dataclasses.dataclass(frozen=True)
class Case:
  """A prompt and its greedy answer.

  Attributes:
    prompt: Text.
    prompt_tokens: Token ids of the prompt.
    tokens: Token ids of the answer.
    logprobs: Natural logarithm of each token's probability.
    margins: Log-probability of each token minus that of the runner-up, in nats. Where the margin is
      larger than `EXCUSED_MARGIN` this may be a lower bound of it.
    text: The answer as text; only for people.
  """

  prompt: str
  prompt_tokens: list[int]
  tokens: list[int]
  logprobs: list[float]
  margins: list[float]
  text: str | None


@dataclasses.dataclass(frozen=True)
class GoldenFile:
  """The content of a golden file.

  Attributes:
    file: Name of the model file.
    sha256: Digest of the model file; None if the golden file does not say.
    cases: At least one.
  """

  file: str
  sha256: str | None
  cases: tuple[Case, ...]


@dataclasses.dataclass(frozen=True)
class Verdict:
  """The result of comparing an engine with one case.

  Attributes:
    prompt: Text of the prompt.
    ok: Whether the engine agrees with the case.
    equal: Number of tokens that are equal before the first difference.
    length: Number of tokens in the case.
    first_difference: Index of the first token that differs; None if none does.
    margin: The known margin of that token.
    logprob_difference: Largest difference of log-probabilities over the tokens judged.
    note: Reasons for the verdict, in words; empty if nothing differs.
  """

  prompt: str
  ok: bool
  equal: int
  length: int
  first_difference: int | None
  margin: float | None
  logprob_difference: float
  note: str


def read_prompts(path: Path) -> tuple[str, ...]:
  """Read prompts from a UTF-8 text, one on each line; empty lines are skipped.

  Raises: ValueError: there is none, or the text is not UTF-8.
  """
  try:
    lines = path.read_text(encoding="utf-8").splitlines()
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: not UTF-8 at byte {error.start}: convert it first") from error
  prompts = tuple(line for line in lines if line.strip())
  if not prompts:
    raise ValueError(f"{path}: no prompt in it: write one on each line")
  return prompts


async def make(engine: Engine, tokenizer: Tokenizer, prompt: str, *, max_tokens: int) -> Case:
  """Answer a prompt greedily and note how sure each token is.

  Args:
    max_tokens: Most tokens of the answer; it ends earlier after a stop token.
  Raises: ValueError: as `Engine.generate` does. EngineError: likewise, or the engine's draws make no
    sense.
  """
  ids = tokenizer.encode(prompt, parse_special=True, add_special=True)
  request = Request(prompt=ids, max_tokens=max_tokens, stop_ids=tokenizer.stop_ids)
  answer = await _collect(engine, request)
  tokens = [token.id for token in answer]
  margins = [await _margin(engine, [*ids, *tokens[: token.index]], token) for token in answer]
  logprobs = [token.logprob for token in answer]
  return Case(prompt, ids, tokens, logprobs, margins, tokenizer.decode(tokens))


async def _margin(engine: Engine, before: list[int], token: Token) -> float:
  """Compute the margin of a greedy token, or a lower bound of at least EXCUSED_MARGIN.

  The runner-up is found by drawing from the two likeliest tokens at a high temperature, so that any
  engine can be asked.
  """
  if math.exp(token.logprob) > _SURE:
    # All the other tokens together are no likelier than this.
    return token.logprob - math.log(max(-math.expm1(token.logprob), 1e-9))
  for seed in range(_DRAWS):
    sampling = Sampling(temperature=100.0, top_k=2, seed=seed)
    request = Request(prompt=before, max_tokens=1, sampling=sampling)
    [drawn] = await _collect(engine, request)
    if drawn.id != token.id:
      return max(0.0, token.logprob - drawn.logprob)
  raise EngineError(
    f"{_DRAWS} draws from the two likeliest tokens after {before[-4:]} were all equal"
  )


async def _collect(engine: Engine, request: Request) -> list[Token]:
  async with contextlib.aclosing(engine.generate(request)) as tokens:
    return [token async for token in tokens]


def write_golden(
  path: Path, cases: Sequence[Case], *, file: str, sha256: str, engine: Mapping[str, object]
) -> None:
  """Write a golden file, with the versions and the date of its making.

  Args:
    file: Name of the model file.
    sha256: Digest of the model file.
    engine: The serving and the number of stages; only for people.
  """
  table = {
    "file": file,
    "sha256": sha256,
    "engine": dict(engine),
    "versions": {"neurojax": neurojax.__version__, "jax": jax.__version__},
    "date": datetime.date.today().isoformat(),
    "cases": [dataclasses.asdict(case) for case in cases],
  }
  with stored(path) as out:
    out.write((json.dumps(table, ensure_ascii=False, indent=1) + "\n").encode())


def read_golden(path: Path) -> GoldenFile:
  """Read a golden file.

  Raises: ValueError: the format is another; names the case and the field.
  """
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
  """Tokenize the prompt of a case, answer it greedily, and compare up to the first difference.

  Args:
    tolerance: Largest difference of log-probabilities that is equal, in nats.
  """
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
