"""Errors as OpenAI's clients expect them: a status, and a body with message, type, param and code."""

import re
from collections.abc import Mapping

import msgspec

from neurojax.engine.api import Busy, EngineError

_TYPES = {
  401: "authentication_error",
  403: "permission_error",
  404: "not_found_error",
  429: "rate_limit_error",
}
BUSY_S = 1
"""Seconds after which a client that found the queue full may try again."""


class ApiError(Exception):
  """An answer that is an error.

  Attributes:
    status: HTTP status.
    message: What is wrong, and the remedy.
    param: Field of the request that is at fault, if one is.
    code: A word for programs, if there is one.
    headers: Further headers of the answer.
  """

  def __init__(
    self,
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
  ):
    super().__init__(message)
    self.status, self.message, self.param, self.code = status, message, param, code
    self.headers = dict(headers or {})

  def table(self) -> dict[str, dict[str, str | None]]:
    """The body, as a table."""
    otherwise = "server_error" if self.status >= 500 else "invalid_request_error"
    kind = _TYPES.get(self.status, otherwise)
    error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
    return {"error": error}

  def body(self) -> bytes:
    return msgspec.json.encode(self.table())


def refused(param: str, message: str, code: str | None = None) -> ApiError:
  """The error for a field of the request that cannot be served."""
  return ApiError(400, message, param=param, code=code)


def as_api_error(error: BaseException) -> ApiError:
  """The answer to what went wrong. Only the text of errors that are made for users is shown."""
  match error:
    case ApiError():
      return error
    case Busy():
      return ApiError(
        429, str(error), code="rate_limit_exceeded", headers={"retry-after": str(BUSY_S)}
      )
    case EngineError():
      return ApiError(500, str(error), code="engine_error")
    case ValueError():
      return _from_value_error(error)
    case NotImplementedError():
      return ApiError(400, str(error), code="unsupported")
    case _:
      return ApiError(500, "the server failed; its log says why", code="internal_error")


_NAMED = re.compile(r"([a-z_]+)(?: of token \S+)?(?: = | has | names )")
_FIELDS = {
  "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
  "frequency_penalty", "logit_bias", "min_tokens", "seed", "n", "top_logprobs", "priority",
}  # fmt: skip


def _from_value_error(error: ValueError) -> ApiError:
  """Messages of this project begin with the name of the field that they refuse."""
  text = str(error)
  if " positions, the context is " in text:
    return refused("max_tokens", text, "context_length_exceeded")
  match = _NAMED.match(text)
  param = match[1] if match and match[1] in _FIELDS else None
  return ApiError(400, text, param=param)
