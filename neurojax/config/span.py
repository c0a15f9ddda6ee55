"""A contiguous range of a model's layers."""

import dataclasses
from typing import Self

from neurojax.config.model import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
  """A contiguous range of layers, both ends included, of a model of `num_layers` layers.

  The first span of a model also holds the embedding, the last one the final norm, the head and
  the sampler.
  """

  first_layer: int
  last_layer: int
  num_layers: int

  def __post_init__(self) -> None:
    if not 0 <= self.first_layer <= self.last_layer < self.num_layers:
      raise ValueError(
        f"layers {self.first_layer}..{self.last_layer} are no range within 0..{self.num_layers - 1}"
      )

  def __len__(self) -> int:
    return self.last_layer - self.first_layer + 1

  def __str__(self) -> str:
    return f"{self.first_layer}..{self.last_layer} of {self.num_layers}"

  @property
  def is_first(self) -> bool:
    return self.first_layer == 0

  @property
  def is_last(self) -> bool:
    return self.last_layer == self.num_layers - 1

  @classmethod
  def whole(cls, config: ModelConfig) -> Self:
    return cls(first_layer=0, last_layer=config.num_layers - 1, num_layers=config.num_layers)
