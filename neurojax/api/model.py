"""A model that answers: the one object behind `neurojax.load` and `neurojax.connect`."""

import atexit
import contextlib
import dataclasses
import operator
import time
import weakref
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, Unpack

from neurojax.api.notebook import Bar, in_notebook
from neurojax.api.opening import (
  OnProgress,
  Where,
  check_opening,
  open_engine,
  open_file,
  open_tokenizer,
  resolve,
)
from neurojax.api.options import ChatOptions, GenerateOptions, check_options, shows
from neurojax.api.results import Completion, Piece, Report, Score, Times
from neurojax.api.runner import Runner
from neurojax.config import (
  DEFAULT_PREFIX,
  CacheForm,
  Dtype,
  ModelConfig,
  Programs,
  Sampling,
  Serving,
  Speculate,
)
from neurojax.engine.api import Engine, Request, check_request
from neurojax.engine.text import stream_text
from neurojax.files.model_file import ModelFile
from neurojax.forms import Weights
from neurojax.tokenizer import Tokenizer, encode_chat

Prompt = str | Sequence[int]
Messages = str | Sequence[Mapping[str, Any]]

_OPEN: "weakref.WeakSet[Model]" = weakref.WeakSet()


def load(
  model: str | Path,
  *,
  weights: Weights | Literal["auto"] = "auto",
  dtype: Dtype = "float32",
  context: int | None = None,
  sequences: int = 1,
  cache: CacheForm = "auto",
  prefix: int = DEFAULT_PREFIX,
  programs: Programs = "auto",
  speculate: Speculate = "off",
  stages: int = 1,
  devices: str | Sequence[str] = (),
  tokenizer: str | Path | None = None,
  step_timeout_s: float = 60.0,
  progress: OnProgress | None = None,
) -> "Model":
  """Open a model in this process, or on stage servers that are started on this machine.

  Works in a script, in a notebook and beside a running event loop alike.

  Args:
    model: A GGUF file, a llama2.c checkpoint, a folder with config.json and safetensors, "neurollm"
      for the model that comes with this package, or the name of a model that `neurojax pull` got.
    weights: How matrices are held; "auto" takes the form that the file is made for, exactly.
    dtype: Floating-point type of activations and caches, and of dense weights.
    context: Positions for prompt and answer; None takes the model's own, at most 2048.
    sequences: Answers that may be computed at the same time; more wait in a queue. With several, a step
      may be compiled for so many, and then one answer alone takes about as long.
    cache: How keys and values are kept: "auto" in the dtype, "int8" in 8 bits and half the memory.
    prefix: Positions of earlier prompts that are kept: a prompt that begins like one of them, as the next
      turn of a chat does, is not computed from its start again. 0 keeps none.
    programs: "fused" for the GPU kernels, "model" for any model anywhere, "auto" for whichever fits.
    speculate: "lookup" guesses the next tokens of an answer from what followed the last ones before, and
      computes several in one step; "auto" does so where it is seen to be faster. Answers stay the same to
      the last bit. `neurojax.config.Serving` says more.
    stages: Stage servers to cut the model into; 1 keeps it in this process.
    devices: JAX devices such as "cpu" or "cuda:1": one for each stage, or one for all.
    tokenizer: A tokenizer file, for formats that keep it apart (llama2.c).
    step_timeout_s: Longest wait for a stage server to get on with a step.
    progress: Called with a `Progress` while files are read and programs compiled; a notebook draws a
      bar if absent.
  Returns: A `Model`, which is also a context manager.
  Raises:
    FileNotFoundError: there is no such model; the message names the nearest ones.
    ValueError: an option that the model does not have, or too little memory.
    NotImplementedError: the file asks for something that the model does not compute.

  Example:
    >>> import neurojax as nj
    >>> with nj.load("neurollm") as model:
    ...   print(len(model.generate("The sea was", max_tokens=8).tokens))
    8
  """
  serving = Serving(
    dtype=dtype,
    weights=weights,
    context=context,
    sequences=sequences,
    cache=cache,
    prefix=prefix,
    programs=programs,
    speculate=speculate,
  )
  check_opening(stages=stages, step_timeout_s=step_timeout_s)
  chosen = (devices,) if isinstance(devices, str) else tuple(devices)
  file = open_file(model, tokenizer)
  return Model._open(
    file, serving, progress=progress, stages=stages, devices=chosen, step_timeout_s=step_timeout_s
  )


