"""Grammars of answers: from JSON schemas, regular expressions and calls of tools; and the engine's masks."""

import functools
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import llguidance
import numpy as np

from neurojax.engine.api import EngineError
from neurojax.serve.errors import refused
from neurojax.tokenizer import Tokenizer

MOST_CHARACTERS = 1 << 20
"""The longest grammar."""
KEPT = 64
"""Grammars that are kept compiled."""

# Free white space lets a model that is unsure write nothing else.
_TIGHT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
NO_PARAMETERS: Mapping[str, Any] = {
  "type": "object", "properties": {}, "additionalProperties": False,
}  # fmt: skip


class _Words:
  """The vocabulary, as the library reads it."""

  is_tokenizer_wrapper = True

  def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int]):
    kinds = tokenizer.spec.types
    self.eos_token_id, self.bos_token_id = stop_ids[0], tokenizer.bos_id
    self.tokens = [tokenizer.piece(id) for id in range(tokenizer.vocab_size)]
    self.special_token_ids = [
      id for id, kind in enumerate(kinds) if kind in ("control", "unknown", "user", "unused")
    ]
    self._tokenizer, self._accepts_bytes = tokenizer, False

  def __call__(self, text: str | bytes) -> list[int]:
    return self._tokenizer.encode(text.decode() if isinstance(text, bytes) else text)


class Grammars:
  """Compiles grammars for one vocabulary, and keeps the last ones. Safe to share among threads."""

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer, self._lock = tokenizer, threading.Lock()
    self._kept: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()

  @functools.cached_property
  def words(self) -> llguidance.LLTokenizer:
    stop_ids = sorted(self._tokenizer.stop_ids)
    words = _Words(self._tokenizer, stop_ids)
    return llguidance.LLTokenizer(words, eos_token=stop_ids)  # type: ignore[arg-type]

  def prototype(self, grammar: str, param: str) -> llguidance.LLMatcher:
    """A matcher at the beginning of a grammar: each answer takes a copy of it (`deep_copy`).

    Args:
      param: Field of the request that the grammar comes from.
    Raises: ApiError: the grammar is wrong, or asks for what cannot be kept; the message names it.
    """
    if not self._tokenizer.stop_ids:
      raise refused(param, f"`{param}`: the model has no token that ends an answer")
    if len(grammar) > MOST_CHARACTERS:
      raise refused(param, f"`{param}` has {len(grammar)} characters: at most {MOST_CHARACTERS}")
    with self._lock:
      found = self._kept.get(grammar)
      if found is not None:
        self._kept.move_to_end(grammar)
        return found
    # Nobody waits for a grammar that takes long.
    found = self._compiled(grammar, param)
    with self._lock:
      self._kept[grammar] = found
      while len(self._kept) > KEPT:
        self._kept.popitem(last=False)
    return found

  def _compiled(self, grammar: str, param: str) -> llguidance.LLMatcher:
    is_wrong, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, self.words)
    if is_wrong or messages:
      raise refused(param, f"`{param}` cannot be kept: {'; '.join(messages)}", "unsupported")
    found = llguidance.LLMatcher(self.words, grammar, log_level=0)
    if found.is_error():
      raise refused(param, f"`{param}` cannot be kept: {found.get_error()}", "unsupported")
    return found


def of_schema(schema: Mapping[str, Any] | bool, param: str) -> str:
  """The grammar of a JSON schema. Raises: ApiError: it is none."""
  if isinstance(schema, bool):
    schema = {} if schema else {"not": {}}
  try:
    return llguidance.LLMatcher.grammar_from_json_schema(_text(schema), overrides=_TIGHT)  # type: ignore
  except ValueError as error:
    raise refused(param, f"`{param}` is no JSON schema: {error}") from None


def of_regex(pattern: str) -> str:
  return llguidance.LLMatcher.grammar_from_regex(pattern)


def of_choice(texts: Sequence[str]) -> str:
  return "start: " + " | ".join(_text(text) for text in texts)


def of_grammar(text: str, param: str) -> str:
  """The grammar of a text in the notation of Lark or GBNF. Raises: ApiError: it is neither."""
  try:
    return llguidance.grammar_from("grammar", text)
  except ValueError as error:
    raise refused(param, f"`{param}` cannot be read: {error}") from None


def of_calls(schemas: Mapping[str, Mapping[str, Any] | None], *, several: bool) -> str:
  """The grammar of a JSON list of calls, each with a name and arguments in their schema."""
  rule = 'start: "[" call (", " call)* "]"' if several else 'start: "[" call "]"'
  return "\n".join([rule, *_call_rules(schemas, "arguments")])


