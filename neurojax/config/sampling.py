"""How the next token is chosen."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How the next token is chosen from the logits.

  Applied in this order: repetition, frequency and presence penalties; temperature; top-k; top-p
  over what top-k left; min-p over what top-p left. The log-probability reported for a token is
  that of the untouched logits.

  Attributes:
    temperature: 0 takes the likeliest token (ties: the lowest id).
    top_k: Keep the k likeliest; None keeps all. Tokens that tie with the k-th are kept.
    top_p: Keep the smallest set of likeliest tokens whose probabilities reach top_p.
    min_p: Keep tokens with at least min_p times the probability of the likeliest.
    repetition_penalty: Divides positive and multiplies negative logits of every token seen in
      prompt or answer (arXiv:1909.05858, section 4.1); 1 is off.
    presence_penalty, frequency_penalty: Subtracted once, and once per occurrence, from tokens
      of the answer so far (the OpenAI API's definition); 0 is off.
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
  seed: int = 0

  def __post_init__(self) -> None:
    def check(name: str, ok: bool, rule: str) -> None:
      if not ok:
        raise ValueError(f"{name} = {getattr(self, name)!r}: it must be {rule}")

    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      whole = field.name in ("top_k", "seed")
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
    check("seed", 0 <= self.seed < 2**64, "between 0 and 2**64 - 1")
