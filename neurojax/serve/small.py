"""The endpoints that compute no answers: models, tokens, health and version."""

import asyncio
from typing import Any

import neurojax
from neurojax.engine.api import EngineError
from neurojax.serve.errors import ApiError, refused
from neurojax.serve.requests import Detokenize, Tokenize
from neurojax.serve.served import Served

HEALTH_S = 30.0
"""Longest wait for the token that proves that all is well."""


def models(served: Served) -> dict[str, Any]:
  return {"object": "list", "data": [model(served, name) for name in served.names]}


def model(served: Served, name: str) -> dict[str, Any]:
  """Raises: ApiError: there is no such model."""
  served.check_name(name)
  return {
    "id": name,
    "object": "model",
    "created": served.created,
    "owned_by": "neurojax",
    "root": served.name,
    "max_model_len": served.engine.context_length,
  }


def tokenize(served: Served, asked: Tokenize) -> dict[str, Any]:
  """Raises: ApiError: it is neither a text nor a conversation."""
  served.check_name(asked.model)
  if (asked.prompt is None) == (asked.messages is None):
    raise refused("prompt", "give `prompt` or `messages`")
  if asked.messages is not None:
    ids = served.chat_prompt(
      asked.messages,
      asked.tools,
      template=asked.chat_template_kwargs or {},
      add_generation_prompt=asked.add_generation_prompt is not False,
    )
  else:
    adds = asked.add_special_tokens is not False
    # Control tokens that are spelled become what they spell: who asks for a token by its text wants its id.
    ids = served.tokenizer.encode(asked.prompt or "", parse_special=True, add_special=adds)
  return {
    "count": len(ids),
    "max_model_len": served.engine.context_length,
    "tokens": ids,
    "token_strs": [served.token_text(id) for id in ids] if asked.return_token_strs else None,
  }


def detokenize(served: Served, asked: Detokenize) -> dict[str, Any]:
  """Raises: ApiError: an id is outside the vocabulary."""
  served.check_name(asked.model)
  try:
    return {"prompt": served.tokenizer.decode(asked.tokens, special=True)}
  except ValueError as error:
    raise refused("tokens", str(error)) from None


def tokenizer_info(served: Served) -> dict[str, Any]:
  """What clients that make prompts themselves ask for."""
  spec = served.tokenizer.spec

  def text(id: int | None) -> str | None:
    return None if id is None else spec.tokens[id]

  return {
    "tokenizer_class": f"neurojax.{spec.kind}",
    "vocab_size": len(spec.tokens),
    "bos_token": text(spec.bos_id),
    "eos_token": text(spec.eos_id),
    "unk_token": text(spec.unknown_id),
    "add_bos_token": spec.add_bos,
    "add_eos_token": spec.add_eos,
    "chat_template": spec.chat_template,
    "model_max_length": served.engine.context_length,
  }


async def health(served: Served) -> dict[str, Any]:
  """Raises: ApiError: no token was computed."""
  try:
    async with asyncio.timeout(HEALTH_S):
      await served.prove()
  except (EngineError, TimeoutError) as error:
    message = str(error) or f"no token within {HEALTH_S:g} s"
    raise ApiError(503, message, code="unhealthy") from None
  return {"status": "ok", "model": served.name}


def version() -> dict[str, Any]:
  return {"version": neurojax.__version__, "name": "neurojax"}