def connect(
  where: Where,
  model: str | Path = "neurollm",
  *,
  weights: Weights | Literal["auto"] = "auto",
  dtype: Dtype = "float32",
  context: int | None = None,
  sequences: int = 4,
  cache: CacheForm = "auto",
  prefix: int = DEFAULT_PREFIX,
  programs: Programs = "auto",
  tokenizer: str | Path | None = None,
  step_timeout_s: float = 60.0,
  progress: OnProgress | None = None,
) -> "Model":
  """Open a model on stage servers that run already (`neurojax stage` on every host).

  Args:
    where: "host:port,host:port", a fleet (a `Fleet`, its TOML file or its name), or a plan (a `Plan`
      or its TOML file). A plan says which host holds which layers; else every host gets layers in
      proportion to its free memory.
    model: The model file; every host must have the same, and hosts that have not are refused by name.
    step_timeout_s: Longest wait for a stage to get on with a step.
    weights, dtype, context, sequences, cache, prefix, programs, tokenizer, progress: As for `load`.
  Returns: A `Model`, which is also a context manager.
  Raises: EngineError: a host does not answer, or has another model or version; the message names it.
    ValueError: as for `load`.

  Example:
    >>> import neurojax as nj
    >>> nj.connect("127.0.0.1:9")  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    neurojax.pipeline.errors.StageLost: 127.0.0.1:9: cannot be reached
  """
  if where is None:
    raise TypeError('where = None: give stage servers as "host:port,...", a fleet or a plan')
  serving = Serving(
    dtype=dtype,
    weights=weights,
    context=context,
    sequences=sequences,
    cache=cache,
    prefix=prefix,
    programs=programs,
  )
  file = open_file(model, tokenizer)
  return Model._open(file, serving, progress=progress, where=where, step_timeout_s=step_timeout_s)


