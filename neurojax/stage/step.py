"""The input and the output of a stage in one step."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepInput:
  """The next n positions of a sequence.

  Attributes:
    start: Position of the first token; it must be the number of positions that the cache holds.
    tokens: int32 ids [n]. Every stage gets them; the last one needs them for the sampler and scores.
    hidden: Activations [n, D] from the previous stage; None for the first stage.
    is_answer: Whether the sampler drew the tokens, and so has counted them already.
    sample: Whether the last stage draws the token that follows the last position.
    targets: int32 ids [n]; the last stage gives the log-probability of targets[i] after tokens[i].
  """

  start: int
  tokens: np.ndarray
  hidden: np.ndarray | None = None
  is_answer: bool = False
  sample: bool = False
  targets: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOutput:
  """The result of a step.

  Attributes:
    hidden: Activations [n, D] for the next stage; None from the last stage.
    token: The token that was drawn, if that was asked for.
    logprob: Natural logarithm of its probability under the logits as the model gives them.
    scores: float32 [n], log-probabilities of the targets, if those were given.
    compute_s: Seconds that the stage computed.
  """

  hidden: np.ndarray | None = None
  token: int | None = None
  logprob: float | None = None
  scores: np.ndarray | None = None
  compute_s: float = 0.0
