"""Compiles a span of layers ahead of time: prefill for a few input lengths, decode for one token."""

import concurrent.futures
import logging
import os
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neurojax import config
from neurojax.config import Sampling
from neurojax.forms import PREFILL, capacity_for
from neurojax.model import sample as sampling
from neurojax.model.cache import Cache, check_room
from neurojax.model.neurollm import NeuroLLM, empty_cache
from neurojax.model.sample import SamplerState
from neurojax.stage.fused import Kernels
from neurojax.stage.programs import programs_of

log = logging.getLogger(__name__)

BUCKETS = (1, 64, PREFILL)
"""Input lengths that are compiled; a shorter input is padded to the next, a longer one is split."""


def use_compilation_cache(folder: str | os.PathLike[str]) -> None:
  """Keep compiled programs in `folder` between runs, unless JAX_COMPILATION_CACHE_DIR names one.

  The folder must belong to this user alone: whoever can write there can run code here.
  """
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    try:
      os.makedirs(folder, mode=0o700, exist_ok=True)
    except OSError as error:
      log.warning("compiled programs are not kept: %s", error)
      return
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
  if kept := jax.config.jax_compilation_cache_dir:
    _remove_cut_entries(pathlib.Path(kept))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


_CHECKED = "neurojax-checked"
"""A file in the folder, as old as its newest entry that is known to be whole."""


def _remove_cut_entries(folder: pathlib.Path) -> None:
  """Remove entries of XLA's cache that a crash or a full disk cut short.

  JAX warns of such an entry in every run and never writes it anew. Each entry is read once: only
  those written since the last look are.
  """
  try:
    stamp = folder / _CHECKED
    since_ns = stamp.stat().st_mtime_ns if stamp.exists() else 0
    newest_ns, cut = since_ns, []
    for entry in folder.glob("*-cache"):
      written_ns = entry.stat().st_mtime_ns
      newest_ns = max(newest_ns, written_ns)
      if written_ns >= since_ns and not _is_whole(entry.read_bytes()):
        cut.append(entry)
    for entry in cut:
      entry.unlink(missing_ok=True)
    if newest_ns > since_ns:
      stamp.touch()
      os.utime(stamp, ns=(newest_ns, newest_ns))
  except OSError as error:
    log.debug("%s: its entries are not checked: %s", folder, error)
    return
  if cut:
    log.info("%s: %d entries were cut short and are removed", folder, len(cut))


def _is_whole(entry: bytes) -> bool:
  """Whether the compressed content of an entry is complete; of another format, whether there is any."""
  if entry[:1] != b"\x78":
    return len(entry) > 0
  stream = zlib.decompressobj()
  try:
    # A MiB of output at a time: an entry may expand to hundreds.
    while entry and not stream.eof:
      stream.decompress(entry, 1 << 20)
      entry = stream.unconsumed_tail
  except zlib.error:
    return False
  return stream.eof