class Model:
  """A loaded model. Made by `neurojax.load` and `neurojax.connect`.

  All methods block and may be called from several threads; `aio` has the same ones as coroutines.

  Attributes:
    config: The architecture.
    serving: How the model is held and run, every choice made.
    tokenizer: Text to ids and back.
    aio: The methods of this object as coroutines, and `stream` as an asynchronous iterator.

  Example:
    >>> import neurojax as nj
    >>> model = nj.load("neurollm")
    >>> model.tokenize("The sea")
    [480, 1469]
    >>> model.close()
  """

  config: ModelConfig
  serving: Serving
  tokenizer: Tokenizer
  aio: "AsyncModel"

  def __init__(self, file: ModelFile, serving: Serving):
    """Use `neurojax.load` or `neurojax.connect`."""
    self._file, self._runner, self._exit = file, Runner(), contextlib.AsyncExitStack()
    self.config, self.serving = file.config, serving
    self.tokenizer = open_tokenizer(file)
    self.aio = AsyncModel(self)
    self._is_closed = False

  @classmethod
  def _open(
    cls, file: ModelFile, serving: Serving, *, progress: OnProgress | None, **how: Any
  ) -> Self:
    try:
      model = cls(file, resolve(file, serving))
    except BaseException:
      file.close()
      raise
    bar = Bar() if progress is None and in_notebook() else None
    try:
      engine = open_engine(file, serving, progress=progress or bar or (lambda _: None), **how)
      model._engine = model._runner.call(model._exit.enter_async_context(engine))
    except BaseException:
      model.close()
      raise
    finally:
      if bar is not None:
        bar.end()
    _OPEN.add(model)
    # A model that is dropped without `close` frees what it holds all the same.
    model._finalizer = weakref.finalize(model, model._runner.abandon, model._exit, file)
    model._finalizer.atexit = False
    return model

  _engine: Engine
  _finalizer: weakref.finalize | None = None

  # ---- what it does

  @shows(GenerateOptions)
  def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
    """Continue a text.

    Args:
      prompt: Text, or token ids.
      max_tokens: Tokens of the answer at most, 128 if absent.
      temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty,
        logit_bias, min_tokens, seed: As in `Sampling`; without a temperature the likeliest token is taken.
      sampling: A whole `Sampling` in place of these.
      stop: Texts before which the answer ends.
      ignore_eos: Whether to go on past an end-of-sequence token.
      special: Whether control tokens spelled in the prompt (such as <|im_start|>) are recognised.
    Raises: ValueError: a prompt without any token (an empty text is the beginning of a new one) or too
      long, or an option out of range. TypeError: an option that there is not.
      EngineError: a stage failed; the message names it.
    """
    with contextlib.closing(self.stream(prompt, **options)) as stream:
      for _ in stream:
        pass
      return stream.completion

  @shows(GenerateOptions)
  def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> "Stream":
    """Continue a text piece by piece. Arguments as for `generate`."""
    request, stops = self._request(prompt, **options)
    return Stream(self, request, stops)

  @shows(ChatOptions)
  def chat(self, messages: Messages, **options: Unpack[ChatOptions]) -> Completion:
    """Answer a conversation through the model's own chat template.

    Args:
      messages: A question, or messages with "role" and "content".
      system: A system message to begin with.
      max_tokens: Tokens of the answer at most, 256 if absent; the room that the context leaves at most.
      template: Further variables of the chat template, such as {"enable_thinking": False}.
      temperature, ..., stop: As for `generate`.
    Raises: ValueError: as for `generate`; also if the model has no chat template.
    """
    with contextlib.closing(self.stream_chat(messages, **options)) as stream:
      for _ in stream:
        pass
      return stream.completion

  @shows(ChatOptions)
  def stream_chat(self, messages: Messages, **options: Unpack[ChatOptions]) -> "Stream":
    """Answer a conversation piece by piece. Arguments as for `chat`."""
    request, stops = self._chat_request(messages, **options)
    return Stream(self, request, stops)

  def score(self, text: Prompt, *, first: int = 1) -> Score:
    """Log-probabilities of a text's tokens, each given those before it.

    Args:
      text: Text, or token ids; at least two tokens.
      first: Index of the first token to score.
    """
    return self._runner.call(self._score(text, first))

  def tokenize(self, text: str, *, add_special: bool = False, special: bool = False) -> list[int]:
    """Token ids of a text.

    Args:
      add_special: Whether the tokens that begin a text (BOS) are added.
      special: Whether control tokens spelled in the text are recognised.
    """
    return self.tokenizer.encode(text, parse_special=special, add_special=add_special)

  def detokenize(self, tokens: Sequence[int]) -> str:
    """The text of token ids."""
    return self.tokenizer.decode(tokens)

  def report(self) -> Report:
    """How the model is held, and how long its decode steps took so far."""
    return self._runner.call(self._report())

  def close(self) -> None:
    """Free everything, and end servers that were started for it. May be called twice."""
    if self._is_closed:
      return
    self._is_closed = True
    if self._finalizer is not None:
      self._finalizer.detach()
    _OPEN.discard(self)
    try:
      self._runner.call(self._exit.aclose())
    finally:
      self._runner.stop()
      self._file.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self.close()

  async def __aenter__(self) -> Self:
    return self

  async def __aexit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self.close()

  def __repr__(self) -> str:
    s = self.serving
    state = "closed" if self._is_closed else f"{s.weights}, {s.dtype}, context {s.context}"
    return f"<neurojax.Model {self._file.path.name}, {self.config.num_layers} layers, {state}>"

  def _repr_html_(self) -> str:
    import html

    return html.escape(repr(self)) if self._is_closed else self.report()._repr_html_()

  # ---- how

  def _request(self, prompt: Prompt, **options: Any) -> tuple[Request, tuple[str, ...]]:
    check_options(options, GenerateOptions)
    if self._is_closed:
      raise ValueError("the model is closed: load it again")
    if isinstance(prompt, str):
      special = options.pop("special", False)
      ids = self.tokenizer.encode(prompt, parse_special=special, add_special=True)
    else:
      ids = _ids(prompt)
    stop = options.pop("stop", ())
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if bad := [text for text in stops if not isinstance(text, str) or not text]:
      raise ValueError(f"stop = {bad[0]!r}: a stop string is a text that is not empty")
    ignores = options.pop("ignore_eos", False)
    options.pop("special", None)
    request = Request(
      prompt=ids,
      max_tokens=options.pop("max_tokens", 128),
      stop_ids=frozenset() if ignores else self.tokenizer.stop_ids,
      sampling=_sampling(options.pop("sampling", None), options),
    )
    check_request(request, self._engine)
    return request, stops

  def _chat_request(self, messages: Messages, **options: Any) -> tuple[Request, tuple[str, ...]]:
    check_options(options, ChatOptions)
    system, template = options.pop("system", None), options.pop("template", None)
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    if system is not None:
      turns = [{"role": "system", "content": system}, *turns]
    prompt = encode_chat(self.tokenizer, turns, **(template or {}))
    room = self._engine.context_length - len(prompt)
    if room < 1:
      raise ValueError(
        f"the conversation has {len(prompt)} tokens and the context is"
        f" {self._engine.context_length}: {self._longer('begin a new one')}"
      )
    most = options.pop("max_tokens", 256)
    return self._request(prompt, max_tokens=min(most, room) if _is_count(most) else most, **options)

  def _longer(self, otherwise: str) -> str:
    most = self.config.context_length
    if self._engine.context_length >= most:
      return f"{otherwise} (the model was made for no more)"
    return f"{otherwise}, or load the model with a longer context ({most} at most)"

  async def _pieces(self, request: Request, stops: Sequence[str]) -> AsyncGenerator[Piece, None]:
    stream = stream_text(self._engine, self.tokenizer, request, stops=stops)
    async with contextlib.aclosing(stream):
      async for piece in stream:
        yield Piece(piece.text, piece.token.id, piece.token.logprob, piece.finish_reason)

  async def _score(self, text: Prompt, first: int) -> Score:
    tokens = self.tokenize(text, add_special=True) if isinstance(text, str) else _ids(text)
    if len(tokens) < 2:
      raise ValueError(f"{len(tokens)} tokens: at least two, the first of which is only given")
    logprobs = (await self._engine.score(tokens, first=first)).logprobs
    return Score(tokens=tuple(tokens), logprobs=tuple(map(float, logprobs)), first=first)

  async def _report(self) -> Report:
    stages = await self._engine.reports()
    return Report(model=str(self._file.path), serving=self.serving, stages=stages)


