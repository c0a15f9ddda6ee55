"""Options of an answer, by name and type: what completion and type checkers show."""

import inspect
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypedDict

from neurojax.config import Sampling


class SamplingOptions(TypedDict, total=False):
  """Fields of a `Sampling`, each for itself."""

  temperature: float
  top_k: int | None
  top_p: float
  min_p: float
  repetition_penalty: float
  presence_penalty: float
  frequency_penalty: float
  logit_bias: Mapping[int, float] | Iterable[tuple[int, float]]
  min_tokens: int
  seed: int


class GenerateOptions(SamplingOptions, total=False):
  """What `generate` and `stream` take beside the prompt."""

  max_tokens: int
  stop: str | Sequence[str]
  ignore_eos: bool
  special: bool
  sampling: Sampling | None


class ChatOptions(GenerateOptions, total=False):
  """What `chat` and `stream_chat` take beside the messages."""

  system: str | None
  template: Mapping[str, Any] | None


def check_options(given: Mapping[str, Any], options: type) -> None:
  """Raises: TypeError: an option that there is not; names those that are."""
  known = typing.get_type_hints(options)
  if unknown := sorted(set(given) - set(known)):
    raise TypeError(f"unknown option {unknown[0]!r}: options are {', '.join(sorted(known))}")


def shows(options: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
  """Have `inspect.signature` list the options that a function takes as `**options`."""

  def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(function)
    fixed = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    named = [
      inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=..., annotation=hint)
      for name, hint in typing.get_type_hints(options).items()
    ]
    function.__signature__ = signature.replace(parameters=[*fixed, *named])  # type: ignore[attr-defined]
    return function

  return decorate