class CompiledStage:
  """The compiled programs of one span, for one sequence at a time.

  Args:
    model: The layers. Fused programs consume them, so that memory holds the weights once.
    context_length: Positions that a sequence may use; the cache holds at least as many.
    buckets: Input lengths to compile, ascending, starting with 1.
    programs: Which programs to compile, by the rules of `stage.programs.programs_of`.
    kernels: Kernels of the fused programs; those for the device if absent.

  Attributes:
    programs: "model" or "fused", which was chosen.
    dtype: Dtype of the cache and of what a layer computes.
    activations: Dtype of what passes from one stage to the next.
  Raises: ValueError, NotImplementedError: as `programs_of` does.
  """

  def __init__(
    self,
    model: NeuroLLM,
    *,
    context_length: int,
    buckets: Sequence[int] = BUCKETS,
    programs: config.Programs = "auto",
    kernels: Kernels | None = None,
  ):
    if context_length < 1:
      raise ValueError(f"context_length = {context_length}: it must be at least 1")
    if not buckets or buckets[0] != 1 or list(buckets) != sorted(set(buckets)):
      raise ValueError(f"buckets = {tuple(buckets)}: they must ascend and start with 1")
    self.config, self.span, self.dtype = model.config, model.span, model.dtype
    self.context_length = context_length
    self.capacity = capacity_for(context_length)
    self.buckets = tuple(b for b in buckets if b <= self.capacity)
    self._programs = programs_of(
      model, programs, capacity=self.capacity, lengths=self.buckets, kernels=kernels
    )
    self.programs, self.activations = self._programs.kind, self._programs.activations
    cache = jax.eval_shape(self._empty_cache)
    jobs: dict[tuple[str, int], Any] = {}
    for length in self.buckets:
      jobs["forward", length] = self._lower_forward(length, cache)
      if self.span.is_last:
        jobs["observe", length] = self._lower_observe(length)
        if length > 1:
          jobs["pick", length] = self._lower_pick(length)
    if self.span.is_last:
      jobs["sample", 1] = self._lower_sample()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
      compiled = pool.map(lambda job: job.compile(), jobs.values())
      self._run = dict(zip(jobs, compiled, strict=True))
    self._new_cache = jax.jit(self._empty_cache)

  def new_cache(self) -> Cache:
    """Make an empty cache for one sequence."""
    return self._new_cache()

  def new_sampler(self, request: Sampling) -> SamplerState:
    """Make the sampler of one sequence."""
    return SamplerState.new([request], self.config.vocab_size)

  def bucket(self, length: int, start: int) -> int:
    """Choose the compiled length that takes most of `length` inputs from position `start` on.

    Raises: ValueError: not even one position is left.
    """
    check_room(start, 1, self.capacity)
    fitting = [b for b in self.buckets if start + b <= self.capacity]
    return next((b for b in fitting if b >= length), fitting[-1])

  def forward(self, inputs: np.ndarray, cache: Cache, start: int) -> tuple[jax.Array, Cache]:
    """Run up to one bucket of inputs; `cache` is consumed.

    Args:
      inputs: int32 ids [n] if the span is the first, else activations [n, D]; n is at most a bucket.
      start: Position of the first input.
    Returns: Activations [1, bucket, D], of which the first n rows mean something, and the cache.
    """
    length = self.bucket(len(inputs), start)
    if len(inputs) > length:
      raise ValueError(f"{len(inputs)} inputs at position {start}: at most {length} fit one call")
    padded = np.zeros((1, length, *inputs.shape[1:]), self._input_dtype)
    padded[0, : len(inputs)] = inputs
    start_B, count_B = np.full(1, start, np.int32), np.full(1, len(inputs), np.int32)
    return self._run["forward", length](self._programs.params, padded, cache, start_B, count_B)

  def observe(self, sampler: SamplerState, tokens: np.ndarray) -> SamplerState:
    """Tell the sampler of up to one bucket of prompt tokens; `sampler` is consumed."""
    length = next(b for b in self.buckets if b >= len(tokens))
    padded = np.zeros((1, length), np.int32)
    padded[0, : len(tokens)] = tokens
    return self._run["observe", length](sampler, padded, np.int32(len(tokens)))

  def sample(
    self, x_BTD: jax.Array, row: int, sampler: SamplerState
  ) -> tuple[int, float, SamplerState]:
    """Draw the token after row `row` of the activations `forward` gave; `sampler` is consumed.

    Returns: the token's id, its log-probability, the sampler after it.
    """
    if x_BTD.shape[1] > 1:
      x_BTD = self._run["pick", x_BTD.shape[1]](x_BTD, np.int32(row))
    token_B, logprob_B, sampler = self._run["sample", 1](self._programs.params, x_BTD, sampler)
    # Through numpy: indexing a jax.Array would dispatch a program for it.
    return int(np.asarray(token_B)[0]), float(np.asarray(logprob_B)[0]), sampler

  def score(self, x_BTD: jax.Array, targets: np.ndarray) -> np.ndarray:
    """Compute the log-probability of `targets[i]` after row i of the activations; float32 [n]."""
    length = x_BTD.shape[1]
    if ("score", length) not in self._run:
      self._run["score", length] = self._lower_score(length).compile()
    padded = np.zeros((1, length), np.int32)
    padded[0, : len(targets)] = targets
    return np.asarray(self._run["score", length](self._programs.params, x_BTD, padded))[
      0, : len(targets)
    ]

  def logits(self, x_BTD: jax.Array, count: int) -> np.ndarray:
    """Compute the logits after the first `count` rows of activations; float32 [count, V]."""
    length = x_BTD.shape[1]
    if ("logits", length) not in self._run:
      self._run["logits", length] = (
        jax.jit(self._programs.logits)
        .lower(self._programs.params, self._activations(length))
        .compile()
      )
    logits_BTV = self._run["logits", length](self._programs.params, x_BTD)
    return np.asarray(logits_BTV, np.float32)[0, :count]

  @property
  def weight_bytes(self) -> int:
    """Bytes of the weights; arrays that two parameters share count once."""
    return self._programs.weight_bytes

  @property
  def cache_bytes(self) -> int:
    """Bytes of one sequence's cache."""
    return sum(
      leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(self._empty_cache))
    )

  @property
  def working_bytes(self) -> int:
    """Bytes of the neediest program beside its inputs and outputs, by XLA's memory analysis."""
    return max(run.memory_analysis().temp_size_in_bytes for run in self._run.values())

  @property
  def _input_dtype(self) -> np.dtype:
    return np.dtype(np.int32) if self.span.is_first else self.activations

  def _empty_cache(self) -> Cache:
    return empty_cache(self.config, self.span, batch=1, capacity=self.capacity, dtype=self.dtype)

  def _lower_forward(self, length: int, cache: Cache) -> Any:
    shape = (1, length) if self.span.is_first else (1, length, self.config.model_dim)
    inputs = jax.ShapeDtypeStruct(shape, self._input_dtype)
    one_B = jax.ShapeDtypeStruct((1,), jnp.int32)
    return jax.jit(self._programs.forward, donate_argnums=2).lower(
      self._programs.params, inputs, cache, one_B, one_B
    )

  def _lower_sample(self) -> Any:
    def draw(params: Any, x_BTD: jax.Array, sampler: SamplerState):
      return sampling.sample(self._programs.logits(params, x_BTD)[:, 0], sampler)

    return jax.jit(draw, donate_argnums=2).lower(
      self._programs.params, self._activations(1), self._sampler()
    )

  def _lower_pick(self, length: int) -> Any:
    def pick(x_BTD: jax.Array, row: jax.Array) -> jax.Array:
      return jax.lax.dynamic_slice_in_dim(x_BTD, row, 1, axis=1)

    row = jax.ShapeDtypeStruct((), jnp.int32)
    return jax.jit(pick).lower(self._activations(length), row)

  def _lower_observe(self, length: int) -> Any:
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    return jax.jit(sampling.observe, donate_argnums=0).lower(self._sampler(), tokens, count)

  def _lower_score(self, length: int) -> Any:
    def score(params: Any, x_BTD: jax.Array, targets: jax.Array):
      return sampling.score(self._programs.logits(params, x_BTD), targets)

    targets = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return jax.jit(score).lower(self._programs.params, self._activations(length), targets)

  def _activations(self, length: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, length, self.config.model_dim), self.activations)

  def _sampler(self) -> SamplerState:
    return jax.eval_shape(lambda: self.new_sampler(Sampling()))
