"""Whatever is drawn under the masks of a schema is valid, or the schema was refused by name."""

import json
import random

import hypothesis
import jsonschema
import numpy as np
import pytest
from hypothesis import strategies as st

from neurojax.files.find import model_path
from neurojax.files.open import open_model
from neurojax.serve import grammar
from neurojax.serve.errors import ApiError
from neurojax.serve.grammar import Grammars, Guide
from neurojax.tokenizer import Tokenizer

with open_model(model_path("neurollm")) as file:
  TOKENIZER = Tokenizer(file.tokenizer)
GRAMMARS = Grammars(TOKENIZER)
SIZE = TOKENIZER.vocab_size + 70  # an engine's vocabulary may be padded
CLOSERS = [TOKENIZER.encode(text)[0] for text in ('"', "}", "]", '"}', '"]', "}}")]


def guide(text: str | None, **options) -> Guide:
  matcher = None if text is None else GRAMMARS.prototype(text, "response_format").deep_copy()
  return Guide(matcher, size=SIZE, stop_ids=sorted(TOKENIZER.stop_ids), **options)


def ids_of(bits: np.ndarray) -> list[int]:
  assert bits.dtype == np.uint32 and bits.shape == (-(-SIZE // 32),)
  return np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist()


def drawn(text: str, seed: int, *, free: int = 12, most: int = 400) -> str | None:
  """A text drawn at random under the masks; after some tokens what closes is preferred. None: no end."""
  draw, found, tokens = random.Random(seed), guide(text), list[int]()
  while len(tokens) < most:
    allowed = ids_of(found.allowed(tokens))
    assert allowed, "nothing may come next"
    ends = [id for id in allowed if id in TOKENIZER.stop_ids]
    closers = [id for id in CLOSERS if id in allowed]
    late = len(tokens) >= free
    token = draw.choice((ends or closers or allowed) if late else allowed)
    found.accept(token)
    if token in TOKENIZER.stop_ids:
      return TOKENIZER.decode(tokens, continues=True)
    tokens.append(token)
  return None


SCHEMAS = [
  {"type": "object", "properties": {"a": {"type": "string", "maxLength": 9}}, "required": ["a"], "additionalProperties": False},
  {"type": "array", "items": {"enum": ["x", 3, None, {"k": []}]}, "minItems": 2, "maxItems": 3},
  {"type": "integer", "minimum": -7, "maximum": 90, "multipleOf": 7},
  {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
  {"type": "string", "pattern": "^[a-f]{2}-\\d+$"},
  {"type": "string", "format": "date-time"},
  {"type": "string", "format": "ipv4"},
  {"anyOf": [{"type": "null"}, {"type": "boolean"}, {"const": "é\"\\n"}]},
  {"$defs": {"n": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}}, "required": ["next"], "additionalProperties": False}}, "$ref": "#/$defs/n"},
  {"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"properties": {"b": {"type": "boolean"}}, "required": ["b"]}]},
  {"type": "object", "patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": False, "minProperties": 1, "maxProperties": 2},
  {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}], "items": False},
  {"type": ["string", "null"], "minLength": 2, "maxLength": 4},
  {},
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS, ids=[json.dumps(schema)[:60] for schema in SCHEMAS])
def test_what_is_drawn_under_a_schema_is_valid(schema: dict):
  text = grammar.of_schema(schema, "response_format")
  ended = 0
  for seed in range(8):
    answer = drawn(text, seed)
    if answer is not None:
      ended += 1
      jsonschema.validate(json.loads(answer), schema, format_checker=jsonschema.FormatChecker())
  assert ended >= 4


