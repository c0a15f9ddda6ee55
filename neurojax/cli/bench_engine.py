"""`neurojax bench engine`: many requests at once."""

import asyncio
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from neurojax.cli.bench import show
from neurojax.cli.console import stderr
from neurojax.forms import Weights

if TYPE_CHECKING:
  from neurojax.config import Serving
  from neurojax.measure.speed.load import Row, Traffic
  from neurojax.stage.compile import CompiledStage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
  """Measure an engine with many requests at once: tokens per second in all, the time to the first token and
  between tokens, beside what its own programs do when nobody waits for them.

  Each number of requests at once is measured by itself, and its row printed as soon as it is there.

  Example: neurojax bench engine --model neurollm --concurrent 1 4 --requests 8 --answer 32
  Example: neurojax bench engine --arch bonsai-8b --dtype bfloat16 --concurrent 1 8 64
  Example: neurojax bench engine --model neurollm --arrivals poisson:4 --concurrent 8
  """

  model: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
  """A model file or the name of a model, such as neurollm."""
  arch: Annotated[str | None, tyro.conf.arg(metavar="NAME|TOML")] = None
  """An architecture with random ternary weights instead."""
  weights: Weights | Literal["auto"] = "auto"
  """Form of the matrices, by the names that `neurojax generate --help` explains. An architecture has "w2a8"
  or "w2a16"."""
  dtype: Literal["float32", "bfloat16"] = "float32"
  """Floating-point type of activations and caches."""
  cache: Literal["auto", "int8"] = "auto"
  """Form of keys and values: "auto" keeps them in the dtype, "int8" rounds them to 8 bits."""
  programs: Literal["auto", "model", "fused", "quick"] = "auto"
  """Programs that compute the steps, by the names that `neurojax generate --help` explains."""
  concurrent: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = (1, 8)
  """Requests at once."""
  requests: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
  """Requests in all; without it, twice as many as there are at once."""
  arrivals: Annotated[str, tyro.conf.arg(metavar="closed|poisson:RATE")] = "closed"
  """When requests come: "closed", a new one as soon as one has ended; "poisson:4", four in a second on
  average, at random."""
  prompt: Annotated[tuple[int, ...], tyro.conf.arg(metavar="TOKENS ...")] = (128,)
  """Lengths of prompts, taken in turn."""
  answer: Annotated[int, tyro.conf.arg(metavar="TOKENS")] = 128
  """Tokens of each answer."""
  temperature: float = 0.0
  """Divides the logits before a token is drawn. 0 always takes the likeliest token."""
  top_p: float = 1.0
  """Draw from the fewest likeliest tokens whose probabilities add up to this. 1 keeps all."""
  out: Annotated[Path | None, tyro.conf.arg(metavar="CSV")] = None
  """Append the rows to this file; made with a header if it is not there."""
  json: bool = False
  """Print one JSON object."""

  def run(self) -> int:
    from neurojax.kernels import timing
    from neurojax.measure.speed import load

    if (self.model is None) == (self.arch is None):
      raise ValueError("give either --model FILE or --arch NAME")
    for name, numbers in (
      ("concurrent", self.concurrent), ("prompt", self.prompt), ("answer", (self.answer,)),
      ("requests", () if self.requests is None else (self.requests,)),
    ):  # fmt: skip
      if any(number < 1 for number in numbers) or (not numbers and name != "requests"):
        raise ValueError(f"--{name} {' '.join(map(str, numbers))}: positive numbers")
    self._rate()
    if self.out:
      timing.check_csv(self.out, load.Row)
    rows = show(self._rows(), load.headline, load.COLUMNS, out=self.out, quiet=self.json)
    if self.json:
      print(json.dumps({"rows": [dataclasses.asdict(row) for row in rows]}))
    return 0

  def _rate(self) -> float | None:
    """Mean arrivals in a second; None: as requests end."""
    if self.arrivals == "closed":
      return None
    kind, _, rate = self.arrivals.partition(":")
    try:
      value = float(rate)
    except ValueError:
      value = 0.0
    if kind != "poisson" or not 0 < value < 1e6:
      raise ValueError(f"--arrivals {self.arrivals}: closed, or poisson:4 for four in a second")
    return value

  def _rows(self) -> Iterator["Row"]:
    from neurojax.config import Sampling, Serving
    from neurojax.engine.local import LocalEngine
    from neurojax.measure.speed import load

    serving = Serving(
      dtype=self.dtype,
      weights=self.weights,
      cache=self.cache,
      programs=self.programs,
      context=load.positions(self.prompt, self.answer),
    )
    sampling = Sampling(temperature=self.temperature, top_p=self.top_p)
    for concurrent in self.concurrent:
      own = dataclasses.replace(serving, sequences=concurrent)
      stage, weights = self._stage(own)
      traffic = load.Traffic(
        concurrent=concurrent,
        requests=self.requests or 2 * concurrent,
        prompts=self.prompt,
        answer=self.answer,
        sampling=sampling,
        rate=self._rate(),
      )
      alone = load.loop_tokens_per_s(stage, concurrent, min(self.prompt), sampling=sampling)
      answers = asyncio.run(_measured(LocalEngine(stage), traffic))
      name = self.arch or Path(self.model or "").name
      yield load.row(answers, traffic, loop_tokens_per_s=alone, **load.names(stage, name, weights))
      del stage

  def _stage(self, serving: "Serving") -> "tuple[CompiledStage, str]":
    """The stage of all layers, and the form of its weights."""
    if self.model is not None:
      from neurojax.api.opening import compiled, open_file, resolve

      with open_file(self.model) as file:
        serving = resolve(file, serving)
        return compiled(file, serving), serving.weights
    import jax.numpy as jnp

    from neurojax.config import ModelConfig, Span
    from neurojax.measure.random_model import random_model
    from neurojax.stage.compile import CompiledStage

    assert self.arch is not None
    if self.weights not in ("auto", "w2a8", "w2a16"):
      raise ValueError(f"--weights {self.weights}: an architecture's are ternary, w2a8 or w2a16")
    weights = "w2a8" if self.weights == "auto" else self.weights
    config = ModelConfig.named(self.arch)
    model = random_model(config, Span.whole(config), dtype=jnp.dtype(self.dtype), weights=weights)
    stage = CompiledStage(
      model,
      context_length=serving.context or 1,
      slots=serving.sequences,
      cache=serving.cache_dtype,
      programs=serving.programs,
    )
    return stage, weights


async def _measured(engine, traffic: "Traffic"):
  from neurojax.measure.speed import load

  try:
    # Programs that only requests of this kind, and so many at once, need are compiled first.
    warm = dataclasses.replace(
      traffic, requests=traffic.concurrent, answer=min(traffic.answer, 17), rate=None
    )
    await load.measure(engine, warm, seed=1)
    with stderr.status("measuring"):
      return await load.measure(engine, traffic)
  finally:
    await engine.close()
