"""How a model is held and run, said once for the command line, the pipeline and the planner."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Literal, Self

from neurojax.config.model import ModelConfig
from neurojax.forms import PREFILL, Form, Forms, Scales, Weights, capacity_for

Dtype = Literal["float32", "bfloat16"]
Programs = Literal["auto", "model", "fused", "quick"]
Activations = Literal["int8"]
CacheForm = Literal["auto", "int8"]
Speculate = Literal["auto", "off", "lookup"]

DEFAULT_CONTEXT = 2048
"""Positions for prompt and answer where nobody says how many."""

DEFAULT_PREFIX = 2048
"""Positions of earlier prompts that engines keep where nobody says how many."""

MOST_CONTEXT = 1 << 24
"""Positions that an engine runs at most: beyond, float32 no longer holds each position exactly."""

MOST_SEQUENCES = 4096
"""Sequences that an engine computes at the same time at most."""

_COUNTED_CONTEXT, _COUNTED_SEQUENCES = 1 << 31, 1 << 20
"""Beyond these not even sizes are counted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
  """How a model is held and run.

  Attributes:
    dtype: Floating-point type of activations and caches, and of dense weights.
    weights: Form of the matrices: one of `forms.Weights`, or "auto", the form that the model file is
      made for (`resolve` says which that is).
    context: Positions for prompt and answer together; None takes the model's own, at most
      DEFAULT_CONTEXT.
    sequences: Sequences that may be computed at the same time. Memory for their caches is reserved.
    cache: How keys and values are kept: "auto" in the dtype, "int8" rounded to 8 bits with a factor for
      each position and head.
    prefix: Positions of earlier prompts that are kept, so that a prompt which begins like one of them
      need not be computed from its start. Memory for them is reserved.
    programs: "fused" runs a few large GPU kernels, for ternary weights in bfloat16; "model" runs any
      model anywhere; "auto" is fused where it can be. With all of these a request has the same tokens and
      the same bits of their log-probabilities, alone or beside others. "quick" is "auto", but a sequence
      that is alone has the program that is fastest for one, whose sums may have another order: answers
      are then the same but for tokens that are equally likely within rounding.
    speculate: "lookup" guesses the next tokens of an answer from what followed the last ones before, in
      the prompt or the answer, and computes several in one step; a guess stands if it is what is drawn.
      "auto" does so where it was seen to be faster. "off" does not. Answers have the same tokens and the
      same bits of their log-probabilities.
  Raises: ValueError: a value that no engine takes.

  Example:
    >>> import neurojax as nj
    >>> nj.Serving(weights="int8", context=4096).resolve(nj.ModelConfig.named("llama-3.1-8b")).capacity
    4096
  """

  dtype: Dtype = "float32"
  weights: Weights | Literal["auto"] = "auto"
  context: int | None = None
  sequences: int = 4
  cache: CacheForm = "auto"
  prefix: int = 0
  programs: Programs = "auto"
  speculate: Speculate = "off"

  def __post_init__(self) -> None:
    check_choice("dtype", self.dtype, typing.get_args(Dtype))
    check_choice("weights", self.weights, ("auto", *typing.get_args(Weights)))
    check_choice("programs", self.programs, typing.get_args(Programs))
    check_choice("speculate", self.speculate, typing.get_args(Speculate))
    check_choice("cache", self.cache, typing.get_args(CacheForm))
    _check_range("prefix", self.prefix, _COUNTED_CONTEXT, least=0)
    if self.context is not None:
      _check_range("context", self.context, _COUNTED_CONTEXT)
    _check_range("sequences", self.sequences, _COUNTED_SEQUENCES)

  @property
  def capacity(self) -> int:
    """Positions that the cache of a sequence has room for. The context must be given."""
    assert self.context is not None, "resolve the serving first"
    return capacity_for(self.context)

  @property
  def cache_dtype(self) -> str:
    """Dtype of keys and values."""
    return self.dtype if self.cache == "auto" else self.cache

  @property
  def places(self) -> int:
    """Blocks of PREFILL positions that are kept of earlier prompts."""
    return -(-self.prefix // PREFILL)

  def resolve(
    self,
    config: ModelConfig,
    forms: Forms | None = None,
    activations: Activations | None = None,
  ) -> Self:
    """This serving with every choice made for one model, as an engine runs it.

    "auto" weights become "w2a8" or "w2a16" if the file has ternary matrices, by the activations it
    is made for; else "stored" if the file holds other narrow matrices; else "dense". All of these
    compute with the exact numbers of the file.

    Args:
      forms: Forms of the file's matrices by canonical name (`files.kept.stored_forms`); needed for
        any weights but "dense" and "int8".
      activations: Type of activations that the file is made for; None: not said.
    Raises: ValueError: more positions or sequences than the model or an engine takes, or weights that
      the file does not have.
    """
    context = self.context or min(config.context_length, DEFAULT_CONTEXT)
    if context > config.context_length:
      raise ValueError(
        f"context = {context}: the model was made for at most {config.context_length} positions"
      )
    weights = self.weights
    has_ternary = any(isinstance(form, Scales) for form in (forms or {}).values())
    if weights == "auto":
      weights = made_for(forms or {}, activations)
    if weights in ("w2a8", "w2a16") and not has_ternary:
      raise ValueError(
        f"weights = {weights!r}: no matrix of the file is ternary: choose 'auto', 'dense', 'int8' or"
        " 'stored'"
      )
    found = dataclasses.replace(self, context=context, weights=weights)
    found.check_engine()
    return found

  def check_engine(self) -> None:
    """Raises: ValueError: more positions or sequences than an engine takes, or choices left open."""
    check_choice("weights", self.weights, typing.get_args(Weights))
    _check_range("context", self.context, MOST_CONTEXT)
    _check_range("sequences", self.sequences, MOST_SEQUENCES)
    _check_range("prefix", self.prefix, MOST_CONTEXT, least=0)


def made_for(forms: Mapping[str, Form], activations: Activations | None = None) -> Weights:
  """The weights by which a file's own numbers are computed exactly, in the least memory."""
  if any(isinstance(form, Scales) for form in forms.values()):
    return "w2a8" if activations == "int8" else "w2a16"
  return "stored" if forms else "dense"


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
  if value not in choices:
    raise ValueError(f"{name} = {repr(value)[:40]}: choose one of {', '.join(choices)}")


def _check_range(name: str, value: object, most: int, *, least: int = 1) -> None:
  if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
    raise ValueError(f"{name} = {value!r}: a whole number between {least} and {most}")
