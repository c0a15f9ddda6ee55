"""Answers in the notation of each family, parted alike however they are cut."""

import json
import re

import hypothesis
import pytest
from hypothesis import strategies as st

from neurojax.tokenizer.answer.calls import Call, read_calls
from neurojax.tokenizer.answer.family import ORDER, Family, family, family_of, mark_ids
from neurojax.tokenizer.answer.parser import AnswerParser, Delta
from neurojax.tokenizer.tokenizer_spec import TokenizerSpec

SCHEMAS = {
  "f": {"type": "object", "properties": {"a": {"type": "string"}, "n": {"type": "integer"}}},
  "g": {"type": "object", "properties": {}},
}
F = Call("f", '{"a": "x y", "n": 3}')
G = Call("g", "{}")
BODY = '{"name": "f", "arguments": {"a": "x y", "n": 3}}'

# Family, text of the answer, what it is.
CORPUS = [
  ("hermes", "Just text.", Delta("Just text.")),
  ("hermes", "<think>\nWell, 2 < 3.\n</think>\n\nYes.", Delta("Yes.", "Well, 2 < 3.")),
  ("hermes", "<think>\n\n</think>\n\nYes.\n", Delta("Yes.\n")),
  ("hermes", "<think>\nNever ends", Delta("", "Never ends")),
  ("hermes", f"<tool_call>\n{BODY}\n</tool_call>", Delta(calls=(F,))),
  (
    "hermes",
    f'<think>\nHm.\n</think>\n\nI ask.\n<tool_call>\n{BODY}\n</tool_call>\n<tool_call>\n{{"name": "g"}}\n</tool_call>',
    Delta("I ask.", "Hm.", (F, G)),
  ),
  # Reasoning that a call ends, a call that the limit of tokens ends just before its mark.
  ("hermes", f"<think>\nHm.\n<tool_call>\n{BODY}", Delta("", "Hm.", (F,))),
  (
    "hermes",
    "<tool_call>\n{broken\n</tool_call> so",
    Delta("<tool_call>\n{broken\n</tool_call> so"),
  ),
  (
    "hermes",
    "<tool_call>\n<function=f>\n<parameter=a>\nx y\n</parameter>\n<parameter=n>\n3\n</parameter>\n</function>\n</tool_call>",
    Delta(calls=(F,)),
  ),
  ("llama3", '{"name": "f", "parameters": {"a": "x y", "n": 3}}', Delta(calls=(F,))),
  ("llama3", '<|python_tag|>{"name": "g", "parameters": {}}', Delta(calls=(G,))),
  (
    "llama3",
    '{"name": "g", "parameters": {}}; {"name": "f", "parameters": {"a": "x y", "n": 3}}',
    Delta(calls=(G, F)),
  ),
  (
    "llama3",
    '{"name": "unknown", "parameters": {}}',
    Delta('{"name": "unknown", "parameters": {}}'),
  ),
  ("llama3", '{"an": "object"}', Delta('{"an": "object"}')),
  ("llama3", 'Text, and {"name": "g"}', Delta('Text, and {"name": "g"}')),
  ("mistral", f"[TOOL_CALLS][{BODY}]", Delta(calls=(F,))),
  ("mistral", '[TOOL_CALLS]f[ARGS]{"a": "x y", "n": 3}[TOOL_CALLS]g[ARGS]{}', Delta(calls=(F, G))),
  ("mistral", "[THINK]Hm.[/THINK]Yes.", Delta("Yes.", "Hm.")),
  ("mistral", "Text.", Delta("Text.")),
  ("lfm2", '<|tool_call_start|>[f(a="x y", n=3), g()]<|tool_call_end|>', Delta(calls=(F, G))),
  (
    "lfm2",
    '<think>Hm.</think>Now.<|tool_call_start|>[f(a="x y", n=3)]<|tool_call_end|>I asked.',
    Delta("Now.I asked.", "Hm.", (F,)),
  ),
  (
    "lfm2",
    "<|tool_call_start|>[__import__('os')]<|tool_call_end|>",
    Delta("<|tool_call_start|>[__import__('os')]<|tool_call_end|>"),
  ),
  (
    "gemma",
    '<|tool_call>call:f{a:<|"|>x y<|"|>,n:3}<tool_call|><|tool_call>call:g{}<tool_call|>',
    Delta(calls=(F, G)),
  ),
  ("gemma", "<|channel>thought\nHm.<channel|>Yes.", Delta("Yes.", "Hm.")),
  ("think", "<think>Hm.</think>Yes.", Delta("Yes.", "Hm.")),
]
IDS = [f"{name}-{i}" for i, (name, _, _) in enumerate(CORPUS)]


def pieces(text: str, found: Family) -> list[tuple[str, bool]]:
  """The text between marks, and the marks."""
  marks = "|".join(map(re.escape, sorted(found.marks(), key=len, reverse=True)))
  return [(part, part in found.marks()) for part in re.split(f"({marks})", text) if part]


def parted(parts: list[tuple[str, bool]], found: Family, **options) -> Delta:
  parser = AnswerParser(found, schemas=SCHEMAS, **options)
  delta = Delta()
  for part, is_mark in parts:
    delta += parser.push_mark(part) if is_mark else parser.push(part)
  return delta + parser.finish()


def same(found: Delta, wanted: Delta) -> bool:
  def calls(delta: Delta) -> list:
    return [(call.name, json.loads(call.arguments)) for call in delta.calls]

  texts = (found.content, found.reasoning) == (wanted.content, wanted.reasoning)
  return texts and calls(found) == calls(wanted)


