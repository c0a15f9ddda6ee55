"""Compiles a span of layers over slots: rows of prompts of a few lengths, and steps of many sequences."""

import concurrent.futures
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from neurojax import config
from neurojax.config import Sampling
from neurojax.forms import PREFILL, capacity_for
from neurojax.model import sample as sampling
from neurojax.model.cache import check_room
from neurojax.model.neurollm import NeuroLLM
from neurojax.model.sample import Kind, SamplerState, SlotSettings
from neurojax.stage import state as stage_state
from neurojax.stage.kernels import Kernels
from neurojax.stage.programs import programs_of
from neurojax.stage.state import StageState
from neurojax.stage.step_programs import DRAFT_PLAN, LOOP, PLAN, StepPrograms

BUCKETS = (1, 64, PREFILL)
"""Lengths of prompt rows that are compiled; a shorter row is padded to the next."""

LONG = 2048
"""Length of a prompt row that takes the place of several, where that gives the same bits."""

WIDTHS = {"cpu": (1, 2, 4, 8, 16, 32, 64, 128, 256), "gpu": (1, 8, 64)}
"""Numbers of rows that steps are compiled for by platform, where rows do not depend on each other."""

MANY = 8
"""Slots from which on a GPU draws one token in each call."""

DRAFTS = 7
"""Drafts that a step may have beside a single row, where rows do not depend on each other."""

TOPS = 20
"""Likeliest tokens that a program names where any are asked for."""


