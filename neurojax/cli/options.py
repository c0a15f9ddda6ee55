"""Options that several verbs share, and the engine they ask for."""

import contextlib
import dataclasses
import math
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import Progress

from neurojax.config import Sampling, Serving
from neurojax.count.serving import Load
from neurojax.count.working import DeviceKind
from neurojax.files.find import model_path
from neurojax.forms import Weights
from neurojax.plan.proportional import proportional

if TYPE_CHECKING:
  from neurojax.engine.drive import DrivenEngine
  from neurojax.files.model_file import ModelFile
  from neurojax.tokenizer.tokenizer import Tokenizer


stderr = Console(stderr=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
  model: Annotated[str, tyro.conf.arg(metavar="MODEL")]
  """A file (GGUF, or llama2.c's .bin), a folder for transformers, "neurollm" for the model in this
  package, "smollm2" for the one in the installed extra, or the name of what `neurojax pull` got."""
  tokenizer: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
  """The tokenizer, for formats that keep it apart (llama2.c)."""

  def open(self) -> "ModelFile":
    from neurojax.files.open import open_model

    return open_model(model_path(self.model), self.tokenizer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
  stages: Annotated[int, tyro.conf.arg(metavar="N")] = 1
  """Cut the model into N stage servers, started as processes on this machine."""
  hosts: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT,...|TOML")] = None
  """Use running stage servers: a list, or a fleet file with [[hosts]] tables. Each gets layers in
  proportion to its free memory."""
  plan: Annotated[Path | None, tyro.conf.arg(metavar="TOML")] = None
  """Use the stage servers of a plan that `neurojax plan --toml` printed, with the layers it gives them."""
  dtype: Literal["float32", "bfloat16"] = "float32"
  """Of activations and caches, and of dense weights."""
  weights: Weights = "dense"
  """"dense" keeps matrices in the dtype; "int8" as 8-bit integers with scales: smaller and faster;
  "w2a16" and "w2a8" keep a file's ternary matrices in two bits, for activations as they are or
  rounded to 8 bits; "stored" keeps every matrix as its file has it, exactly."""
  programs: Literal["auto", "model", "fused"] = "auto"
  """"fused" runs few large kernels on a GPU, for ternary weights in bfloat16; "model" runs any model
  anywhere; "auto" is fused where it can be."""
  context: Annotated[int | None, tyro.conf.arg(metavar="TOKENS")] = None
  """Positions for prompt and answer; the model's own, at most 2048, if absent."""
  sequences: Annotated[int, tyro.conf.arg(metavar="N")] = 4
  """Sequences that may be in flight at once; memory for their caches is planned."""
  step_timeout: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 60.0
  """Longest wait for a stage to get on with a step."""

  def __post_init__(self) -> None:
    if self.stages < 1:
      raise ValueError(f"--stages {self.stages}: at least 1")
    if not 0 < self.step_timeout < math.inf:
      raise ValueError(f"--step-timeout {self.step_timeout}: a positive number of seconds")
    if not 1 <= self.sequences <= 4096:
      raise ValueError(f"--sequences {self.sequences}: between 1 and 4096")
    if self.hosts is not None and self.stages != 1:
      raise ValueError("--stages starts servers and --hosts uses running ones: give one of them")
    if self.plan is not None and (self.hosts is not None or self.stages != 1):
      raise ValueError("--plan says which stage servers are used: leave --hosts and --stages out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
  temperature: float = 0.0
  """0 takes the likeliest token."""
  top_k: int | None = None
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0
  seed: int = 0

  def sampling(self) -> Sampling:
    return Sampling(
      **{field.name: getattr(self, field.name) for field in dataclasses.fields(Sampling)}
    )


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


def serving(file: "ModelFile", options: EngineOptions) -> Serving:
  """How the options want the file's model held and run, every choice made.

  Raises: ValueError: as `Serving.resolve` does.
  """
  from neurojax.files.kept import stored_forms

  asked = Serving(
    dtype=options.dtype,
    weights=options.weights,
    context=options.context,
    sequences=options.sequences,
    programs=options.programs,
  )
  return asked.resolve(file.config, stored_forms(file))


def open_tokenizer(file: "ModelFile") -> "Tokenizer":
  """Raises: ValueError: the file has none."""
  from neurojax.tokenizer.tokenizer import Tokenizer

  if file.tokenizer is None:
    raise ValueError(f"{file.path} has no tokenizer: give one with --tokenizer")
  return Tokenizer(file.tokenizer)


@contextlib.asynccontextmanager
async def open_engine(
  file: "ModelFile", options: EngineOptions
) -> AsyncGenerator["DrivenEngine", None]:
  """The engine that the options ask for; it is closed, and servers are ended, on the way out."""
  if options.hosts is None and options.plan is None and options.stages == 1:
    engine = _local_engine(file, options)
    try:
      yield engine
    finally:
      await engine.close()
    return
  from neurojax.files.load import stored_forms
  from neurojax.pipeline.coordinator import PipelineEngine, PipelineOptions
  from neurojax.pipeline.spawn import LocalStages
  from neurojax.plan.fleet import read_fleet
  from neurojax.plan.plan_file import read_plan, servers

  setup = PipelineOptions(
    serving=serving(file, options), forms=stored_forms(file), step_s=options.step_timeout
  )
  spans = None
  if options.plan is not None:
    fleet, spans = servers(read_plan(options.plan), file.config)
  async with contextlib.AsyncExitStack() as stack:
    with stderr.status("waiting for stage servers to start, read their layers and compile"):
      if options.hosts is not None:
        fleet = read_fleet(options.hosts)
      elif spans is None:
        stages = await stack.enter_async_context(LocalStages(file.path, options.stages))
        assert stages.fleet is not None
        fleet = stages.fleet
      engine = await PipelineEngine.connect(file.config, file.sha256(), fleet, setup, spans=spans)
    stack.push_async_callback(engine.close)
    yield engine


def _local_engine(file: "ModelFile", options: EngineOptions) -> "DrivenEngine":
  import jax
  import jax.numpy as jnp

  from neurojax.engine.local import LocalEngine
  from neurojax.files.load import load_span, stored_forms
  from neurojax.folders import cache_dir
  from neurojax.stage.compile import CompiledStage, use_compilation_cache
  from neurojax.stage.memory import free_memory_bytes

  use_compilation_cache(cache_dir() / "xla")
  asked = serving(file, options)
  load = Load(serving=asked, forms=stored_forms(file))
  device: DeviceKind = "cpu" if jax.default_backend() == "cpu" else "cuda"
  proportional(file.config, [("this process", free_memory_bytes())], load, [device])
  with Progress(console=stderr, transient=True) as progress:
    bar = progress.add_task("reading layers", total=file.config.num_layers)
    model = load_span(
      file,
      dtype=jnp.dtype(asked.dtype),
      weights=asked.weights,
      progress=lambda done: progress.update(bar, completed=done),
    )
    progress.update(progress.add_task("compiling", total=None))
    assert asked.context is not None
    stage = CompiledStage(model, context_length=asked.context, programs=asked.programs)
  return LocalEngine(stage, max_sequences=asked.sequences)
