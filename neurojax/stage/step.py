"""What goes into a stage and comes out of it, once per step. Imports no JAX."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepInput:
  """The next n positions of a sequence.

  Attributes:
    start: Position of the first; it must be where the sequence stands.
    tokens: int32 ids [n]; every stage gets them, for the sampler and for scoring.
    hidden: Activations [n, D] as the stage before gave them; None for the first stage.
    is_answer: The tokens were drawn by the sampler, which has counted them already.
    sample: Draw the token that follows the last position (the last stage does).
    targets: int32 ids [n] whose log-probability after each position is wanted (the last stage).
  """

  start: int
  tokens: np.ndarray
  hidden: np.ndarray | None = None
  is_answer: bool = False
  sample: bool = False
  targets: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOutput:
  """Activations [n, D] of a stage that is not the last; what was asked for of the last one."""

  hidden: np.ndarray | None = None
  token: int | None = None
  logprob: float | None = None
  scores: np.ndarray | None = None
  compute_s: float = 0.0
