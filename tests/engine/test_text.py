"""Text over the fake engine, whose every token is known beforehand."""

import asyncio

import pytest

from neurojax.config import Sampling
from neurojax.engine.api import EngineError, Request
from neurojax.engine.fake import FakeEngine
from neurojax.engine.text import stream_text
from neurojax.tokenizer.tokenizer import Tokenizer
from neurojax.tokenizer.tokenizer_spec import TokenizerSpec
from tests.tinymodel import VOCAB

# Ids 3..258 are the bytes 0..255, so that the fake engine counts through the bytes.
SPEC = TokenizerSpec(
  kind="spm",
  tokens=tuple(VOCAB),
  types=("unknown", "control", "control", *["byte"] * 256, *["normal"] * (len(VOCAB) - 259)),
  scores=(0.0,) * len(VOCAB),
  bos_id=1,
  eos_id=2,
  unknown_id=0,
  stop_ids=frozenset([2]),
  add_bos=True,
  add_space_prefix=True,
)
TOKENIZER = Tokenizer(SPEC)


def collect(engine: FakeEngine, request: Request, stops=()) -> list:
  async def work():
    return [piece async for piece in stream_text(engine, TOKENIZER, request, stops=stops)]

  return asyncio.run(work())


def letters(first: str, number: int, **changes) -> Request:
  """A request whose answer is `number` bytes from `first` on."""
  return Request(prompt=[ord(first) + 3], max_tokens=number, **changes)


def engine(**changes) -> FakeEngine:
  return FakeEngine(vocab_size=len(VOCAB), **changes)


def test_the_fake_engine_counts():
  pieces = collect(engine(), letters("a", 5))
  assert "".join(p.text for p in pieces) == "abcde"
  assert [p.token.id for p in pieces] == [ord(c) + 3 for c in "abcde"]
  assert pieces[-1].finish_reason == "length" and {p.finish_reason for p in pieces[:-1]} == {None}


def test_a_stop_string_ends_the_answer_before_it_even_across_tokens():
  pieces = collect(engine(), letters("a", 20), stops=["ef", "xyz"])
  assert "".join(p.text for p in pieces) == "abcd"
  assert pieces[-1].finish_reason == "stop" and len(pieces) == 6
  # What only might have been a stop comes out in the end.
  pieces = collect(engine(), letters("a", 5), stops=["efg"])
  assert "".join(p.text for p in pieces) == "abcde" and pieces[-1].finish_reason == "length"


def test_a_stop_id_is_not_rendered():
  pieces = collect(engine(), letters("a", 9, stop_ids=frozenset([ord("d") + 3])))
  assert "".join(p.text for p in pieces) == "abc"
  assert pieces[-1].finish_reason == "stop" and pieces[-1].token.id == ord("d") + 3


def test_no_character_is_split_and_a_broken_one_is_shown_as_such():
  # Bytes C3 C4: the first begins a character that the second does not continue.
  pieces = collect(engine(), Request(prompt=[0xC3 + 3], max_tokens=2))
  assert "".join(p.text for p in pieces) == "��"
  assert all("�" not in p.text for p in pieces[:1])


def test_a_failure_passes_through_and_ends_the_text():
  async def work():
    seen = []
    with pytest.raises(EngineError, match="fails at token 3"):
      async for piece in stream_text(engine(fail_at=3), TOKENIZER, letters("a", 9)):
        seen.append(piece.text)
    return seen

  assert asyncio.run(work()) == ["a", "b", "c"]


