"""How the next token is chosen."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping

MOST_BIASES = 512
"""Entries that `Sampling.logit_bias` may have."""

MOST_STOP_IDS = 32
"""Stop ids that can be held back until there are `min_tokens`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How the next token is chosen from the logits.

  Applied in this order: repetition, frequency and presence penalties; logit_bias; min_tokens;
  temperature; top-k; top-p over what top-k left; min-p over what top-p left. The log-probability
  reported for a token is that of the untouched logits.

  Attributes:
    temperature: 0 takes the likeliest token (ties: the lowest id).
    top_k: Keep the k likeliest; None keeps all. Tokens that tie with the k-th are kept.
    top_p: Keep the smallest set of likeliest tokens whose probabilities reach top_p.
    min_p: Keep tokens with at least min_p times the probability of the likeliest.
    repetition_penalty: Divides positive and multiplies negative logits of every token seen in
      prompt or answer (arXiv:1909.05858, section 4.1); 1 is off.
    presence_penalty, frequency_penalty: Subtracted once, and once per occurrence, from tokens
      of the answer so far (the OpenAI API's definition); 0 is off.
    logit_bias: Added to the logits of single tokens: a mapping from ids to numbers between -1e6 and
      1e6, or pairs of them. 100 all but forces a token and -100 all but bans it; -inf bans it. At most
      512 tokens; kept as pairs in the order of their ids.
    min_tokens: Tokens that the answer has at least: stop ids are not drawn before, unless nothing
      else may be drawn.
    seed: With the index of the token in the answer it determines the random draw, 64 bits.

  Example:
    >>> import neurojax as nj
    >>> nj.Sampling(temperature=0.8, top_p=0.95, seed=7).top_k is None
    True
  """

  temperature: float = 0.0
  top_k: int | None = None
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0
  logit_bias: Mapping[int, float] | Iterable[tuple[int, float]] = ()
  min_tokens: int = 0
  seed: int = 0

  def __post_init__(self) -> None:
    def check(name: str, ok: bool, rule: str) -> None:
      if not ok:
        raise ValueError(f"{name} = {getattr(self, name)!r}: it must be {rule}")

    object.__setattr__(self, "logit_bias", _pairs(self.logit_bias))
    for field in dataclasses.fields(self):
      if field.name == "logit_bias":
        continue
      value = getattr(self, field.name)
      whole = field.name in ("top_k", "min_tokens", "seed")
      if field.name == "top_k" and value is None:
        continue
      if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        rule = "a whole number" if whole else "a number"
        raise ValueError(f"{field.name} = {value!r}: it must be {rule}")
      if field.name != "top_k" and not math.isfinite(value):
        raise ValueError(f"{field.name} = {value!r}: it must be finite")
    # Bounds beyond which float32 would turn a factor into 0 or infinity.
    check("temperature", 0 <= self.temperature <= 1e6, "0 (greedy) or positive, at most 1e6")
    check(
      "top_k", self.top_k is None or 1 <= self.top_k < 2**31, "between 1 and 2**31 - 1, or absent"
    )
    check("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
    check("min_p", 0 <= self.min_p <= 1, "between 0 and 1")
    check("repetition_penalty", 1e-6 <= self.repetition_penalty <= 1e6, "between 1e-6 and 1e6")
    check("presence_penalty", abs(self.presence_penalty) <= 1e6, "between -1e6 and 1e6")
    check("frequency_penalty", abs(self.frequency_penalty) <= 1e6, "between -1e6 and 1e6")
    check("min_tokens", 0 <= self.min_tokens < 2**31, "between 0 and 2**31 - 1")
    check("seed", 0 <= self.seed < 2**64, "between 0 and 2**64 - 1")


def _pairs(
  given: Mapping[int, float] | Iterable[tuple[int, float]],
) -> tuple[tuple[int, float], ...]:
  """Check the biases of tokens and sort them by id."""
  try:
    pairs = list(given.items()) if isinstance(given, Mapping) else [(i, v) for i, v in given]
  except (TypeError, ValueError):
    raise ValueError(
      f"logit_bias = {str(given)[:40]}: it must be a mapping from token ids to numbers, or pairs of them"
    ) from None
  if len(pairs) > MOST_BIASES:
    raise ValueError(f"logit_bias has {len(pairs)} tokens: give at most {MOST_BIASES}")
  for id, value in pairs:
    if isinstance(id, bool) or not isinstance(id, int) or not 0 <= id < 2**31:
      raise ValueError(f"logit_bias of token {id!r}: ids are whole numbers from 0 to 2**31 - 1")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (value == -math.inf or abs(value) <= 1e6):
      raise ValueError(
        f"logit_bias of token {id} = {value!r}: it must be a number between -1e6 and 1e6, or -inf"
      )
  ids = sorted(id for id, _ in pairs)
  if twice := [id for id, after in itertools.pairwise(ids) if id == after]:
    raise ValueError(f"logit_bias names token {twice[0]} twice: give each token once")
  return tuple(sorted((id, float(value)) for id, value in pairs))
