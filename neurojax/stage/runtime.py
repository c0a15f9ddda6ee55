"""Runs the steps of sequences on one compiled stage, keeps their caches, and checks every input and output."""

import dataclasses
import time

import jax
import numpy as np

from neurojax.config import Sampling
from neurojax.model.cache import Cache
from neurojax.model.sample import SamplerState
from neurojax.stage.compile import CompiledStage
from neurojax.stage.step import StepInput, StepOutput


@dataclasses.dataclass
class _Sequence:
  """An open sequence.

  Attributes:
    cache: Its cache.
    sampler: Its sampler, on the last stage.
    length: Number of positions that the cache holds.
  """

  cache: Cache
  sampler: SamplerState | None
  length: int = 0


class StageRuntime:
  """Holds one compiled stage and the sequences that are open on it.

  It is not thread-safe: only one call may run at a time.

  Args:
    max_sequences: Most sequences that may be open at the same time. Their caches take
      `max_sequences * stage.cache_bytes`.
  """

  def __init__(self, stage: CompiledStage, *, max_sequences: int):
    if max_sequences < 1:
      raise ValueError(f"max_sequences = {max_sequences}: it must be at least 1")
    self.stage, self.max_sequences = stage, max_sequences
    self._sequences: dict[str, _Sequence] = {}

  @property
  def num_sequences(self) -> int:
    return len(self._sequences)

  def open(self, sequence: str, sampling: Sampling) -> None:
    """Make room for a sequence. Raises: ValueError: it is open already, or there is no room."""
    if sequence in self._sequences:
      raise ValueError(f"sequence {sequence!r} is open already")
    if len(self._sequences) >= self.max_sequences:
      raise ValueError(
        f"all {self.max_sequences} sequence places are taken: wait, or allow more (sequences, --sequences)"
      )
    sampler = self.stage.new_sampler(sampling) if self.stage.span.is_last else None
    self._sequences[sequence] = _Sequence(self.stage.new_cache(), sampler)

  def close(self, sequence: str) -> None:
    """Free a sequence's cache; closing one that is not open does nothing."""
    self._sequences.pop(sequence, None)

  def step(self, sequence: str, given: StepInput) -> StepOutput:
    """Advance a sequence. A step that fails closes it, because its cache is then incomplete.

    Raises:
      ValueError: the sequence is not open, or the input does not fit it.
      FloatingPointError: activations or logits are NaN or infinite.
    """
    state = self._sequences.get(sequence)
    if state is None:
      raise ValueError(f"sequence {sequence!r} is not open here")
    try:
      self._check(state, given)
      began = time.perf_counter()
      output = self._advance(state, given)
    except BaseException:
      self.close(sequence)
      raise
    return dataclasses.replace(output, compute_s=time.perf_counter() - began)

  def _check(self, state: _Sequence, given: StepInput) -> None:
    stage, n = self.stage, len(given.tokens)
    if given.tokens.dtype != np.int32 or given.tokens.ndim != 1 or n == 0:
      raise ValueError(
        f"tokens {given.tokens.dtype}{list(given.tokens.shape)}: expected int32 [n], n > 0"
      )
    if given.start != state.length:
      raise ValueError(f"start = {given.start}: the sequence stands at position {state.length}")
    if given.start + n > stage.context_length:
      raise ValueError(
        f"positions {given.start}..{given.start + n - 1} pass the context of {stage.context_length}"
      )
    for name, ids in (("token", given.tokens), ("target", given.targets)):
      if ids is not None and not ((ids >= 0) & (ids < stage.config.vocab_size)).all():
        bad = int(ids[(ids < 0) | (ids >= stage.config.vocab_size)][0])
        raise ValueError(f"{name} {bad} is outside the vocabulary of {stage.config.vocab_size}")
    if given.targets is not None and given.targets.shape != given.tokens.shape:
      raise ValueError(f"{len(given.targets)} targets for {n} tokens")
    if stage.span.is_first:
      if given.hidden is not None:
        raise ValueError("activations sent to the first stage: it takes tokens")
      return
    if given.hidden is None:
      raise ValueError(f"no activations for the stage of layers {stage.span}")
    wanted = (n, stage.config.model_dim)
    if given.hidden.shape != wanted or given.hidden.dtype != stage.activations:
      raise ValueError(
        f"activations {given.hidden.dtype}{list(given.hidden.shape)}: expected "
        f"{stage.activations}{list(wanted)}, as the {stage.programs!r} programs give them"
      )
    if not np.isfinite(given.hidden).all():
      raise FloatingPointError("activations that came in are NaN or infinite")

  def _advance(self, state: _Sequence, given: StepInput) -> StepOutput:
    stage, n = self.stage, len(given.tokens)
    inputs = given.tokens if stage.span.is_first else given.hidden
    hidden, scores = [], []
    done = 0
    while done < n:
      take = min(n - done, stage.bucket(n - done, given.start + done))
      part = slice(done, done + take)
      x_BTD, state.cache = stage.forward(inputs[part], state.cache, given.start + done)
      if not stage.span.is_last:
        hidden.append(np.asarray(x_BTD)[0, :take])
      else:
        if not given.is_answer:
          state.sampler = stage.observe(state.sampler, given.tokens[part])
        if given.targets is not None:
          scores.append(stage.score(x_BTD, given.targets[part]))
      done += take
    state.length += n
    if not stage.span.is_last:
      out = hidden[0] if len(hidden) == 1 else np.concatenate(hidden)
      if not np.isfinite(out).all():
        raise FloatingPointError("activations computed here are NaN or infinite")
      return StepOutput(hidden=out)
    token = logprob = None
    if given.sample:
      token, logprob, state.sampler = stage.sample(x_BTD, take - 1, state.sampler)
      if not np.isfinite(logprob):
        raise FloatingPointError("logits computed here are NaN or infinite")
    joined = np.concatenate(scores) if scores else None
    if joined is not None and not np.isfinite(joined).all():
      raise FloatingPointError("logits computed here are NaN or infinite")
    if token is None and joined is None:
      jax.block_until_ready(state.cache)
    return StepOutput(token=token, logprob=logprob, scores=joined)
