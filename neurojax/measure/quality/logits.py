"""Computes all logits of a sequence, by stages in this process."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from neurojax.stage.compile import CompiledStage


def read_tokens(path: Path) -> np.ndarray:
  """Read a JSON file that holds one list of token ids.

  Returns: int32 [T].
  Raises: ValueError: it holds something else or nothing.
  """
  try:
    ids: Any = json.loads(path.read_text(encoding="utf-8"))
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f"{path}: not JSON: {error}") from error
  if not isinstance(ids, list) or not ids:
    raise ValueError(
      f"{path}: a list of token ids is expected, as `neurojax tokenize --json` gives"
    )
  for place, token in enumerate(ids):
    if isinstance(token, bool) or not isinstance(token, int):
      raise ValueError(f"{path}: entry {place} is {token!r}: ids are integers")
    if abs(token) >= 1 << 31:
      raise ValueError(f"{path}: entry {place} is {token}: no vocabulary has such an id")
  return np.array(ids, np.int32)


def check_tokens(tokens: np.ndarray, vocab_size: int, *, where: str) -> None:
  """Refuse ids that a model does not have.

  Args:
    tokens: int32 [T].
    where: Where the ids come from, for the error.
  Raises: ValueError: names the first such id.
  """
  for place in np.flatnonzero((tokens < 0) | (tokens >= vocab_size))[:1]:
    raise ValueError(
      f"{where}: entry {place} is {tokens[place]}, outside the vocabulary of {vocab_size} (0 to"
      f" {vocab_size - 1})"
    )


def logits(
  stages: Sequence[CompiledStage], tokens: np.ndarray, *, decode_from: int | None = None
) -> Float32[np.ndarray, "T V"]:
  """Compute the logits after each of T tokens.

  Args:
    stages: Stages that hold all layers, in order.
    tokens: int32 [T].
    decode_from: Index of the first token that is fed alone, as in decode; those before it are a prompt,
      and all are if absent.
  Raises:
    ValueError: the place is not within the tokens, or the stages have no room for them.
    FloatingPointError: logits are NaN or infinite.
  """
  count = len(tokens)
  prompt = count if decode_from is None else decode_from
  if not 0 <= prompt <= count:
    raise ValueError(f"decode_from = {prompt}: between 0 and the {count} tokens")
  states = [stage.open(stage.new_state(), 0, None) for stage in stages]
  rows = []
  start = 0
  while start < count:
    chunk = stages[0].chunks[0]
    take = min(prompt - start, chunk - start % chunk) if start < prompt else 1
    part, hidden = tokens[start : start + take], None
    for place, stage in enumerate(stages):
      states[place], x_TD, _ = stage.prompt(states[place], 0, start, part, hidden)
      hidden = np.asarray(x_TD)[:take] if place + 1 < len(stages) else None
    rows.append(stages[-1].logits(x_TD, take))
    start += take
  found = np.concatenate(rows)
  if not np.isfinite(found).all():
    raise FloatingPointError("logits are NaN or infinite")
  return found
