import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurojax.config import Sampling, Serving, Span
from neurojax.pipeline import messages, rows
from neurojax.pipeline import pipeline_pb2 as pb
from neurojax.stage.step import Row, RowOutput, Tops
from neurojax.wire.identity import disagreement
from tests import tinymodel


def _ids(*ids: int) -> np.ndarray:
  return np.array(ids, np.int32)


@given(st.builds(
  Sampling, temperature=st.floats(0, 100), top_k=st.one_of(st.none(), st.integers(1, 2**31 - 1)),
  top_p=st.floats(0.001, 1), min_p=st.floats(0, 1), repetition_penalty=st.floats(0.01, 10),
  presence_penalty=st.floats(-2, 2), frequency_penalty=st.floats(-2, 2), seed=st.integers(0, 2**64 - 1),
  logit_bias=st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-1e6, 1e6) | st.just(-np.inf)),
  min_tokens=st.integers(0, 2**31 - 1),
))  # fmt: skip
def test_sampling_travels_exactly(sampling: Sampling):
  message = pb.Sampling.FromString(messages.sampling(sampling).SerializeToString())
  assert messages.sampling_request(message) == sampling


ROWS = {
  "bare": Row(slot=3, start=0, tokens=_ids(1)),
  "drawn": Row(slot=3, start=9, tokens=_ids(1), role="drawn", draws=1, allowed=np.full(9, 2**32 - 1, np.uint32)),
  "replayed": Row(slot=3, start=9, tokens=_ids(1, 2), role="replayed", hidden=np.ones((2, 3), np.float32)),
  "whole": Row(
    slot=3, start=256, tokens=_ids(1, 2), hidden=np.ones((2, 3), np.float32), draws=1, top=20,
    targets=_ids(3, 4), keep=(0, 7), seen=_ids(*range(256)),
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_rows_travel_whole(name: str):
  message = pb.Row.FromString(rows.row("s", 5, ROWS[name]).SerializeToString())
  assert (message.sequence, message.index) == ("s", 5)
  _same(rows.read_row(message, 3), ROWS[name])


def _same(found: object, wanted: object) -> None:
  for field in dataclasses.fields(wanted):
    was, now = getattr(wanted, field.name), getattr(found, field.name)
    if dataclasses.is_dataclass(was):
      _same(now, was)
    else:
      np.testing.assert_array_equal(now, was)


def _output(draws: int, length: int, top: int, scored: bool) -> RowOutput:
  def tops(places: int) -> Tops | None:
    shape = places, top
    return Tops(np.ones(shape, np.int32), np.ones(shape, np.float32)) if top and places else None

  return RowOutput(
    tokens=np.zeros(draws, np.int32) if draws else None,
    logprobs=np.ones(draws, np.float32) if draws else None,
    tops=tops(draws),
    scores=np.ones(length, np.float32) if scored else None,
    score_tops=tops(length * scored),
  )


@pytest.mark.parametrize("draws", [0, 1])
@pytest.mark.parametrize("top", [0, 3])
@pytest.mark.parametrize("scored", [False, True])
def test_outcomes_travel_whole_and_fit_what_was_asked(draws: int, top: int, scored: bool):
  targets = _ids(1, 2) if scored else None
  asked = Row(slot=0, start=0, tokens=_ids(4, 5), draws=draws, top=top, targets=targets)
  output = _output(draws, 2, top, scored)
  message = pb.RowOutcome.FromString(rows.outcome("s", 1, output).SerializeToString())
  _same(rows.read_outcome(message, asked, 9), output)
  for other in (
    dataclasses.replace(asked, draws=1 - draws),
    dataclasses.replace(asked, targets=None if scored else _ids(1, 2)),
    dataclasses.replace(asked, top=5 if draws or scored else 0, draws=max(draws, 1 - scored)),
  ):
    with pytest.raises(ValueError, match=r"was not asked|were asked"):
      rows.read_outcome(message, other, 9)


def test_a_step_is_these_bytes_until_the_protocol_is_raised():
  given_row = Row(
    slot=1, start=7, tokens=_ids(1, 2), hidden=np.ones((2, 1), np.float32), role="replayed", draws=1, top=2
  )  # fmt: skip
  [step] = rows.steps([rows.row("s", 5, given_row)])
  assert messages.PROTOCOL == 3
  assert pb.Frame(step=step).SerializeToString().hex() == (
    "22490a470a01731005180722190a05696e7433321201021a08010000000200000020fcae841c2a1d0a07666c6f61743332"
    "120202011a080000803f0000803f2090a399a80d300238014002"
  )


@pytest.mark.parametrize("seed", range(4))
def test_frames_hold_all_rows_in_order_and_keep_to_the_message_limit(seed: int):
  rng = np.random.default_rng(seed)
  config = dataclasses.replace(tinymodel.CONFIG, context_length=2048)
  wide, most = config.model_dim, 2**31 - 1

  def largest(length: int) -> Row:
    return Row(
      slot=0, start=2**24 - 256, tokens=np.full(length, most, np.int32),
      hidden=np.ones((length, wide), np.float32), draws=1, top=20, keep=(most,),
      targets=np.full(length, most, np.int32),
      seen=np.full(config.context_length, most, np.int32) if seed and rng.random() < 0.05 else None,
      allowed=np.zeros(-(-config.vocab_size // 32), np.uint32),
    )  # fmt: skip

  lengths = rng.choice([1, 16, 256], 300, p=[0.9, 0.08, 0.02]) if seed else np.ones(700, int)
  written = [rows.row("s" * 64, 2**32 - 1 - i, largest(length)) for i, length in enumerate(lengths)]
  steps = list(rows.steps(written))
  assert [row for step in steps for row in step.rows] == written
  limit = messages.message_limit(config, 256)
  assert max(pb.Frame(step=step).ByteSize() for step in steps) <= limit
  outputs = [
    rows.outcome("s" * 64, row.index, _output(1, row.tokens.shape[0], 20, True))
    for row in max(steps, key=lambda step: sum(row.tokens.shape[0] for row in step.rows)).rows
  ]
  assert pb.Frame(outcome=pb.Outcome(rows=outputs, compute_s=1.0)).ByteSize() <= limit
  assert len(steps) == 3 if not seed else len(steps) > 3


@pytest.mark.parametrize("programs", ["auto", "model", "fused", "quick"])
def test_servings_travel_whole(programs: str):
  wanted = Serving(
    dtype="bfloat16", weights="w2a8", context=77, sequences=3, cache="int8", prefix=300, programs=programs
  )  # fmt: skip
  # The identity says by which programs all stages run; a program for a lone sequence is a leave.
  settled = "auto" if programs == "quick" else programs
  identity = messages.identity(
    tinymodel.CONFIG, sha256="a" * 64, dtype="bfloat16", context_length=77, programs=settled
  )
  span = Span(first_layer=1, last_layer=2, num_layers=6)
  request = messages.load_request(identity, span, wanted)
  request = pb.LoadRequest.FromString(request.SerializeToString())
  assert messages.serving(request) == dataclasses.replace(wanted, programs=settled)
  assert request.quick == (programs == "quick")
  request.identity.programs = "quick"
  with pytest.raises(ValueError, match="choose one of auto, model, fused"):
    messages.serving(request)


def test_disagreements_name_both_sides():
  here = messages.identity(tinymodel.CONFIG, sha256="a" * 64, dtype="float32", context_length=5)
  there = pb.Identity()
  there.CopyFrom(here)
  assert disagreement(here, there, fields=messages.SAME_MODEL) is None
  there.model_sha256 = ""
  found = disagreement(here, there, fields=messages.SAME_MODEL)
  assert found == "model sha256 is aaaaaaaaaaaa here and none there"
