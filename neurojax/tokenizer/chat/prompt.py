"""Turns messages into the token ids of a prompt."""

import functools
from collections.abc import Mapping, Sequence

from neurojax.tokenizer.chat.template import ChatTemplate
from neurojax.tokenizer.tokenizer import Tokenizer


def encode_chat(
  tokenizer: Tokenizer,
  messages: Sequence[Mapping],
  *,
  add_generation_prompt: bool = True,
  **extra: object,
) -> list[int]:
  """Renders the vocabulary's own chat template and tokenizes the result.

  Control tokens are recognised where the template writes them. A message, a tool or a document that
  spells one holds ordinary text, so that no message can end its turn or begin another's.

  Args:
    extra: Tools, documents and further variables, as in `ChatTemplate.render`.
  Raises: ValueError: the vocabulary has no template, the template refuses the messages, or they are
    not messages.
  """
  spec = tokenizer.spec
  if spec.chat_template is None:
    raise ValueError("the model has no chat template: use `generate` with a plain prompt")
  template = _template(
    spec.chat_template,
    "" if spec.bos_id is None else spec.tokens[spec.bos_id],
    "" if spec.eos_id is None else spec.tokens[spec.eos_id],
  )
  guarded = [_guarded(tokenizer, message) for message in messages]
  extra = {name: _guarded(tokenizer, value) for name, value in extra.items()}
  text = template.render(guarded, add_generation_prompt=add_generation_prompt, **extra)
  return tokenizer.encode(text, parse_special=True, guarded=True)


@functools.lru_cache(maxsize=8)
def _template(source: str, bos_token: str, eos_token: str) -> ChatTemplate:
  """The template, which takes longer to read than to render."""
  return ChatTemplate(source, bos_token=bos_token, eos_token=eos_token)


def _guarded(tokenizer: Tokenizer, value: object) -> object:
  """Returns the value with every text in it guarded, except roles and keys."""
  if isinstance(value, str):
    return tokenizer.guard(value)
  if isinstance(value, Mapping):
    return {
      key: item if key in ("role", "type") else _guarded(tokenizer, item)
      for key, item in value.items()
    }
  if isinstance(value, list | tuple):
    return [_guarded(tokenizer, item) for item in value]
  return value
