"""Time answers with and without guesses of their next tokens, and check that their bits are the same.

python -m experiments.speculation.run                    (results.csv is written anew)
python -m experiments.speculation.run --model neurollm --answer 64 --repeats 2 --only-print
"""

import argparse
import asyncio
import dataclasses
import statistics
from collections.abc import Iterator
from pathlib import Path

from neurojax.api.opening import compiled, open_file, open_tokenizer, resolve
from neurojax.config import Sampling, Serving
from neurojax.config.serving import Speculate
from neurojax.engine.api import Request
from neurojax.engine.local import LocalEngine
from neurojax.files.model_file import ModelFile
from neurojax.kernels import timing
from neurojax.stage.compile import CompiledStage
from neurojax.tokenizer import encode_chat

RESULTS = Path(__file__).with_name("results.csv")
MODES: tuple[Speculate, ...] = ("off", "auto", "lookup")

PASSAGE = """Every morning the keeper of the lighthouse wrote three lines in a green notebook: the colour of the sea, the
number of ships that had passed, and the name of one bird. On the second of March he wrote that the sea was slate, that
four ships had gone north, and that a lapwing had slept on the gallery rail until the lamp was put out. On the third he
wrote that the sea was pewter, that no ship had passed, and that the lapwing had come back with a friend."""


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of results.csv.

  Attributes:
    text: "copy": the prompt's passage is to be written once more. "story": text at temperature 1.
    slots: Sequences that the engine has room for.
    together: Answers at the same time.
    mode: As `Serving.speculate`.
    tokens_per_s: Of all answers together, after the first token; median of the repeats.
    ratio: tokens_per_s beside "off", median over the repeats, each of which runs all modes in turn.
    least_ratio: The least of them.
    drafts: Guessed tokens that were computed, for each token of the answers.
    right: Share of them that were right.
  """

  model: str
  text: str
  slots: int
  together: int
  mode: str
  tokens_per_s: float
  ratio: float
  least_ratio: float
  drafts: float
  right: float


Answers = list[list[tuple[int, float]]]


async def answered(engine: LocalEngine, requests: list[Request]) -> tuple[Answers, float]:
  """The answers to requests that come together, and tokens a second."""
  gaps = []

  async def one(request: Request) -> list[tuple[int, float]]:
    found = []
    async for token in engine.generate(request):
      found.append((token.id, token.logprob))
      if token.times and token.times.mean_gap_s:
        gaps.append(token.times.mean_gap_s)
    return found

  answers = await asyncio.gather(*map(one, requests))
  return list(answers), sum(1 / gap for gap in gaps)


async def compared(
  name: str, stage: CompiledStage, text: str, requests: list[Request], repeats: int
) -> list[Row]:
  """One row for each mode. Modes take turns, as the machine may be shared."""
  engines = {mode: LocalEngine(stage, speculate=mode) for mode in MODES}
  rates: dict[str, list[float]] = {mode: [] for mode in MODES}
  wanted: Answers | None = None
  for repeat in range(repeats + 1):
    for mode, engine in engines.items():
      found, rate = await answered(engine, requests)
      wanted = wanted or found
      if found != wanted:
        raise AssertionError(f"{text}, {mode}: the answers have other tokens or bits")
      if repeat:  # The first turn compiles.
        rates[mode].append(rate)
  rows = []
  for mode, engine in engines.items():
    ratios = [a / b for a, b in zip(rates[mode], rates["off"], strict=True)]
    load = engine.load()
    rows.append(
      Row(
        name, text, stage.slots, len(requests), mode, round(statistics.median(rates[mode]), 1),
        round(statistics.median(ratios), 3), round(min(ratios), 3),
        round(load.drafts / load.answer_tokens, 3),
        round(load.right_drafts / load.drafts, 3) if load.drafts else 0.0,
      )
    )  # fmt: skip
    await engine.close()
  return rows


def requests_of(file: ModelFile, text: str, together: int, answer: int) -> list[Request]:
  tokenizer = open_tokenizer(file)

  if text == "copy":
    message = {"role": "user", "content": f"Repeat this text word for word:\n\n{PASSAGE}"}
    is_chat = tokenizer.spec.chat_template is not None
    prompt = (
      encode_chat(tokenizer, [message])
      if is_chat
      else tokenizer.encode(f"{PASSAGE}\n\n{PASSAGE[:60]}")
    )
    sampling = Sampling()
  else:
    prompt = tokenizer.encode("The old woman opened the door and")
    sampling = Sampling(temperature=1.0)
  return [
    Request(prompt=prompt, max_tokens=answer, sampling=dataclasses.replace(sampling, seed=seed))
    for seed in range(together)
  ]


def rows_of(model: str, slots: int, answer: int, repeats: int) -> Iterator[Row]:
  file = open_file(model)
  serving = Serving(sequences=slots, context=1024)
  stage = compiled(file, resolve(file, serving))
  for text in ("copy", "story"):
    for together in sorted({1, slots}):
      requests = requests_of(file, text, together, answer)
      yield from asyncio.run(compared(model, stage, text, requests, repeats))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", nargs="+", default=["neurollm", "smollm2"])
  parser.add_argument("--slots", nargs="+", type=int, default=[1, 4, 8])
  parser.add_argument("--answer", type=int, default=192)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--only-print", action="store_true")
  asked = parser.parse_args()
  if not asked.only_print:
    RESULTS.unlink(missing_ok=True)
  for model in asked.model:
    for slots in asked.slots:
      for row in rows_of(model, slots, asked.answer, asked.repeats):
        print(*dataclasses.astuple(row), flush=True)
        if not asked.only_print:
          timing.append_csv(RESULTS, [row])


if __name__ == "__main__":
  main()