KEYWORDS = {
  "type": st.sampled_from(["string", "integer", "number", "boolean", "null", "array", "object", ["string", "null"]]),
  "minimum": st.integers(-50, 50), "maximum": st.integers(-50, 50), "multipleOf": st.integers(1, 9),
  "minLength": st.integers(0, 4), "maxLength": st.integers(0, 6), "pattern": st.sampled_from(["^a+$", "b", "(?!c)", "["]),
  "minItems": st.integers(0, 3), "maxItems": st.integers(0, 3), "uniqueItems": st.booleans(),
  "enum": st.lists(st.sampled_from(["a", 1, None, True, [], {"a": 1}]), max_size=3),
  "const": st.sampled_from(["a", 1, None]), "required": st.lists(st.sampled_from("ab"), max_size=2, unique=True),
  "format": st.sampled_from(["date", "uuid", "email", "nonsense"]), "additionalProperties": st.booleans(),
  "minProperties": st.integers(0, 2), "not": st.just({"type": "null"}), "title": st.just("t"),
}  # fmt: skip
LEAF = st.lists(st.sampled_from(sorted(KEYWORDS)), max_size=3, unique=True).flatmap(
  lambda names: st.fixed_dictionaries({name: KEYWORDS[name] for name in names})
)
SCHEMA = st.recursive(
  LEAF,
  lambda inside: st.one_of(
    st.builds(lambda a, rest: {"type": "array", "items": a, **rest}, inside, LEAF),
    st.builds(
      lambda a, b: {"type": "object", "properties": {"a": a, "b": b}, "required": ["a"]},
      inside, inside,
    ),
    st.builds(lambda a, b: {"anyOf": [a, b]}, inside, inside),
    st.builds(lambda a, b: {"allOf": [a, b]}, inside, inside),
  ),
  max_leaves=4,
)  # fmt: skip


@hypothesis.given(schema=SCHEMA, seed=st.integers(0, 99))
@hypothesis.settings(max_examples=120)
def test_any_schema_is_kept_or_refused_by_name(schema: dict, seed: int):
  try:
    text = grammar.of_schema(schema, "response_format")
    answer = drawn(text, seed)
  except ApiError as error:
    assert error.status == 400 and error.param == "response_format" and len(error.message) > 20
    return
  if answer is None:
    return
  try:
    jsonschema.validate(json.loads(answer), schema)
  except jsonschema.SchemaError as error:
    # A keyword that says nothing of this type may hold anything, such as a pattern that is none.
    assert error.validator == "format"


def test_every_kept_grammar_starts_anew_for_each_answer():
  text = grammar.of_choice(["yes", "no"])
  assert {drawn(text, seed) for seed in range(20)} == {"yes", "no"}
  before = len(GRAMMARS._kept)
  for seed in range(3):
    assert drawn(text, seed) in ("yes", "no")
  assert len(GRAMMARS._kept) == before
  many = Grammars(TOKENIZER)
  for i in range(grammar.KEPT + 5):
    many.prototype(grammar.of_regex(f"a{{{i + 1}}}"), "x")
  assert len(many._kept) == grammar.KEPT


def test_a_guide_is_silent_while_the_model_reasons_and_lets_it_not_end():
  stop = min(TOKENIZER.stop_ids)
  found = guide(grammar.of_choice(["yes"]), open=700, close=701, may_reason=True)
  assert 700 in ids_of(found.allowed([]))
  found.accept(700)
  for _ in range(3):
    allowed = ids_of(found.allowed([]))
    assert stop not in allowed and {5, 701, SIZE - 1} <= {*allowed}
    found.accept(5)
  found.accept(701)
  text = []
  while (allowed := ids_of(found.allowed([]))) != [stop]:
    assert 700 not in allowed
    text.append(allowed[0])
    found.accept(allowed[0])
  assert TOKENIZER.decode(text, continues=True) == "yes"


@pytest.mark.parametrize("budget", [0, 1, 3])
def test_a_budget_leaves_nothing_but_the_end_of_the_reasoning(budget: int):
  found = guide(None, open=700, close=701, in_reasoning=True, budget=budget)
  for _ in range(budget):
    assert found.allowed([]) is None
    found.accept(5)
  assert ids_of(found.allowed([])) == [701]
  found.accept(701)
  assert found.allowed([]) is None
