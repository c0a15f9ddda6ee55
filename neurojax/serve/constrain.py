"""Keeps answers in a JSON schema, a regular expression or a grammar."""

from collections.abc import Callable

from neurojax.engine.api import Constraint
from neurojax.serve.errors import refused
from neurojax.serve.requests import Chat, ResponseFormat, StructuredOutputs
from neurojax.serve.served import Served


def constraint_of(
  served: Served, format: ResponseFormat | None, outputs: StructuredOutputs | None
) -> Callable[[], Constraint] | None:
  """What makes the constraint of an answer; None for free text.

  Raises: ApiError: it cannot be kept.
  """
  if format is not None and format.type != "text":
    raise refused("response_format", "`response_format` is not served yet", "unsupported_field")
  if outputs is not None:
    raise refused(
      "structured_outputs", "`structured_outputs` is not served yet", "unsupported_field"
    )
  return None


def chat_constraint(
  served: Served,
  asked: Chat,
  *,
  forced: tuple[str, ...] | None,
  named: bool,
  in_reasoning: bool,
) -> Callable[[], Constraint] | None:
  """What makes the constraint of a chat's answer: its format, the calls it has to be, its thinking.

  Args:
    forced: Tools of which one has to be called.
    named: Whether the answer is the arguments of the one tool.
    in_reasoning: Whether the prompt ends within the reasoning.
  Raises: ApiError: it cannot be kept.
  """
  if forced is not None:
    raise refused("tool_choice", "`tool_choice` can only be auto or none yet", "unsupported_field")
  if asked.thinking_token_budget is not None:
    raise refused("thinking_token_budget", "`thinking_token_budget` is not served yet")
  return constraint_of(served, asked.response_format, asked.structured_outputs)
