"""Reading a config.json whose author may have left anything out, or written anything."""

import math
from collections.abc import Mapping
from typing import Any

from neurojax.config import RopeScaling
from neurojax.files.names.architecture import Demand, Fault, short


class Words:
  """A config.json while the layers of its model are looked at.

  Attributes:
    text: The table.
    values: ModelConfig fields so far.
  """

  def __init__(self, text: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    self.text, self.values = text, values

  def get(self, key: str, default: Any = None) -> Any:
    """A key's value, `default` where it is absent or null."""
    value = self.text.get(key)
    return default if value is None else value

  def count(self, key: str, default: int | None = None) -> int:
    value = self.get(key, default)
    if type(value) is not int or value < 0:
      raise Fault(f"{key} = {short(value)}: expected one whole number")
    return value

  def number(self, key: str, default: float | None = None) -> float:
    value = self.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise Fault(f"{key} = {short(value)}: expected one number")
    return float(value)

  def layer_types(self, *known: str) -> list[str] | None:
    """The kind of each layer, where the file says it."""
    said = self.get("layer_types")
    if said is None:
      return None
    count = self.values["num_layers"]
    if not isinstance(said, list) or len(said) != count:
      raise Fault(f"layer_types = {short(said)}: expected {count}, one for each layer")
    for kind in said:
      if kind not in known:
        raise Demand(f"layer_types has {short(kind)}; {', '.join(known)} are computed")
    return said

  def check_layers(self) -> int:
    """The number of layers, where a list of that length is made of it."""
    count = self.values["num_layers"]
    if type(count) is not int or not 1 <= count <= 100_000:
      raise Fault(f"num_hidden_layers = {short(count)}: it must be a positive integer")
    return count

  def rope(self, layer_type: str | None = None) -> dict[str, Any]:
    """The table of rotary positions, old spelling or new, of a kind of layers where each has its own."""
    said = self.get("rope_scaling") or self.get("rope_parameters") or {}
    if not isinstance(said, dict):
      raise Fault(f"rope_parameters = {short(said)}: expected a table")
    if layer_type is not None and any(isinstance(v, dict) for v in said.values()):
      said = said.get(layer_type) or {}
    if not isinstance(said, dict):
      raise Fault(f"rope_parameters = {short(said)}: expected a table")
    return said

  def rotary(
    self, table: Mapping[str, Any], base: float, head_dim: int | None = None
  ) -> tuple[float, RopeScaling | None]:
    """The base (`base` if absent) and the scaling that a table of rotary positions gives.

    Args:
      head_dim: The width of heads that differ from the model's own.
    Raises: Demand: a kind that is not computed, or a key that is not known.
    """
    words = Words(table, self.values)
    head_dim = self.values["head_dim"] if head_dim is None else head_dim
    kind = words.get("rope_type", words.get("type", "default"))
    base = words.number("rope_theta", base)
    used = {"rope_type", "type", "rope_theta", "finetuned"}
    context = self.values["context_length"]
    original = words.get(
      "original_max_position_embeddings", self.get("original_max_position_embeddings", context)
    )
    scaling: RopeScaling | None = None
    if kind == "linear":
      used |= {"factor"}
      factor = words.number("factor")
      scaling = None if factor == 1 else RopeScaling(kind="linear", factor=factor)
    elif kind == "llama3":
      used |= {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
      scaling = RopeScaling(
        kind="llama3",
        factor=words.number("factor"),
        low_freq_factor=words.number("low_freq_factor"),
        high_freq_factor=words.number("high_freq_factor"),
        original_context_length=original,
      )
    elif kind == "yarn":
      used |= {
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor",
        "mscale", "mscale_all_dim", "truncate",
      }  # fmt: skip
      factor = words.number("factor", context / original)
      scaling = RopeScaling(
        kind="yarn",
        factor=factor,
        original_context_length=original,
        beta_fast=words.number("beta_fast", 32) or 32.0,
        beta_slow=words.number("beta_slow", 1) or 1.0,
        attention_factor=_attention_factor(words, factor),
        truncate=bool(words.get("truncate", True)),
      )
    elif kind == "proportional":
      used |= {"factor", "partial_rotary_factor"}
      # transformers turns whole pairs.
      turning = int(words.number("partial_rotary_factor", 1) * head_dim // 2)
      rotated = turning / (head_dim // 2)
      scaling = RopeScaling(kind="proportional", factor=words.number("factor", 1), rotated=rotated)
    elif kind != "default":
      raise Demand(f"rope_type = {short(kind)}")
    for key, value in table.items():
      if key not in used and value is not None and (key, value) != ("partial_rotary_factor", 1):
        # A factor beside the default kind is read by nothing.
        if kind == "default" and key in ("factor", "original_max_position_embeddings"):
          continue
        raise Demand(f"rope_parameters: {key} = {short(value)} of {kind!r}")
    return base, scaling


def _attention_factor(words: Words, factor: float) -> float | None:
  """yarn's, where it is not 0.1 ln(factor) + 1 (transformers, `_compute_yarn_parameters`)."""
  said = words.get("attention_factor")
  if said is not None:
    return words.number("attention_factor")
  mscale, all_dim = words.number("mscale", 0), words.number("mscale_all_dim", 0)
  if not mscale or not all_dim or factor <= 1:
    return None
  log = 0.1 * math.log(factor)
  return (mscale * log + 1) / (all_dim * log + 1)