@pytest.mark.parametrize(("name", "text", "wanted"), CORPUS, ids=IDS)
def test_an_answer_is_parted_alike_at_every_cut(name: str, text: str, wanted: Delta):
  found = family(name)
  assert same(parted(pieces(text, found), found), wanted)
  # Where marks are no tokens, they are found in the text; it comes in two parts, or in single characters.
  spelled = found.marks()
  for cut in range(len(text) + 1):
    parts = [(text[:cut], False), (text[cut:], False)]
    assert same(parted(parts, found, spelled=spelled), wanted), cut
  letters = [(letter, False) for letter in text]
  assert same(parted(letters, found, spelled=spelled), wanted)


@pytest.mark.parametrize(("name", "text", "wanted"), CORPUS, ids=IDS)
def test_marks_that_are_tokens_may_come_among_text_in_any_parts(name, text, wanted):
  found = family(name)
  single = [
    piece
    for part, is_mark in pieces(text, found)
    for piece in ([(part, True)] if is_mark else [(letter, False) for letter in part])
  ]
  assert same(parted(single, found), wanted)


@pytest.mark.parametrize("name", ORDER)
def test_text_that_spells_a_mark_stays_text_where_marks_are_tokens(name: str):
  found = family(name)
  text = "so " + " and ".join(found.marks())
  assert parted([(text, False)], found) == Delta(text)


@pytest.mark.parametrize("name", [n for n in ORDER if family(n).reasoning])
def test_a_prompt_may_have_opened_the_reasoning(name: str):
  found = family(name)
  parts = [("Hm.\n", False), (found.reasoning.close, True), ("\nYes.", False)]
  assert parted(parts, found, in_reasoning=True) == Delta("Yes.", "Hm.")


@hypothesis.given(name=st.sampled_from(ORDER), data=st.data())
def test_any_text_with_any_marks_is_parted_alike_whole_and_in_letters(name: str, data):
  found = family(name)
  word = st.sampled_from([*found.marks(), "a", " ", "\n", "{", '{"name": "f"}', "f()", "[", "<"])
  text = "".join(data.draw(st.lists(word, max_size=12)))
  whole = parted([(text, False)], found, spelled=found.marks())
  single = parted([(letter, False) for letter in text], found, spelled=found.marks())
  assert same(whole, single)


@hypothesis.given(
  arguments=st.dictionaries(
    st.from_regex(r"[a-z]{1,5}", fullmatch=True),
    st.recursive(
      st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
      lambda inside: st.lists(inside, max_size=3),
      max_leaves=4,
    ),
    max_size=3,
  ).filter(lambda table: not {"true", "false", "null"} & table.keys())
)
def test_arguments_come_through_every_notation(arguments: dict):
  import keyword

  hypothesis.assume(not any(map(keyword.iskeyword, arguments)))
  text = json.dumps({"name": "f", "arguments": arguments})
  python = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
  for name, body in [
    ("hermes", text),
    ("llama3", text.replace('"arguments"', '"parameters"', 1)),
    ("mistral", f"[{text}]"),
    ("mistral", "f[ARGS]" + json.dumps(arguments)),
    ("lfm2", f"[f({python})]"),
  ]:
    calls = family(name).calls
    [call] = read_calls(body, calls, SCHEMAS)
    assert call.name == "f" and json.loads(call.arguments) == arguments


@pytest.mark.parametrize(
  "text",
  ["", "[]", "{}", "null", "1", '{"name": 3}', '{"name": "f", "arguments": []}', "[" * 10_000,
   "f(" * 5_000, "f(a=b)", "f(1)", "f(**{})", "f(a=1j)", "f(a={1})", "call:f{a:", "call:f{a:1",
   '{"name": "f", "arguments": {"a": NaN}}', "f[ARGS]", "f[ARGS]{", "<function=f>"],
)  # fmt: skip
@pytest.mark.parametrize("name", [n for n in ORDER if family(n).calls])
def test_what_is_no_call_is_none(name: str, text: str):
  calls = family(name).calls
  assert read_calls(text, calls, SCHEMAS) is None


def spec(template: str, extra: dict[str, str]) -> TokenizerSpec:
  tokens = ("<unk>", "a", *extra)
  types = ("unknown", "normal", *extra.values())
  return TokenizerSpec(
    kind="spm", tokens=tokens, types=types, scores=(0.0,) * len(tokens), chat_template=template
  )


def test_a_template_shows_its_family_and_a_vocabulary_its_marks():
  qwen = "{% if tools %}<tool_call>{% endif %}{% if enable_thinking is false %}<think>{% endif %}"
  for template, name in [
    (qwen, "hermes"),
    ("[AVAILABLE_TOOLS]", "mistral"),
    ("<|tool_list_start|>", "lfm2"),
    ("<|tool_call>", "gemma"),
    ("<|python_tag|>", "llama3"),
    ("{{ m.content.split('</think>')[-1] }}", "think"),
  ]:
    assert family_of(spec(template, {})).name == name
  assert family_of(spec("{{ m.content }}", {})) is None
  assert family_of(spec("<tool_call>f<arg_key>a</arg_key> </think>", {})).name == "think"
  # A template that never speaks of reasoning has none.
  assert family_of(spec("<tool_call>", {})).reasoning is None
  assert family_of(spec(qwen, {})).reasoning is not None
  marks = family("hermes").marks()
  found = spec(qwen, {"<think>": "user", "</think>": "control", "<tool_call>": "normal"})
  assert mark_ids(found, marks) == {2: "<think>", 3: "</think>"}


def test_every_family_is_in_the_order():
  from importlib import resources

  folder = resources.files("neurojax.tokenizer.answer") / "families"
  assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.toml" for name in ORDER)
  assert all(len({*family(name).marks()}) == len(family(name).marks()) for name in ORDER)