class _Collecting:
  """Pieces of an answer as they come, and the whole answer afterwards."""

  def __init__(self, request: Request):
    self._request, self._pieces, self._began_s = request, list[Piece](), time.perf_counter()
    self._first_s: float | None = None
    self._last_s = 0.0

  def _take(self, piece: Piece) -> Piece:
    self._last_s = time.perf_counter() - self._began_s
    if self._first_s is None:
      self._first_s = self._last_s
    self._pieces.append(piece)
    return piece

  @property
  def completion(self) -> Completion:
    """The answer so far; the whole answer once the stream has ended."""
    first_s = self._first_s or 0.0
    after_s = self._last_s - first_s
    rate = (len(self._pieces) - 1) / after_s if after_s > 0 else None
    return Completion(
      text="".join(piece.text for piece in self._pieces),
      prompt_tokens=tuple(self._request.prompt),
      tokens=tuple(piece.token for piece in self._pieces),
      logprobs=tuple(piece.logprob for piece in self._pieces),
      finish_reason=self._pieces[-1].finish_reason if self._pieces else None,
      times=Times(first_token_s=first_s, total_s=self._last_s, tokens_per_s=rate),
    )


class Stream(_Collecting, Iterator[Piece]):
  """An iterator over the pieces of an answer. Leaving it early ends the answer."""

  def __init__(self, model: Model, request: Request, stops: Sequence[str]):
    super().__init__(request)
    self._iterator = model._runner.iterate(model._pieces(request, stops))

  def __next__(self) -> Piece:
    return self._take(next(self._iterator))

  def close(self) -> None:
    """End the answer now, and wait until its place is free."""
    self._iterator.close()


