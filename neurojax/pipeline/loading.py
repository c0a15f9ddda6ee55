"""Loads a span of layers into a stage server, and describes what is loaded."""

import asyncio
import dataclasses
import logging
import time

import jax
import jax.numpy as jnp

from neurojax.config import Programs, Serving, Span
from neurojax.count.serving import Load, stage_bytes
from neurojax.count.working import kind_of
from neurojax.files.load import load_span, stored_forms
from neurojax.files.model_file import ModelFile
from neurojax.model.neurollm import NeuroLLM
from neurojax.pipeline import messages
from neurojax.pipeline import pipeline_pb2 as pb
from neurojax.pipeline.device import DeviceThread
from neurojax.stage import programs
from neurojax.stage.compile import CompiledStage
from neurojax.stage.memory import free_memory_bytes
from neurojax.stage.runtime import StageRuntime
from neurojax.wire.identity import disagreement

log = logging.getLogger(__name__)


class Refused(Exception):
  """A Load conflicts with what the server is or holds."""


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A span of layers, compiled.

  Attributes:
    runtime: The stage with the caches of its sequences.
    identity: Versions, model and serving that peers must share; its programs are "model" or "fused".
    serving: The serving that was asked for.
    span: The layers.
    quick: Whether a sequence that is alone may have a program of its own.
    asked: The `programs` of requests that this answers.
  """

  runtime: StageRuntime
  identity: pb.Identity
  serving: Serving
  span: Span
  quick: bool
  asked: frozenset[str]

  def answers(self, request: pb.LoadRequest, span: Span) -> bool:
    """True if a request asks for exactly this."""
    return request.identity.programs in self.asked and self.is_like(request, span)

  def is_like(self, request: pb.LoadRequest, span: Span) -> bool:
    """True if a request, which is in order, asks for this, by whatever programs."""
    wanted = dataclasses.replace(messages.serving(request), programs=self.serving.programs)
    form = disagreement(self.identity, request.identity, fields=messages.SAME_FORM)
    return form is None and (self.serving, self.quick, self.span) == (wanted, request.quick, span)

  def hello(self, name: str) -> pb.Hello:
    """The greeting of a server that holds this."""
    return pb.Hello(
      identity=self.identity,
      name=name,
      has_layers=True,
      first_layer=self.span.first_layer,
      last_layer=self.span.last_layer,
      block=self.runtime.stage.chunks[0],
    )


@dataclasses.dataclass(frozen=True)
class Wish:
  """A request that this server could fulfil.

  Attributes:
    request: The message.
    span: The layers that it asks for.
    serving: The serving that it asks for.
    quick: Whether a sequence that is alone may have a program of its own.
    asked: The `programs` of requests that the outcome will answer.
  """

  request: pb.LoadRequest
  span: Span
  serving: Serving
  quick: bool
  asked: frozenset[str]


class Loader:
  """Holds a span of one model file's layers, or none yet.

  `check` looks at a request, `drop` frees what is held, `load` reads and compiles.

  Args:
    name: Name of the server in the log.
    memory_bytes: Bytes that weights, caches and working memory may take; None takes what is free.
    share: Number of servers that share the machine: each offers an equal part of what is free.

  Attributes:
    loaded: The layers that are held; None if none are.
    replaced: Set, and replaced by a new event, when what was held is dropped: what was agreed on every
      link is void then.
  """

  def __init__(
    self,
    file: ModelFile,
    thread: DeviceThread,
    *,
    name: str,
    memory_bytes: int | None = None,
    share: int = 1,
  ):
    self._file, self._thread, self._name = file, thread, name
    self._memory_bytes, self._share = memory_bytes, share
    self._sha256: asyncio.Future[str] | None = None
    self.loaded: Loaded | None = None
    self.replaced = asyncio.Event()

  async def digest(self) -> str:
    """The model file's digest, computed once for all who ask; a failure is not remembered."""
    if self._sha256 is None or (self._sha256.done() and self._sha256.exception()):
      self._sha256 = asyncio.ensure_future(asyncio.to_thread(self._file.sha256))
    return await asyncio.shield(self._sha256)

  async def describe(self, *, open_sequences: int) -> pb.Description:
    """Tell who this server is and what it holds. Raises: ValueError: the file has changed."""
    loaded = self.loaded
    held = 0
    if loaded:
      stage = loaded.runtime.stage
      caches = Load(serving=loaded.serving).cache_bytes(self._file.config, len(loaded.span))
      held = stage.weight_bytes + caches
    free = free_memory_bytes() // self._share + held
    sha256 = await self.digest()
    description = pb.Description(
      name=self._name,
      identity=messages.identity(
        self._file.config, sha256=sha256, dtype="", context_length=0, programs=""
      ),
      memory_bytes=min(free, self._memory_bytes) if self._memory_bytes else free,
      loaded=loaded is not None,
      open_sequences=open_sequences,
      clock_s=time.time(),
      device=str(jax.devices()[0].device_kind),
    )
    if loaded:
      description.identity.CopyFrom(loaded.identity)
      description.first_layer = loaded.span.first_layer
      description.last_layer = loaded.span.last_layer
      description.weights = loaded.serving.weights
      description.weight_bytes = loaded.runtime.stage.weight_bytes
      description.cache_bytes = loaded.runtime.stage.cache_bytes
      description.max_sequences = loaded.runtime.stage.slots
    return description

  async def check(self, request: pb.LoadRequest) -> Wish | None:
    """Look at a request without doing anything; None if it asks for what is held.

    Raises:
      Refused: the coordinator has another version or another model file.
      ValueError: it asks for something that no server can hold or this device cannot run.
    """
    wanted = request.identity
    sha256 = await self.digest()
    mine = messages.identity(
      self._file.config, sha256=sha256, dtype=wanted.dtype, context_length=wanted.context_length
    )
    if difference := disagreement(mine, wanted, fields=messages.SAME_MODEL):
      raise Refused(f"{difference}: run the same version on the same model file at both ends")
    serving = messages.serving(request)
    span = Span(
      first_layer=request.first_layer, last_layer=request.last_layer, num_layers=wanted.num_layers
    )
    loaded = self.loaded
    if loaded and loaded.answers(request, span):
      return None
    reason = self.why_not_fused(wanted.dtype)
    if wanted.programs == "fused" and reason:
      raise ValueError(f"the fused programs cannot run this model: {reason}")
    asked = {wanted.programs}
    # What one coordinator found out about "auto" holds for the next that asks for it.
    was_auto = loaded and "auto" in loaded.asked and loaded.is_like(request, span)
    if wanted.programs == "model" and (reason or was_auto):
      asked.add("auto")
    return Wish(request, span, serving, request.quick, frozenset(asked))

  def drop(self) -> None:
    """Hold nothing any more, so that the memory is free before it is asked for."""
    self.loaded = None
    self.replaced.set()
    self.replaced = asyncio.Event()

  async def load(self, wish: Wish) -> None:
    """Read and compile what was wished for, once what was held is dropped.

    Raises: Refused: too little memory is free. ValueError: the file has changed.
    """
    load = Load(serving=wish.serving, forms=stored_forms(self._file))
    free = min(free_memory_bytes(), self._memory_bytes or 1 << 62)
    kind = kind_of(jax.devices()[0].device_kind)
    needed = stage_bytes(self._file.config, wish.span, load, kind)
    if needed > free:
      raise Refused(
        f"layers {wish.span} need {needed:,} bytes here, with {load.sequences} caches of "
        f"{load.capacity} positions, {wish.serving.places} blocks of earlier prompts and what the programs work in, and {free:,} are free: free some, "
        "shorten the context, or allow fewer sequences"
      )
    self.loaded = await self._thread.do(lambda: self._build(wish), timed=False)
    ran = self.loaded.identity.programs
    log.info("%s holds layers %s, run by the %r programs", self._name, wish.span, ran)

  def _build(self, wish: Wish) -> Loaded:
    """Raises: ValueError: the file is no longer what its digest was computed of."""
    request = wish.request
    model = load_span(
      self._file, wish.span, dtype=jnp.dtype(request.identity.dtype), weights=request.weights
    )
    # Once the weights are read: an overwritten file would be served under the digest of the old one.
    self._file.check_unchanged()
    # "quick" chooses as "auto" does, and where that is not what all stages run it gives way.
    is_quick = wish.quick and wish.serving.programs != "model"
    stage = self.compile(model, wish.serving, "quick" if is_quick else wish.serving.programs)
    identity = pb.Identity()
    identity.CopyFrom(request.identity)
    identity.programs = stage.programs
    asked = wish.asked | frozenset([stage.programs])
    return Loaded(StageRuntime(stage), identity, wish.serving, wish.span, wish.quick, asked)

  def why_not_fused(self, dtype: str) -> str | None:
    """Why this device cannot run fused programs in a dtype; None if it can."""
    return programs.why_not_fused(dtype)

  def compile(self, model: NeuroLLM, serving: Serving, programs: Programs) -> CompiledStage:
    """Compile a span as it is to be run, but by these programs."""
    assert serving.context is not None
    return CompiledStage(
      model,
      context_length=serving.context,
      slots=serving.sequences,
      places=serving.places,
      cache=serving.cache_dtype,
      programs=programs,
    )
