"""One kind of layer: what mixes positions, its heads, its rotary positions and its window."""

import dataclasses
import math
import typing
from typing import ClassVar, Literal

from neurojax.config.checks import check_count, check_positive
from neurojax.config.toml import sparse

Mixer = Literal["attention", "convolution"]
RopeKind = Literal["linear", "llama3", "yarn", "factors", "proportional"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
  """How rotary frequencies depart from base**(-2i/H), for pair i of a head.

    linear        divided by `factor` (arXiv:2306.15595)
    llama3        wavelengths beyond original_context_length / low_freq_factor divided by `factor`,
                  those below original_context_length / high_freq_factor kept, a line in between
    yarn          divided by `factor` where a pair turns less than beta_slow times within
                  original_context_length, kept where more than beta_fast times, a line in between;
                  cosine and sine times attention_factor (arXiv:2309.00071)
    factors       pair i divided by factors[i], and all by `factor`
    proportional  the first part `rotated` of the pairs turn, the others do not; all by `factor`

  Attributes:
    attention_factor: yarn's; None: 0.1 ln(factor) + 1.
    truncate: yarn's: the ends of its line are whole pairs.
  """

  kind: RopeKind
  factor: float = sparse(1.0)
  original_context_length: int | None = sparse(None)
  low_freq_factor: float = sparse(1.0)
  high_freq_factor: float = sparse(4.0)
  beta_fast: float = sparse(32.0)
  beta_slow: float = sparse(1.0)
  attention_factor: float | None = sparse(None)
  truncate: bool = sparse(True)
  factors: tuple[float, ...] = sparse(())
  rotated: float = sparse(1.0)

  _USED: ClassVar[dict[str, tuple[str, ...]]] = {
    "linear": (),
    "llama3": ("original_context_length", "low_freq_factor", "high_freq_factor"),
    "yarn": (
      "original_context_length",
      "beta_fast",
      "beta_slow",
      "attention_factor",
      "truncate",
    ),
    "factors": ("factors",),
    "proportional": ("rotated",),
  }

  def __post_init__(self) -> None:
    if self.kind not in self._USED:
      raise ValueError(f"kind = {self.kind!r}: choose one of {', '.join(self._USED)}")
    for field in dataclasses.fields(self):
      value, used = getattr(self, field.name), ("kind", "factor", *self._USED[self.kind])
      if field.name not in used and value != field.default:
        raise ValueError(f"{field.name} = {value!r}: rope scaling {self.kind!r} has no use for it")
    for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
      check_positive(name, getattr(self, name))
    if self.attention_factor is not None:
      check_positive("attention_factor", self.attention_factor)
    if self.kind in ("llama3", "yarn"):
      check_count("original_context_length", self.original_context_length)
    if self.low_freq_factor >= self.high_freq_factor:
      raise ValueError(
        f"low_freq_factor = {self.low_freq_factor} is not below high_freq_factor ="
        f" {self.high_freq_factor}"
      )
    if self.beta_slow >= self.beta_fast:
      raise ValueError(f"beta_slow = {self.beta_slow} is not below beta_fast = {self.beta_fast}")
    if self.kind == "factors" and not self.factors:
      raise ValueError("factors is empty: one for each rotated pair of a head")
    for i, value in enumerate(self.factors):
      check_positive(f"factors[{i}]", value)
    if not 0 < self.rotated <= 1:
      raise ValueError(f"rotated = {self.rotated!r}: it must be above 0 and at most 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
  """What differs between the layers of one model; None takes the model's own number.

  Attributes:
    mixer: What mixes positions: attention, or a short convolution gated on both sides (LFM2).
    rope_scaling, sliding_window: None is none.
    shared_kv: Values are what the key projection gives; there is no value projection (Gemma 4).
  """

  mixer: Mixer = sparse("attention")
  head_dim: int | None = None
  num_kv_heads: int | None = None
  rope_base: float | None = None
  rope_scaling: RopeScaling | None = None
  sliding_window: int | None = None
  shared_kv: bool = sparse(False)

  def __post_init__(self) -> None:
    if self.mixer not in typing.get_args(Mixer):
      raise ValueError(f"mixer = {self.mixer!r}: choose one of {typing.get_args(Mixer)}")
    more = [f.name for f in dataclasses.fields(self) if f.name != "mixer"]
    if self.mixer == "convolution" and any(getattr(self, name) for name in more):
      raise ValueError("a convolution has no heads, positions or window: leave its other keys out")
    for name in ("head_dim", "num_kv_heads", "sliding_window"):
      if getattr(self, name) is not None:
        check_count(name, getattr(self, name))
    if self.head_dim is not None and self.head_dim % 2:
      raise ValueError(f"head_dim = {self.head_dim} is odd: rotary positions turn pairs")
    if self.rope_base is not None and not 1 < self.rope_base < math.inf:
      raise ValueError(f"rope_base = {self.rope_base!r}: it must be above 1 and finite")