class AsyncStream(_Collecting):
  """The same for `async for`."""

  def __init__(self, model: Model, request: Request, stops: Sequence[str]):
    super().__init__(request)
    self._iterator = model._runner.follow(model._pieces(request, stops))

  def __aiter__(self) -> Self:
    return self

  async def __anext__(self) -> Piece:
    return self._take(await anext(self._iterator))

  async def aclose(self) -> None:
    """End the answer now."""
    await self._iterator.aclose()


@dataclasses.dataclass(frozen=True)
class AsyncModel:
  """The methods of a `Model` as coroutines, for programs with an event loop of their own.

  Example:
    >>> import asyncio, neurojax as nj
    >>> async def answer():
    ...   with nj.load("neurollm") as model:
    ...     return await model.aio.generate("The sea was", max_tokens=4)
    >>> len(asyncio.run(answer()).tokens)
    4
  """

  _model: Model

  @shows(GenerateOptions)
  async def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
    """Does what `Model.generate` does, as a coroutine."""
    return await _collect(self.stream(prompt, **options))

  @shows(GenerateOptions)
  def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> AsyncStream:
    """Streams as `Model.stream` does, for `async for`."""
    return AsyncStream(self._model, *self._model._request(prompt, **options))

  @shows(ChatOptions)
  async def chat(self, messages: Messages, **options: Unpack[ChatOptions]) -> Completion:
    """Does what `Model.chat` does, as a coroutine."""
    return await _collect(self.stream_chat(messages, **options))

  @shows(ChatOptions)
  def stream_chat(self, messages: Messages, **options: Unpack[ChatOptions]) -> AsyncStream:
    """Streams as `Model.stream_chat` does, for `async for`."""
    return AsyncStream(self._model, *self._model._chat_request(messages, **options))

  async def score(self, text: Prompt, *, first: int = 1) -> Score:
    """Does what `Model.score` does, as a coroutine."""
    return await self._model._runner.wait(self._model._score(text, first))

  async def report(self) -> Report:
    """Does what `Model.report` does, as a coroutine."""
    return await self._model._runner.wait(self._model._report())


async def _collect(stream: AsyncStream) -> Completion:
  async for _ in stream:
    pass
  return stream.completion


def _sampling(sampling: Sampling | None, fields: dict[str, Any]) -> Sampling:
  if sampling is None:
    return Sampling(**fields)
  if not isinstance(sampling, Sampling):
    raise TypeError(f"sampling = {sampling!r}: give a Sampling")
  if fields:
    raise ValueError(f"sampling = ... and {next(iter(fields))} = ...: give one of them")
  return sampling


def _ids(tokens: Sequence[int]) -> list[int]:
  """Raises: TypeError: no whole numbers."""
  if isinstance(tokens, bytes | bytearray):
    raise TypeError("the prompt is bytes: decode it to text, or give token ids")
  try:
    return [operator.index(token) for token in tokens]
  except TypeError:
    raise TypeError(
      f"prompt {str(tokens)[:40]}: give text, or whole numbers that are ids"
    ) from None


def _is_count(value: object) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


@atexit.register
def _close_all() -> None:
  for model in list(_OPEN):
    with contextlib.suppress(Exception):
      model.close()