@pytest.mark.parametrize(
  ("request_", "named"),
  [
    (Request(prompt=[], max_tokens=1), "empty"),
    (Request(prompt=[1], max_tokens=0), "max_tokens = 0"),
    (Request(prompt=[-1], max_tokens=1), "token -1"),
    (Request(prompt=[99999], max_tokens=1), "token 99999"),
    (Request(prompt=[1] * 60, max_tokens=5), "need 65 positions, the context is 64: shorten one$"),
    (Request(prompt=[1], max_tokens=1, n=0), "n = 0"),
    (Request(prompt=[1], max_tokens=1, n=129), "n = 129: it must be a whole number from 1 to 128"),
    (Request(prompt=[1], max_tokens=1, top_logprobs=21), "top_logprobs = 21"),
    (Request(prompt=[1], max_tokens=1, prompt_logprobs=-1), "prompt_logprobs = -1"),
    (Request(prompt=[1], max_tokens=1, priority=True), "priority = True"),
    (
      Request(prompt=[1], max_tokens=1, sampling=Sampling(logit_bias={99999: 1.0})),
      "token of logit_bias 99999 is outside",
    ),
    (
      Request(
        prompt=[1], max_tokens=1, sampling=Sampling(min_tokens=1), stop_ids=frozenset(range(33))
      ),
      "33 stop ids with min_tokens: give at most 32",
    ),
  ],
)
def test_requests_that_cannot_be_served_are_refused_at_the_door(request_: Request, named: str):
  with pytest.raises(ValueError, match=named):
    collect(engine(), request_)


def test_a_longer_context_is_advised_only_where_there_is_one():
  long = Request(prompt=[1] * 60, max_tokens=5)
  with pytest.raises(ValueError, match=r"or start with a longer context \(the model allows 128\)"):
    collect(engine(longest_context=128), long)
  with pytest.raises(ValueError, match=r"66 tokens to score need 65 positions.*shorten the text$"):
    asyncio.run(engine().score([1] * 66))
  with pytest.raises(ValueError, match="token 9999 is outside"):
    asyncio.run(engine().score([1, 9999]))
  assert asyncio.run(engine().score([1] * 65)).logprobs.shape == (64,)


def test_scores():
  async def work():
    found = await engine().score([1, 2, 3], first=2)
    with pytest.raises(ValueError, match="first = 3"):
      await engine().score([1, 2, 3], first=3)
    return found

  assert asyncio.run(work()).logprobs.shape == (1,)


def test_each_answer_ends_at_its_own_stop_string_and_the_others_go_on():
  """Answers of the fake engine are alike, so that those of a model of hashes are compared here."""
  from neurojax.config import Sampling
  from neurojax.engine.fake import FakeSteps
  from tests.engine import virtual

  request = Request(prompt=[5, 6], max_tokens=40, n=3, sampling=Sampling(seed=3))
  whole = [virtual.expected(request, answer) for answer in range(3)]
  # Tokens 3.. of the vocabulary are bytes: a stop that only answer 1 has, early.
  stop = TOKENIZER.decode([whole[1][4][0], whole[1][5][0]], continues=True)
  texts = [TOKENIZER.decode([id for id, _ in answer], continues=True) for answer in whole]
  assert stop in texts[1] and stop not in texts[0] and stop not in texts[2]

  async def work():
    steps = FakeSteps(vocab_size=virtual.VOCAB, slots=3)
    batch = virtual.batch(steps)
    seen = {0: "", 1: "", 2: ""}
    reasons, count = {}, 0
    async for piece in stream_text(batch, TOKENIZER, request, stops=[stop]):
      answer = piece.token.answer
      assert answer not in reasons
      seen[answer] += piece.text
      count += 1
      if piece.finish_reason:
        reasons[answer] = piece.finish_reason
    await virtual.settle(batch, steps)
    return seen, reasons, batch.load().answer_tokens

  seen, reasons, computed = virtual.run(work())
  assert seen == {0: texts[0], 1: texts[1][: texts[1].index(stop)], 2: texts[2]}
  assert reasons == {0: "length", 1: "stop", 2: "length"}
  # The answer that ended early was not computed to its end.
  assert computed < 3 * 40 - 10


def test_marks_are_told_apart_and_not_rendered():
  async def work():
    marks = frozenset([ord("c") + 3])
    stream = stream_text(engine(), TOKENIZER, letters("a", 5), stops=["bcd", "cx"], marks=marks)
    return [(piece.text, piece.is_mark) async for piece in stream]

  # A stop string does not reach over a mark.
  assert asyncio.run(work()) == [("a", False), ("", False), ("b", True), ("d", False), ("e", False)]
