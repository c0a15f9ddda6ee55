"""Opens engines: in this process, on stage servers started for it, or on running ones."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import logging
import math
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurojax.config import Serving, Span
from neurojax.engine.api import Engine
from neurojax.files.find import model_path
from neurojax.files.kept import stored_forms
from neurojax.files.model_file import ModelFile
from neurojax.files.open import open_model
from neurojax.plan.fleet import Fleet, read_fleet
from neurojax.plan.plan import Plan
from neurojax.plan.plan_file import read_plan, servers
from neurojax.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
  from neurojax.stage.compile import CompiledStage

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Progress:
  """How far opening a model has come.

  Attributes:
    what: The work under way, such as "reading layers".
    done: Units of it that are done.
    total: All of them; None where that is not known.

  Example:
    >>> import neurojax as nj
    >>> nj.Progress("reading layers", 3, 12).done
    3
  """

  what: str
  done: int = 0
  total: int | None = None


OnProgress = Callable[[Progress], None]

Where = str | Path | Fleet | Plan
"""Stage servers: "host:port,...", a fleet or its file, a plan or its file."""


def check_opening(*, stages: int = 1, step_timeout_s: float = 60.0) -> None:
  """Raises: ValueError: a number of stages or a wait that cannot be."""
  if isinstance(stages, bool) or not isinstance(stages, int) or stages < 1:
    raise ValueError(f"stages = {stages!r}: a whole number, at least 1")
  is_number = isinstance(step_timeout_s, int | float) and not isinstance(step_timeout_s, bool)
  if not is_number or not 0 < step_timeout_s < math.inf:
    raise ValueError(f"step_timeout_s = {step_timeout_s!r}: a positive number of seconds")


def open_file(model: str | Path, tokenizer: str | Path | None = None) -> ModelFile:
  """Open the model file that a path, an alias or a hub name means. Nothing is downloaded.

  Raises: FileNotFoundError, ValueError, NotImplementedError: as `model_path` and `open_model` do.
  """
  if not isinstance(model, str | Path):
    raise TypeError(f"model = {model!r}: give a path or a name")
  return open_model(model_path(str(model)), tokenizer)


def open_tokenizer(file: ModelFile) -> Tokenizer:
  """Raises: ValueError: the file has none."""
  if file.tokenizer is None:
    raise ValueError(f"{file.path} has no tokenizer: give one (tokenizer=..., --tokenizer)")
  return Tokenizer(file.tokenizer)


def resolve(file: ModelFile, serving: Serving) -> Serving:
  """The serving with every choice made for a file. Raises: ValueError: as `Serving.resolve` does."""
  return serving.resolve(file.config, stored_forms(file), getattr(file, "activations", None))


@contextlib.asynccontextmanager
async def open_engine(
  file: ModelFile,
  serving: Serving = Serving(),
  *,
  stages: int = 1,
  where: Where | None = None,
  devices: Sequence[str] = (),
  step_timeout_s: float = 60.0,
  progress: OnProgress = lambda _: None,
) -> AsyncGenerator[Engine, None]:
  """An engine for a model file; it is closed, and servers that it started are ended, on the way out.

  Args:
    stages: Stage servers to start on this machine; 1 runs the model in this process.
    where: Running stage servers to use in place of that.
    devices: JAX devices, such as "cpu" or "cuda:1": one for each stage, or one for all.
    step_timeout_s: Longest wait for a stage to get on with a step.
    progress: Called with what is under way, from any thread.
  Raises:
    ValueError: what does not go together, or does not fit.
    EngineError: a stage server failed; the message names it.
  """
  check_opening(stages=stages, step_timeout_s=step_timeout_s)
  if stages > file.config.num_layers:
    raise ValueError(
      f"stages = {stages}: the model has {file.config.num_layers} layers, so at most as many stages"
    )
  if where is not None and (stages != 1 or devices):
    raise ValueError("running stage servers have their own devices: give no stages and no devices")
  if len(devices) not in (0, 1, stages):
    raise ValueError(
      f"{len(devices)} devices for {stages} stages: give one for each, or one for all"
    )
  serving = resolve(file, serving)
  if serving.speculate == "lookup" and (where is not None or stages > 1):
    log.warning("answers go on without drafts: stage servers take none yet")
  if where is None and stages == 1:
    engine = await _local(file, serving, next(iter(devices), None), progress)
    try:
      yield engine
    finally:
      await engine.close()
    return
  async with contextlib.AsyncExitStack() as stack:
    engine = await _pipeline(file, serving, stack, stages, where, devices, step_timeout_s, progress)
    stack.push_async_callback(engine.close)
    yield engine


async def _pipeline(
  file: ModelFile,
  serving: Serving,
  stack: contextlib.AsyncExitStack,
  stages: int,
  where: Where | None,
  devices: Sequence[str],
  step_timeout_s: float,
  progress: OnProgress,
) -> Engine:
  from neurojax.pipeline.coordinator import PipelineEngine, PipelineOptions
  from neurojax.pipeline.spawn import LocalStages

  options = PipelineOptions(serving=serving, forms=stored_forms(file), step_s=step_timeout_s)
  spans: Mapping[str, Span] | None = None
  if where is None:
    progress(Progress("starting stage servers", 0, stages))
    local = LocalStages(file.path, stages, devices=devices)
    await stack.enter_async_context(local)
    assert local.fleet is not None
    fleet = local.fleet
  else:
    fleet, spans = _servers(where, file)
  progress(Progress("waiting for stage servers to read their layers and compile"))
  digest = await asyncio.to_thread(file.sha256)
  return await PipelineEngine.connect(file.config, digest, fleet, options, spans=spans)


def _servers(where: Where, file: ModelFile) -> tuple[Fleet, Mapping[str, Span] | None]:
  """Raises: ValueError: the words name no stage servers."""
  if isinstance(where, Plan):
    return servers(where, file.config)
  if isinstance(where, Fleet):
    return where, None
  if Path(where).is_file() and is_plan(Path(where)):
    return servers(read_plan(Path(where)), file.config)
  return read_fleet(str(where)), None


def is_plan(path: Path) -> bool:
  """Whether a TOML file holds a plan; a fleet has other tables."""
  import tomllib

  try:
    table = tomllib.loads(path.read_text(encoding="utf-8"))
  except (tomllib.TOMLDecodeError, UnicodeDecodeError):
    return False
  return "objective" in table and "stages" in table


async def _local(
  file: ModelFile, serving: Serving, device: str | None, progress: OnProgress
) -> Engine:
  """The engine of this process. All of JAX's work, loading too, is done by the engine's own thread."""
  import jax

  from neurojax.engine.local import LocalEngine

  chosen = None if device is None else jax_device(device)
  enter = None if chosen is None else jax.default_device(chosen).__enter__
  thread = concurrent.futures.ThreadPoolExecutor(
    1, thread_name_prefix="neurojax-local", initializer=enter
  )
  try:
    stage = await asyncio.get_running_loop().run_in_executor(
      thread, compiled, file, serving, chosen, progress
    )
  except BaseException:
    thread.shutdown(wait=False, cancel_futures=True)
    raise
  return LocalEngine(stage, thread=thread, speculate=serving.speculate)


def compiled(
  file: ModelFile,
  serving: Serving,
  device: Any = None,
  progress: OnProgress = lambda _: None,
) -> "CompiledStage":
  """Load and compile all layers in this process.

  Args:
    serving: Every choice made (`resolve`).
    device: JAX device; the first of this process if absent.
  Raises: ValueError: too little memory.
  """
  import jax.numpy as jnp

  from neurojax.count.serving import Load
  from neurojax.count.working import kind_of
  from neurojax.files.load import load_span
  from neurojax.folders import cache_dir
  from neurojax.plan.proportional import proportional
  from neurojax.stage.backend import devices
  from neurojax.stage.compilation_cache import use_compilation_cache
  from neurojax.stage.compile import CompiledStage
  from neurojax.stage.memory import free_memory_bytes

  use_compilation_cache(cache_dir() / "xla")
  assert serving.context is not None
  load = Load(serving=serving, forms=stored_forms(file))
  kind = kind_of((device or devices()[0]).device_kind)
  proportional(file.config, [("this process", free_memory_bytes(device))], load, [kind])
  total = file.config.num_layers
  progress(Progress("reading layers", 0, total))
  model = load_span(
    file,
    dtype=jnp.dtype(serving.dtype),
    weights=load.weights,
    progress=lambda done: progress(Progress("reading layers", done, total)),
  )
  progress(Progress("compiling"))
  return CompiledStage(
    model,
    context_length=serving.context,
    slots=serving.sequences,
    places=serving.places,
    cache=serving.cache_dtype,
    programs=serving.programs,
  )


def jax_device(name: str):
  """The JAX device of a name such as "cpu", "cuda" or "cuda:1".

  Raises: ValueError: this process has no such device; says which it has.
  """
  import jax

  from neurojax.stage.backend import devices

  platform, _, number = name.partition(":")
  index = int(number) if number.isdecimal() else 0
  try:
    found = jax.devices(platform)
  except (RuntimeError, AssertionError):
    found = []
  if (number and not number.isdecimal()) or index >= len(found):
    known = ", ".join(f"{d.platform}:{d.id}" for d in devices())
    raise ValueError(f"device {name!r}: this process has {known}")
  return found[index]