class CompiledStage:
  """The compiled programs of one span. Programs that a request needs first are compiled then.

  Args:
    model: The layers. Fused programs consume them, so that memory holds the weights once.
    context_length: Positions that a sequence may use; the cache holds at least as many.
    slots: Sequences that the cache has room for.
    places: Blocks of PREFILL positions that are kept for later prompts.
    cache: Dtype of the cache; that of the programs if absent.
    buckets: Lengths of prompt rows to compile, ascending, starting with 1.
    programs: Which programs to compile, by the rules of `stage.programs.programs_of`.
    kernels: Kernels of the fused programs; those for the device if absent.

  Attributes:
    programs: "model" or "fused", which was chosen.
    dtype: Dtype of what a layer computes.
    activations: Dtype of what passes from one stage to the next.
    chunks: Lengths of whole rows of a prompt, see `engine.steps.Steps`.
    widths: Numbers of rows that steps are compiled for, ascending.
    most_drafts: Drafts that a step may have; its rows and their drafts together are one more at most.
    why_no_drafts: Why that is 0; "" if it is not.
    loop: Tokens that one call draws of each row at most.
    tops: Likeliest tokens that programs name where any are asked for.
    compiling_s: Seconds that programs took to compile which a request needed first.
  Raises: ValueError, NotImplementedError: as `programs_of` does.
  """

  def __init__(
    self,
    model: NeuroLLM,
    *,
    context_length: int,
    slots: int = 1,
    places: int = 0,
    cache: DTypeLike | None = None,
    buckets: Sequence[int] = BUCKETS,
    programs: config.Programs = "auto",
    kernels: Kernels | None = None,
  ):
    for name, value, least in (
      ("context_length", context_length, 1), ("slots", slots, 1), ("places", places, 0),
    ):  # fmt: skip
      if value < least:
        raise ValueError(f"{name} = {value}: it must be at least {least}")
    if not buckets or buckets[0] != 1 or list(buckets) != sorted(set(buckets)):
      raise ValueError(f"buckets = {tuple(buckets)}: they must ascend and start with 1")
    self.config, self.span, self.dtype = model.config, model.span, model.dtype
    self.context_length, self.slots, self.places = context_length, slots, places
    self.capacity = capacity_for(context_length)
    lengths = tuple(b for b in buckets if b <= self.capacity)
    self._programs = programs_of(
      model,
      "auto" if programs == "quick" else programs,
      capacity=self.capacity,
      lengths=lengths,
      cache=cache,
      kernels=kernels,
      has_lone=slots == 1 or programs == "quick",
    )
    if self._programs.lengths_agree and self.capacity >= LONG > lengths[-1]:
      lengths = (*lengths, LONG)
    self.buckets = lengths
    self.programs, self.activations = self._programs.kind, self._programs.activations
    self.chunks = tuple(b for b in lengths if b % PREFILL == 0) or lengths[-1:]
    self.widths = (slots,)
    if self._programs.rows_agree:
      platform = jax.default_backend()
      self.widths = (*(w for w in WIDTHS.get(platform, (1,)) if w < slots), slots)
    elif programs == "quick" and slots > 1:
      self.widths = (1, slots)
    self.why_no_drafts = self._why_no_drafts()
    most_rows = max(slots, 1 + DRAFTS) if self._programs.rows_agree else slots
    self.most_drafts = 0 if self.why_no_drafts else most_rows - 1
    self._wide = (*(w for w in (2, 4) if slots < w < most_rows), most_rows)
    self.tops = min(TOPS, model.config.vocab_size)
    is_gpu = jax.default_backend() == "gpu"
    # Where a loop always makes all its rounds, many rows do better without one: the host keeps up with their
    # longer steps, and none waits for the rounds of others.
    self.loop = 1 if is_gpu and slots >= MANY else LOOP
    self._steps = StepPrograms(self._programs, self.span.is_first, is_static=is_gpu)
    self._run: dict[tuple[Any, ...], Any] = {}
    self.compiling_s = 0.0
    self._compile_first()

  # ---- what callers use, all on one thread

  def new_state(self) -> StageState:
    """Make the state of a stage without sequences."""
    return jax.jit(self._empty_state)()

  def open(
    self,
    state: StageState,
    slot: int,
    settings: SlotSettings | None,
    *,
    restore: Sequence[int] = (),
    copy: int | None = None,
  ) -> StageState:
    """Begin a sequence in a slot; `state` is consumed.

    Args:
      settings: Of its sampler; None but on the last stage.
      restore: Places whose blocks it begins with.
      copy: A slot whose positions it begins with.
    """
    if copy is not None:
      state = self._call(("copy",), state, np.int32(copy), np.int32(slot))
    for index, place in enumerate(restore):
      start = np.int32(index * self.chunks[0])
      state = self._call(("restore",), state, np.int32(slot), start, np.int32(place))
    if settings is not None:
      state = self._call(("open",), state, np.int32(slot), settings)
    return state

  def observe(self, state: StageState, slot: int, tokens: np.ndarray) -> StageState:
    """Tell the sampler of a slot of prompt tokens that were not computed there."""
    for first in range(0, len(tokens), PREFILL):
      part = _padded(tokens[first : first + PREFILL], PREFILL)
      count = np.int32(min(PREFILL, len(tokens) - first))
      state = self._call(("observe",), state, np.int32(slot), part, count)
    return state

  def prompt(
    self, state: StageState, slot: int, start: int, tokens: np.ndarray, hidden: np.ndarray | None
  ) -> tuple[StageState, jax.Array, jax.Array]:
    """Run a row of a prompt; `state` is consumed.

    Args:
      tokens: int32 [n], n at most the longest bucket.
      hidden: Activations [n, D], where the span is not the first.
    Returns: The state, the activations [bucket, D] of which the first n rows mean something, and the
      activations [1, D] after the last of them.
    """
    length = self.bucket(len(tokens), start)
    where = np.array([slot, start, len(tokens)], np.int32)
    given = _padded(tokens, length)
    if hidden is None:
      return self._call(("prompt", length), state, given, where)
    return self._call(("prompt", length), state, given, where, _padded(hidden, length))

  def draw(
    self, state: StageState, slot: int, x_1D: jax.Array, *, kind: Kind, top: int, **masks: Any
  ) -> tuple[StageState, jax.Array]:
    """Draw the token after activations [1, D]; `state` is consumed. Returns: As `decode`, for one row."""
    return self._call(("draw", kind, top, *masks), state, x_1D, np.int32(slot), *masks.values())

  def decode(
    self,
    state: StageState,
    plan_XR: np.ndarray,
    *,
    kind: Kind,
    top: int,
    hidden: np.ndarray | None = None,
    allowed: np.ndarray | None = None,
  ) -> tuple[StageState, jax.Array]:
    """Run a step of many rows; `state` is consumed.

    Args:
      plan_XR: int32 [PLAN, R], R one of `widths`. For each row its slot, the position of its first token,
        the number of tokens to run (0 for rows that are padding), and 1 if the sampler has yet to count
        the first token; then the tokens to run and the one after them: -1 for each that is drawn, and
        NOT_DRAWN for one after them that is not. Rows are in falling order of the number of tokens.
      hidden: Activations [R, D], where the span is not the first; then each row runs one token.
      allowed: uint32 [R, ceil(V / 32)], the tokens that may be drawn.
    Returns: The state, and int32 [LOOP, R, 2 + 2 * top]: tokens, the bits of their log-probabilities, and
      the ids and bits of log-probabilities of the likeliest. If the span is not the last: activations
      [R, D] in place of that.
    """
    width = plan_XR.shape[1]
    extra = [array for array in (hidden, allowed) if array is not None]
    if not self.span.is_last:
      return self._call(("pass", width), state, plan_XR, *extra)
    key = ("decode", width, kind, top, allowed is not None)
    return self._call(key, state, plan_XR, *extra)

  def verify(
    self,
    state: StageState,
    plan_XR: np.ndarray,
    *,
    kind: Kind,
    top: int,
    hidden: np.ndarray | None = None,
    allowed: np.ndarray | None = None,
  ) -> tuple[StageState, jax.Array]:
    """Run one token of each row, and drafts of what follows it as rows of their own; `state` is consumed.

    Only for the last stage. The sampler counts the tokens of a sequence up to the first that differs from
    its draft, and the slot's last token is that one.

    Args:
      plan_XR: int32 [DRAFT_PLAN, R], R a result of `width`. For each row its slot, its position, 1 (0 for
        rows that are padding), the number of rows of the same sequence before it, the token to run or -1
        for the one drawn last, and the draft of the token that it draws or -1 for the last row of a
        sequence.
      hidden, allowed: As for `decode`.
    Returns: The state, and int32 [R, 2 + 2 * top] as in `decode`.
    """
    extra = [array for array in (hidden, allowed) if array is not None]
    key = ("verify", plan_XR.shape[1], kind, top, allowed is not None)
    return self._call(key, state, plan_XR, *extra)

  def keep(self, state: StageState, slot: int, start: int, place: int) -> StageState:
    """Keep the block of a slot that begins at position `start`; `state` is consumed."""
    return self._call(("keep",), state, np.int32(slot), np.int32(start), np.int32(place))

  def score(self, x_TD: jax.Array, targets: np.ndarray, *, top: int) -> jax.Array:
    """Compute log-probabilities of `targets[i]` after row i of activations.

    Returns: int32 [bucket, 1 + 2 * top]: the bits of them, and as in `decode` the likeliest tokens.
    """
    length = x_TD.shape[0]
    return self._call(("score", length, top), x_TD, _padded(targets, length))

  def logits(self, x_TD: jax.Array, count: int) -> np.ndarray:
    """Compute the logits after the first `count` rows of activations; float32 [count, V]."""
    return np.asarray(self._call(("logits", x_TD.shape[0]), x_TD), np.float32)[:count]

  def bucket(self, length: int, start: int) -> int:
    """Choose the compiled length for `length` inputs from position `start` on.

    It is one of `buckets`, or shorter at the end of the cache: padding would go past it.

    Raises: ValueError: no length takes so many, or the cache has no room for them.
    """
    check_room(start, length, self.capacity)
    if length > self.buckets[-1]:
      raise ValueError(f"{length} inputs in a row of a prompt: at most {self.buckets[-1]}")
    wanted = next(b for b in self.buckets if b >= length)
    return min(wanted, self.capacity - start)

  def width(self, rows: int) -> int:
    """Choose the compiled number of rows for so many."""
    return next(width for width in (*self.widths, *self._wide) if width >= rows)

  @property
  def weight_bytes(self) -> int:
    """Bytes of the weights; arrays that two parameters share count once."""
    return self._programs.weight_bytes

  @property
  def cache_bytes(self) -> int:
    """Bytes of one sequence's cache."""
    cache = jax.eval_shape(lambda: self._programs.new_cache(slots=1, capacity=self.capacity))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))

  @property
  def working_bytes(self) -> int:
    """Bytes of the neediest program beside its inputs and outputs, by XLA's memory analysis."""
    return max(run.memory_analysis().temp_size_in_bytes for run in self._run.values())

  # ---- compiling

  def _why_no_drafts(self) -> str:
    if self._programs.kind == "fused":
      return "a row of the fused programs does not see what other rows of the same step store"
    if self.config.conv_width:
      return "a convolution cannot go back to an earlier position"
    if self.config.num_experts:
      return "the bits of a row of experts follow which other rows there are"
    if not self._programs.rows_agree and self.widths != (self.slots,):
      return "'quick' programs for one row and for several have sums of other order"
    if not self._programs.rows_agree and self.slots == 1:
      return "this model's rows have the same bits in programs of one width only, here of one row"
    return ""

  def _compile_first(self) -> None:
    """Compile what every request needs, two programs at a time."""
    keys: list[tuple[Any, ...]] = [("prompt", length) for length in self.buckets if length > 1]
    keys = keys or [("prompt", 1)]
    if self.span.is_last:
      keys += [
        ("decode", self.widths[0], "greedy", 0, False), ("draw", "greedy", 0), ("open",),
      ]  # fmt: skip
    else:
      keys.append(("pass", self.widths[0]))
    lowered = [self._lower(key) for key in keys]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
      compiled = pool.map(lambda program: program.compile(), lowered)
      self._run.update(zip(keys, compiled, strict=True))

  def _call(self, key: tuple[Any, ...], *args: Any) -> Any:
    if key not in self._run:
      began_s = time.perf_counter()
      self._run[key] = self._lower(key).compile()
      self.compiling_s += time.perf_counter() - began_s
    if key[0] in ("open", "observe", "keep", "restore", "copy"):
      return self._run[key](*args)
    return self._run[key](self._programs.params, *args)

  def _lower(self, key: tuple[Any, ...]) -> Any:
    name, rest = key[0], key[1:]
    state = jax.eval_shape(self._empty_state)
    one, vocab_size = _ints(), self.config.vocab_size

    def hidden(rows: int) -> list[Any]:
      return [] if self.span.is_first else [self._activations(rows)]

    def masks(rows: int) -> Any:
      return jax.ShapeDtypeStruct((rows, -(-vocab_size // 32)), jnp.uint32)

    match name:
      case "prompt":
        args = [_ints(rest[0]), _ints(3), *hidden(rest[0])]
        return self._with_weights(self._steps.prompt, state, *args)
      case "draw":
        kind, top, *masked = rest
        args = [self._activations(1), one, *([masks(1)] if masked else [])]
        return self._with_weights(
          functools.partial(self._steps.draw, kind=kind, top=top), state, *args
        )
      case "decode":
        width, kind, top, masked = rest
        args = [_ints(PLAN, width), *hidden(width), *([masks(width)] if masked else [])]
        run = functools.partial(
          self._steps.decode, kind=kind, top=top, rounds=self.loop, masked=masked
        )
        return self._with_weights(run, state, *args)
      case "verify":
        width, kind, top, masked = rest
        args = [_ints(DRAFT_PLAN, width), *hidden(width), *([masks(width)] if masked else [])]
        run = functools.partial(self._steps.verify, kind=kind, top=top, masked=masked)
        return self._with_weights(run, state, *args)
      case "pass":
        return self._with_weights(
          self._steps.pass_on, state, _ints(PLAN, rest[0]), *hidden(rest[0])
        )
      case "score":
        length, top = rest
        run = functools.partial(self._steps.score, top=top)
        params = self._programs.params
        return jax.jit(run).lower(params, self._activations(length), _ints(length))
      case "logits":
        run = lambda params, x_TD: self._programs.logits(params, x_TD[None])[0]  # noqa: E731
        return jax.jit(run).lower(self._programs.params, self._activations(rest[0]))
      case "open":
        settings = sampling.settings_of(Sampling(), (), vocab_size)
        return jax.jit(stage_state.begin, donate_argnums=0).lower(state, one, settings)
      case "observe":
        args = [one, _ints(PREFILL), one]
        return jax.jit(stage_state.observe, donate_argnums=0).lower(state, *args)
      case "keep" | "restore":
        run = stage_state.keep if name == "keep" else stage_state.restore
        run = functools.partial(run, length=self.chunks[0])
        return jax.jit(run, donate_argnums=0).lower(state, one, one, one)
      case "copy":
        return jax.jit(stage_state.copy, donate_argnums=0).lower(state, one, one)
    raise AssertionError(key)

  def _with_weights(self, run: Callable[..., Any], state: StageState, *args: Any) -> Any:
    return jax.jit(run, donate_argnums=1).lower(self._programs.params, state, *args)

  def _empty_state(self) -> StageState:
    new_cache = self._programs.new_cache
    is_last = self.span.is_last
    return StageState(
      cache=new_cache(slots=self.slots, capacity=self.capacity),
      pool=new_cache(slots=self.places, capacity=capacity_for(self.chunks[0]))
      if self.places
      else None,
      sampler=SamplerState.new(self.slots, self.config.vocab_size) if is_last else None,
      last_P=jnp.zeros(self.slots, jnp.int32) if is_last else None,
    )

  def _activations(self, rows: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, self.config.model_dim), self.activations)


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def _padded(x: np.ndarray, length: int) -> np.ndarray:
  out = np.zeros((length, *x.shape[1:]), x.dtype)
  out[: len(x)] = x
  return out