def of_strict(
  schemas: Mapping[str, Mapping[str, Any] | None],
  *,
  open: int,
  close: int,
  arguments: str,
) -> str:
  """The grammar of text with calls between marks: the arguments of each are in their schema.

  Args:
    open, close: Ids of the marks.
    arguments: Name of the arguments.
  """
  rules = [
    "start: TEXT? (marked TEXT?)*",
    f'marked: <[{open}]> "\\n" call "\\n" <[{close}]>',
    r"TEXT: /(.|\n)+/",
  ]
  return "\n".join([*rules, *_call_rules(schemas, arguments)])


def _call_rules(schemas: Mapping[str, Mapping[str, Any] | None], arguments: str) -> list[str]:
  rules = ["call: " + " | ".join(f"call_{i}" for i in range(len(schemas)))]
  for i, (name, schema) in enumerate(schemas.items()):
    head = f'{{"name": {_text(name)}, "{arguments}": '
    tight = {**(NO_PARAMETERS if schema is None else schema), "x-guidance": _TIGHT}
    rules += [f'call_{i}: {_text(head)} arguments_{i} "}}"', f"arguments_{i}: %json {_text(tight)}"]
  return rules


def _text(value: object) -> str:
  return json.dumps(value, ensure_ascii=False)


class Guide:
  """Which tokens may come next in one answer: an `engine.api.Constraint`.

  While the model reasons all may come but the end, up to a number of tokens; the grammar begins after it.

  Args:
    matcher: The grammar, at its beginning; None: any text.
    size: Ids of the engine's vocabulary.
    stop_ids: Tokens that end the answer.
    open, close: Ids of the marks of reasoning; None where there are none.
    in_reasoning: Whether the prompt ends within the reasoning.
    may_reason: Whether the answer may begin with reasoning.
    budget: Tokens of reasoning at most; None: any number.
  """

  def __init__(
    self,
    matcher: llguidance.LLMatcher | None,
    *,
    size: int,
    stop_ids: Sequence[int],
    open: int | None = None,
    close: int | None = None,
    in_reasoning: bool = False,
    may_reason: bool = False,
    budget: int | None = None,
  ):
    self._matcher, self._size, self._stop_ids = matcher, size, list(stop_ids)
    self._open, self._close, self._budget = open, close, budget
    self._in_reasoning, self._may_reason = in_reasoning, may_reason
    self._reasoned = 0

  def allowed(self, tokens: Sequence[int]) -> np.ndarray | None:
    if self._in_reasoning:
      if self._budget is not None and self._reasoned >= self._budget:
        return self._only([self._close])
      return self._all_but(self._stop_ids) if self._matcher is not None else None
    if self._matcher is None:
      return None
    if self._matcher.is_stopped():
      return self._only(self._stop_ids)
    bits = self._grammar()
    if self._may_reason and self._open is not None:
      bits[self._open // 32] |= np.uint32(1 << self._open % 32)
    return bits

  def accept(self, token: int) -> None:
    if self._in_reasoning:
      self._in_reasoning = token != self._close
      self._reasoned += self._in_reasoning
    elif self._may_reason and token == self._open:
      self._in_reasoning = True
    elif self._matcher is not None and not self._matcher.is_stopped():
      is_in = self._matcher.consume_token(token)
      if not is_in:
        raise EngineError(f"a token left the grammar: {self._matcher.get_error()}")
    self._may_reason = False

  def _grammar(self) -> np.ndarray:
    assert self._matcher is not None
    # The engine's vocabulary may be padded; what lies beyond the tokenizer's never comes.
    bits = np.zeros(-(-self._size // 32), np.uint32)
    given = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: len(bits)]
    bits[: len(given)] = given
    if self._matcher.is_error():
      raise EngineError(f"the grammar became too complex: {self._matcher.get_error()}")
    return bits

  def _only(self, ids: Sequence[int | None]) -> np.ndarray:
    bits = np.zeros(-(-self._size // 32), np.uint32)
    for id in ids:
      assert id is not None
      bits[id // 32] |= np.uint32(1 << id % 32)
    return bits

  def _all_but(self, ids: Sequence[int]) -> np.ndarray:
    bits = np.full(-(-self._size // 32), 0xFFFFFFFF, np.uint32)
    for id in ids:
      bits[id // 32] &= ~np.uint32(1 << id % 32)
    return bits
