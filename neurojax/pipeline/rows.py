"""Turns the rows of steps and their outcomes into messages, and back. Everything that comes in is checked here."""

from collections.abc import Iterable, Iterator

import numpy as np

from neurojax.engine.api import MOST_TOPS
from neurojax.forms import PREFILL
from neurojax.pipeline import pipeline_pb2 as pb
from neurojax.stage.step import Role, Row, RowOutput, Tops
from neurojax.wire import tensor, wire_pb2

_ROLES: dict[Role, pb.Role] = {
  "prompt": pb.ROLE_PROMPT,
  "drawn": pb.ROLE_DRAWN,
  "replayed": pb.ROLE_REPLAYED,
}
_NAMES = {number: role for role, number in _ROLES.items()}


def row(sequence: str, index: int, given: Row) -> pb.Row:
  """Write a row, whose tokens must be given.

  Args:
    sequence: Name of the sequence.
    index: Number of the sequence's step.
  """
  assert given.tokens is not None, "no stage but the last knows what it drew"
  allowed = None if given.allowed is None else given.allowed.view(np.int32)
  return pb.Row(
    sequence=sequence,
    index=index,
    start=given.start,
    tokens=tensor.encode(given.tokens),
    hidden=_written(given.hidden),
    role=_ROLES[given.role],
    draws=given.draws,
    top=given.top,
    targets=_written(given.targets),
    keep=given.keep,
    seen=_written(given.seen),
    allowed=_written(allowed),
  )


def read_row(message: pb.Row, slot: int) -> Row:
  """Read a row. Whether it fits its slot is for the runtime to check.

  Raises: ValueError: a tensor is no array, or a value is none that a row can have.
  """
  if not message.HasField("tokens"):
    raise ValueError("a row without tokens")
  if message.role not in _NAMES:
    raise ValueError(f"role = {message.role}: no such role")
  if message.top > MOST_TOPS:
    raise ValueError(f"top = {message.top}: at most {MOST_TOPS}")
  seen, allowed = _ids(message, "seen"), _ids(message, "allowed")
  if seen is not None and len(seen) > message.start:
    raise ValueError(f"{len(seen)} tokens seen before position {message.start}")
  return Row(
    slot=slot,
    start=message.start,
    tokens=tensor.decode(message.tokens, what="tokens", max_dims=1),
    hidden=tensor.decode(message.hidden, what="activations", max_dims=2)
    if message.HasField("hidden")
    else None,
    role=_NAMES[message.role],
    draws=message.draws,
    top=message.top,
    targets=_ids(message, "targets"),
    keep=tuple(message.keep),
    seen=seen,
    allowed=None if allowed is None else allowed.view(np.uint32),
  )


def steps(rows: Iterable[pb.Row]) -> Iterator[pb.Step]:
  """Put rows into frames that keep to `messages.message_limit`.

  A frame has at most PREFILL positions, and one row whose prompt the sampler has yet to see.
  """
  step, positions, seen = pb.Step(), 0, 0
  for message in rows:
    length, sees = message.tokens.shape[0], message.HasField("seen")
    if step.rows and (positions + length > PREFILL or seen + sees > 1):
      yield step
      step, positions, seen = pb.Step(), 0, 0
    step.rows.append(message)
    positions, seen = positions + length, seen + sees
  if step.rows:
    yield step


def outcome(sequence: str, index: int, output: RowOutput) -> pb.RowOutcome:
  """Write what the last stage answers to a row, or that another one is done with it."""
  return pb.RowOutcome(
    sequence=sequence,
    index=index,
    tokens=_written(output.tokens),
    logprobs=_written(output.logprobs),
    tops=_tops(output.tops),
    scores=_written(output.scores),
    score_tops=_tops(output.score_tops),
  )


def read_outcome(message: pb.RowOutcome, given: Row, vocab_size: int) -> RowOutput:
  """Read the last stage's answer to a row.

  Raises: ValueError: it does not fit what was asked; the message goes on from the name of the stage.
  """
  asked = {
    "tokens": given.draws > 0,
    "logprobs": given.draws > 0,
    "tops": given.draws > 0 and given.top > 0,
    "scores": given.targets is not None,
    "score_tops": given.targets is not None and given.top > 0,
  }
  if any(message.HasField(name) != is_asked for name, is_asked in asked.items()):
    raise ValueError("it answered something that was not asked")
  # A vocabulary may be smaller than what was asked for.
  top = min(given.top, vocab_size)
  output = RowOutput()
  if given.draws:
    ids, logprobs = _drawn(message, given.draws, vocab_size)
    tops = _read_tops(message.tops, (given.draws, top), vocab_size) if top else None
    output = RowOutput(tokens=ids, logprobs=logprobs, tops=tops)
  if given.targets is None:
    return output
  scores = tensor.decode(message.scores, what="scores", max_dims=1)
  if scores.shape != (given.length,) or not np.isfinite(scores).all():
    raise ValueError(f"it answered {len(scores)} scores for {given.length} tokens")
  shape = given.length, top
  tops = _read_tops(message.score_tops, shape, vocab_size) if top else None
  return RowOutput(
    tokens=output.tokens,
    logprobs=output.logprobs,
    tops=output.tops,
    scores=scores,
    score_tops=tops,
  )


def _drawn(message: pb.RowOutcome, draws: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
  ids = tensor.decode(message.tokens, what="tokens", max_dims=1)
  logprobs = tensor.decode(message.logprobs, what="log-probabilities", max_dims=1)
  if ids.dtype != np.int32 or not ids.shape == logprobs.shape == (draws,):
    raise ValueError(f"it answered {len(ids)} tokens where {draws} were asked for")
  for token, logprob in zip(ids.tolist(), logprobs.tolist(), strict=True):
    if not (0 <= token < vocab_size and np.isfinite(logprob)):
      raise ValueError(f"it answered token {token}, log-probability {logprob}")
  return ids, logprobs


def _read_tops(message: pb.Tops, shape: tuple[int, int], vocab_size: int) -> Tops:
  ids = tensor.decode(message.ids, what="likeliest tokens", max_dims=2)
  logprobs = tensor.decode(message.logprobs, what="their log-probabilities", max_dims=2)
  if ids.dtype != np.int32 or not ids.shape == logprobs.shape == shape:
    raise ValueError(f"it named {list(ids.shape)} likeliest tokens where {list(shape)} were asked")
  if not ((ids >= 0) & (ids < vocab_size)).all() or np.isnan(logprobs).any():
    raise ValueError("it named likeliest tokens that are none")
  return Tops(ids, logprobs)


def _tops(tops: Tops | None) -> pb.Tops | None:
  if tops is None:
    return None
  return pb.Tops(ids=tensor.encode(tops.ids), logprobs=tensor.encode(tops.logprobs))


def _written(array: np.ndarray | None) -> wire_pb2.Tensor | None:
  return None if array is None else tensor.encode(array)


def _ids(message: pb.Row, name: str) -> np.ndarray | None:
  if not message.HasField(name):
    return None
  ids = tensor.decode(getattr(message, name), what=name, max_dims=1)
  if ids.dtype != np.int32:
    raise ValueError(f"{name}: {ids.dtype}, expected int32")
  return ids
