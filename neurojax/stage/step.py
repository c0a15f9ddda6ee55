"""What a stage is given and what it gives back in one step: a batch of rows, each of one sequence."""

import dataclasses
from typing import Literal

import numpy as np

Role = Literal["prompt", "drawn", "replayed"]
"""What the sampler has to make of a row's tokens.

"prompt": tokens of the prompt; the sampler only marks them as seen.
"drawn": tokens that the sampler drew, and so has counted already.
"replayed": tokens that were drawn before the sequence was opened anew; a fresh sampler counts each and
moves its draw counter on, as if it had drawn it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """The next positions of one sequence.

  Attributes:
    slot: Slot of the sequence.
    start: Position of the first token; it must be the number of positions that the slot holds.
    tokens: int32 ids [n]. Every stage gets them; the last one needs them for the sampler and scores.
      None: one token, the last one that was drawn in this slot, which the device knows.
    hidden: Activations [n + k, D] from the previous stage; None for the first stage.
    role: What the sampler makes of the tokens.
    draws: Tokens to draw after the last position, each of them the input of the next; 0: none.
    top: Likeliest tokens to name beside each token that is drawn or scored.
    targets: int32 ids [n]; the last stage gives the log-probability of targets[i] after tokens[i].
    keep: Places in which the blocks of these positions are kept for later prompts, one for each whole
      block of the grid; () keeps none.
    seen: int32 ids of prompt tokens that were restored or copied, and that the sampler has yet to see.
    allowed: uint32 [ceil(V / 32)], a bit for each token that may be drawn, the lowest first; None: all.
      Needs draws = 1.
    draft: int32 [k], tokens that are guessed to follow a single drawn one; k may be 0. Needs draws = 1. The
      row gives the tokens that are drawn one after the other up to the first that differs from its guess,
      that one included: 1 to k + 1 tokens, which are those of k + 1 rows without drafts. The sequence then
      stands behind the guesses that were right. On a stage that is not the last one it stands behind all of
      them, and the next row may start up to k positions before that. None: a row without drafts.
  """

  slot: int
  start: int
  tokens: np.ndarray | None
  hidden: np.ndarray | None = None
  role: Role = "prompt"
  draws: int = 0
  top: int = 0
  targets: np.ndarray | None = None
  keep: tuple[int, ...] = ()
  seen: np.ndarray | None = None
  allowed: np.ndarray | None = None
  draft: np.ndarray | None = None

  @property
  def length(self) -> int:
    """Number of positions that are given (n); those of drawn tokens and of drafts come in addition."""
    return 1 if self.tokens is None else len(self.tokens)

  @property
  def drafts(self) -> int:
    """Number of guessed tokens (k)."""
    return 0 if self.draft is None else len(self.draft)


@dataclasses.dataclass(frozen=True)
class Tops:
  """The likeliest tokens at each of m places, in falling order.

  Attributes:
    ids: int32 [m, k].
    logprobs: float32 [m, k], natural logarithms under the logits as the model gives them.
  """

  ids: np.ndarray
  logprobs: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowOutput:
  """The result of a row.

  Attributes:
    hidden: Activations [n + k, D] for the next stage; None from the last stage.
    tokens: int32 [draws], the tokens that were drawn; 1 to k + 1 of a row with k drafts.
    logprobs: float32 like `tokens`, natural logarithms of their probabilities under the logits as the model
      gives them.
    tops: The likeliest tokens at the places of `tokens`, if `top` was asked for.
    scores: float32 [n], log-probabilities of the targets, if those were given.
    score_tops: The likeliest tokens at the places of `scores`, if `top` was asked for.
    error: Why the row failed, in place of all else. Its slot is closed then; other rows are not hurt.
    compute_s: Seconds that the stage computed the step that the row was in.
  """

  hidden: np.ndarray | None = None
  tokens: np.ndarray | None = None
  logprobs: np.ndarray | None = None
  tops: Tops | None = None
  scores: np.ndarray | None = None
  score_tops: Tops | None = None
  error: Exception | None = None
  compute_s: float = 0.0
